"""A model's logits with an n-gram memory: all tokens that followed the suffixes of the text so far, mixed in (mixture.py).

Letters: V entries of the model's vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from retro_engine.jit import numba
from retro_engine.memory.mixture import Mixture, class_of
from retro_engine.memory.ngram_memory import NgramMemory, Part
from retro_engine.memory.suffix_order import LONGEST, find

SEEN = 1 << 10  # places of a suffix whose next tokens are counted; of more as many, evenly spread in their order
LEAST_WEIGHT = 1 / 512  # a suffix that would give less of the whole probability is passed over
TINY = torch.finfo(torch.float32).tiny


class MemoryBeside:
    """A memory with its weights; called for every token."""

    def __init__(self, memory: NgramMemory, mixture: Mixture):
        self.memory, self.mixture = memory, mixture
        of_all = sum((np.diff(part.starts) for part in memory.parts), np.zeros(memory.vocab_size, np.int64))
        self._of_all = of_all / of_all.sum()

    def __call__(self, logits_V: Tensor, tokens: Sequence[int]) -> Tensor:
        """The logits [V] of what comes after `tokens`, a document from its first token on: log p, in fp32."""
        p = logits_V.float().softmax(-1).cpu().numpy()
        for weight, shares in self._guesses(tokens):
            p *= np.float32(1 - weight)
            p[: len(shares)] += weight * shares
        return torch.from_numpy(p).clamp(min=TINY).log().to(logits_V.device)

    def _guesses(self, tokens: Sequence[int]) -> list[tuple[float, np.ndarray]]:
        """The weight of each suffix that says something of its own, the shortest first, and what came after it."""
        memory = self.memory
        text = np.array([memory.eod_id, *tokens[-LONGEST:]][-LONGEST:], np.int64)
        ranges = [_ranges(part, text) for part in memory.parts]
        counts = sum((found[:, 1] - found[:, 0] for found in ranges), np.zeros(LONGEST + 1, np.int64)).tolist()
        out, rest = [], 1.0
        for length in range(LONGEST, -1, -1):
            count = counts[length]
            if not count or (length < LONGEST and counts[length + 1] == count):
                continue
            weight = float(self.mixture.weights_OC.flat[class_of(length, count)])
            if rest * weight > LEAST_WEIGHT:
                out.append((weight, self._followed([found[length] for found in ranges], length)))
                rest *= 1 - weight
        return out[::-1]

    def _followed(self, ranges: Sequence[np.ndarray], length: int) -> np.ndarray:
        """The share of each token among those that came after the places of these ranks."""
        if length == 0:
            return self._of_all
        counts = np.zeros(self.memory.vocab_size)
        for part, (first, end) in zip(self.memory.parts, ranges):
            _tally(part.tokens, part.order, first, end, max(1.0, (end - first) / SEEN), counts)
        return counts / max(counts.sum(), 1.0)


def _ranges(part: Part, text: np.ndarray) -> np.ndarray:
    ranges = np.zeros((LONGEST + 1, 2), np.int64)
    longest = find(part.tokens, part.order, part.starts, text, len(text) - 1, ranges)
    ranges[longest + 1 :] = 0
    return ranges


@numba.njit(nogil=True, cache=True)
def _tally(tokens, order, first, end, step, counts):  # type: ignore[no-untyped-def]
    """Add `step` to the count of the token that comes after each of the ranks first, first + step ... below end."""
    rank = float(first)
    while rank < end:
        place = np.int64(order[np.int64(rank)]) + 1
        if place < len(tokens):
            counts[tokens[place]] += step
        rank += step
