"""Postings: for every term, by its 64-bit hash, the chunks that have it, ascending, and a value of it in each.

The value is how often the chunk has the term (u2), or in a published index, whose chunks are never others, its BM25 score
(f4). In files it is `terms`, `starts` (where a term's entries begin, and the end), `chunks` and the values.
Letters: T terms, P entries, U chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retro_engine.jit import numba


@dataclass(frozen=True)
class Postings:
    """Entries firsts[t] ... lasts[t] - 1 are term t's."""

    terms: np.ndarray  # [T] u8; ascending where they are a whole collection's
    firsts: np.ndarray  # [T] i8
    lasts: np.ndarray
    chunks: np.ndarray  # [P] i4
    values: np.ndarray  # [P]

    @classmethod
    def inverted(cls, hashes: np.ndarray, counts: np.ndarray, ends: np.ndarray) -> "Postings":
        """Of chunks whose terms stand one after another, as in `analyzer.Terms`."""
        order = np.argsort(hashes, kind="stable")  # of one term, chunks stay ascending
        ordered = hashes[order]
        firsts = np.flatnonzero(np.concatenate((ordered[:1] == ordered[:1], ordered[1:] != ordered[:-1])))
        chunks = np.repeat(np.arange(len(ends), dtype=np.int32), np.diff(ends, prepend=0))
        return cls(ordered[firsts], firsts, np.append(firsts, len(hashes))[1:], chunks[order], counts[order])

    @property
    def starts(self) -> np.ndarray:
        return np.append(self.firsts, len(self.chunks))

    def of(self, hashes: np.ndarray) -> "Postings":
        """Those of some terms; one that nothing has has no entry."""
        if not len(self.terms):
            nowhere = np.zeros(len(hashes), np.int64)
            return Postings(hashes, nowhere, nowhere, self.chunks, self.values)
        places = np.minimum(np.searchsorted(self.terms, hashes), len(self.terms) - 1)
        is_known = self.terms[places] == hashes
        firsts, lasts = np.where(is_known, self.firsts[places], 0), np.where(is_known, self.lasts[places], 0)
        return Postings(hashes, firsts, lasts, self.chunks, self.values)


def do_fit(terms: np.ndarray, starts: np.ndarray, chunks: np.ndarray, values: np.ndarray, num_chunks: int) -> bool:
    """Whether arrays from files are postings of `num_chunks` chunks: numba checks no bounds."""
    return (
        len(starts) == len(terms) + 1
        and len(values) == len(chunks)
        and (int(starts[0]), int(starts[-1])) == (0, len(chunks))
        and bool((np.diff(starts) >= 0).all())
        and bool((terms[1:] > terms[:-1]).all())
        and (not len(chunks) or (int(chunks.min()) >= 0 and int(chunks.max()) < num_chunks))
        and bool(_ascend(starts, chunks))
    )


@numba.njit(nogil=True, cache=True)
def _ascend(starts, chunks):  # type: ignore[no-untyped-def]
    """Whether each term's chunks do: a search goes through them once, window by window."""
    for term in range(len(starts) - 1):
        for entry in range(starts[term] + 1, starts[term + 1]):
            if chunks[entry] <= chunks[entry - 1]:
                return False
    return True


def joined(parts: Sequence[Postings], numbers: Sequence[np.ndarray]) -> Postings:
    """The postings of several collections as one: what their chunks together would make, byte for byte.

    `numbers`: for each part what its chunks are called in the whole, ascending, -1 = left out; empty = as in the part.
    """
    terms = np.unique(np.concatenate([part.terms for part in parts]))
    places = [np.searchsorted(terms, part.terms) for part in parts]
    sizes = np.zeros(len(terms), np.int64)
    for part, place, number in zip(parts, places, numbers):
        _count_entries(part.firsts, part.lasts, part.chunks, number, place, sizes)
    lasts = np.cumsum(sizes)
    firsts, used = lasts - sizes, sizes > 0
    total = int(sizes.sum())
    chunks, values = np.empty(total, np.int32), np.empty(total, parts[0].values.dtype)
    cursors = firsts.copy()
    for part, place, number in zip(parts, places, numbers):
        _copy_entries(part.firsts, part.lasts, part.chunks, part.values, number, place, cursors, chunks, values)
    return Postings(terms[used], firsts[used], lasts[used], chunks, values)


@numba.njit(nogil=True, cache=True)
def _count_entries(firsts, lasts, chunks, numbers, places, sizes):  # type: ignore[no-untyped-def]
    for term in range(len(places)):
        for entry in range(firsts[term], lasts[term]):
            sizes[places[term]] += not len(numbers) or numbers[chunks[entry]] >= 0


@numba.njit(nogil=True, cache=True)
def _copy_entries(firsts, lasts, chunks, values, numbers, places, cursors, to_chunks, to_values):  # type: ignore[no-untyped-def]
    for term in range(len(places)):
        cursor = cursors[places[term]]
        for entry in range(firsts[term], lasts[term]):
            number = numbers[chunks[entry]] if len(numbers) else chunks[entry]
            if number >= 0:
                to_chunks[cursor] = number
                to_values[cursor] = values[entry]
                cursor += 1
        cursors[places[term]] = cursor
