"""A model's logits with an n-gram memory: all tokens that followed the suffixes of the text so far, mixed in (mixture.py).

Letters: V entries of the model's vocabulary, P parts of the memory, L tokens of the longest suffix.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retro_engine.jit import numba
from retro_engine.memory.mixture import COUNTS, LENGTH_CLASSES, Mixture
from retro_engine.memory.ngram_memory import NgramMemory
from retro_engine.memory.suffix_order import LONGEST, find

SEEN = 1 << 12  # places of a suffix whose next tokens are counted; of more as many, evenly spread in their order
FEW = 1 << 9  # places that are counted anew at every token; what came after more is kept
KEPT = 1 << 11  # frequent suffixes of which it is kept, each at most SEEN tokens
LEAST_WEIGHT = 1 / 512  # a suffix that would give less of the whole probability is passed over
TINY = torch.finfo(torch.float32).tiny


class MemoryBeside:
    """A memory with its weights; called for every token, by any thread."""

    def __init__(self, memory: NgramMemory, mixture: Mixture):
        """Raises ValueError for a memory that some documents are left out of: decoding counts in all of them."""
        if memory.left_out is not None:
            raise ValueError(
                f"documents are left out of {memory.folder}: they are left out where text is evaluated alone"
            )
        self.memory, self.mixture = memory, mixture
        of_all = sum((np.diff(part.starts) for part in memory.parts), np.zeros(memory.vocab_size, np.int64))
        self._of_all = (of_all / of_all.sum()).astype(np.float32)
        self._weights = np.ascontiguousarray(mixture.weights_OC.ravel())
        self.lookups = 0  # so far
        self._followed = lru_cache(KEPT)(self._tally)

    def __call__(self, logits_V: Tensor, tokens: Sequence[int]) -> Tensor:
        """The logits [V] of what comes after `tokens`, a document's from its first on or its last LONGEST: log p, in fp32."""
        memory = self.memory
        self.lookups += 1
        text = np.array([memory.eod_id, *tokens[-LONGEST:]][-LONGEST:], np.int64)
        ranges = np.zeros((len(memory.parts), LONGEST + 1, 2), np.int64)
        for part, found in zip(memory.parts, ranges):
            find(part.tokens, part.order, part.starts, text, len(text) - 1, found)
        shares = np.zeros(LONGEST + 1, np.float32)
        p = logits_V.float().softmax(-1).cpu().numpy()
        few = _begin(p, self._of_all, ranges, self._weights, LENGTH_CLASSES, COUNTS, LEAST_WEIGHT, FEW, shares)
        for length in range(1, few):
            if shares[length]:
                ids, counts = self._followed(ranges[:, length].tobytes())
                p[ids] += shares[length] * counts
        for part, found in zip(memory.parts, ranges):
            _add(p, part.tokens, part.order, found[few:], shares[few:])
        return torch.from_numpy(p).clamp_(min=TINY).log_().to(logits_V.device)

    def summary(self) -> dict[str, Any]:
        about = self.memory.summary()
        return {name: about[name] for name in ("kind", "tokens", "documents", "fingerprint")}

    def _tally(self, ranges: bytes) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that came after the places of these ranks of each part, i8 [P, 2], and how often each did."""
        counts = np.zeros(self.memory.vocab_size, np.float32)
        for part, (first, end) in zip(self.memory.parts, np.frombuffer(ranges, np.int64).reshape(-1, 2)):
            _count(part.tokens, part.order, first, end, SEEN, counts)
        ids = np.flatnonzero(counts)
        return ids, counts[ids]


@numba.njit(nogil=True, cache=True)
def _begin(p, of_all, ranges, weights, length_classes, counts, least, few, shares):  # type: ignore[no-untyped-def]
    """Leave the model's p the share of the whole that the suffixes leave it, and add to it what stands anywhere; shares [L + 1]:
    what each place of a suffix of so many tokens gives the token after it, 0 where it says nothing of its own. Returns
    the shortest length above 0 of which there are at most `few` places.
    """
    rest, longer, shortest = 1.0, 0, len(shares)
    for length in range(len(shares) - 1, -1, -1):
        count = 0
        for part in range(len(ranges)):
            count += ranges[part, length, 1] - ranges[part, length, 0]
        if length > 0 and count <= few:
            shortest = length
        if count == 0 or count == longer:
            continue
        longer, which = count, 0
        while counts[which] < count:
            which += 1
        given = rest * weights[length_classes[length] + which]
        if given > least:
            shares[length] = given / count
            rest -= given
    anywhere = shares[0] * longer  # the last count is that of all tokens
    for token in range(len(p)):
        p[token] *= rest
    for token in range(len(of_all)):
        p[token] += anywhere * of_all[token]
    return shortest


@numba.njit(nogil=True, cache=True)
def _add(p, tokens, order, ranges, shares):  # type: ignore[no-untyped-def]
    """Add what every place of some suffixes of one part gives."""
    for length in range(len(shares)):
        for rank in range(ranges[length, 0], ranges[length, 1] if shares[length] else 0):
            place = np.int64(order[rank]) + 1
            if place < len(tokens):
                p[tokens[place]] += shares[length]


@numba.njit(nogil=True, cache=True)
def _count(tokens, order, first, end, seen, counts):  # type: ignore[no-untyped-def]
    """Count the tokens after the places of the ranks first ... end - 1, or of `seen` of them as if they were all."""
    looked_at = min(end - first, seen)
    for number in range(looked_at):
        place = np.int64(order[first + number * (end - first) // looked_at]) + 1
        if place < len(tokens):
            counts[tokens[place]] += (end - first) / looked_at
