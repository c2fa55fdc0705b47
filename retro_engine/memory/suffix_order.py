"""The places of a text in the order of what stands before them: a suffix array of the text read backwards.

All places that the same tokens lead to lie side by side, and one token more before them narrows the range, so one walk gives
how often every suffix of a context occurs. Letters: n tokens of a text, T places that are asked about, L tokens of the longest
suffix, V vocabulary.
"""

import numpy as np

from retro_engine.errors import extra
from retro_engine.jit import numba

LONGEST = 32  # tokens of a context that are compared; a longer suffix is taken as this long


def order_of(tokens: np.ndarray) -> np.ndarray:
    """[n] u4: the places of `tokens` [n] u2 or u4, ordered by the token there, then by the one before it, and so on.

    libdivsufsort sorts the bytes of the tokens, the highest first; those of whole tokens are kept.
    """
    with extra("memory", "an n-gram memory cannot be built", "pydivsufsort is not installed"):
        from pydivsufsort import divsufsort
    backwards = np.ascontiguousarray(tokens[::-1])
    return (len(tokens) - 1 - divsufsort(backwards)).astype(np.uint32)


def starts_of(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """[V + 1] i8: where in the order the places of each token begin."""
    return np.concatenate(([0], np.cumsum(np.bincount(tokens, minlength=vocab_size)))).astype(np.int64)


@numba.njit(nogil=True, cache=True)
def _bound(tokens, order, low, high, back, wanted):  # type: ignore[no-untyped-def]
    """The first of the ranks low ... high whose token `back` places earlier is `wanted` or more (before the text: -1)."""
    while low < high:
        middle = (low + high) // 2
        place = np.int64(order[middle]) - back
        if place < 0 or tokens[place] < wanted:
            low = middle + 1
        else:
            high = middle
    return low


@numba.njit(nogil=True, cache=True)
def find(tokens, order, starts, text, place, ranges):  # type: ignore[no-untyped-def]
    """Ranks where the l tokens of `text` that end at `place` stand: ranges[l] = first, end. Returns the longest l that occurs."""
    ranges[0, 0], ranges[0, 1] = 0, len(order)
    longest = 0
    for length in range(1, len(ranges)):
        if place - length + 1 < 0:
            break
        token = np.int64(text[place - length + 1])
        if token < 0 or token >= len(starts) - 1:  # of a padded vocabulary: it stands nowhere
            break
        if length == 1:
            low, high = starts[token], starts[token + 1]
        else:
            low = _bound(tokens, order, low, high, length - 1, token)
            high = _bound(tokens, order, low, high, length - 1, token + 1)
        if low >= high:
            break
        ranges[length, 0], ranges[length, 1] = low, high
        longest = length
    return longest


@numba.njit(nogil=True, cache=True)
def count_suffixes(tokens, order, starts, text, sign, counts):  # type: ignore[no-untyped-def]
    """Add `sign` times how often the l tokens occur that end at each of the last places of `text` to counts [T, L + 1], a row
    each; l = 0: n.
    """
    ranges = np.empty((counts.shape[1], 2), np.int64)
    first = len(text) - len(counts)
    for row in range(len(counts)):
        longest = find(tokens, order, starts, text, first + row, ranges)
        for length in range(longest + 1):
            counts[row, length] += sign * (ranges[length, 1] - ranges[length, 0])
