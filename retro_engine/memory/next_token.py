"""A model's logits with an n-gram memory: all tokens that followed the suffixes of the text so far, mixed in (mixture.py).

Letters: V entries of the model's vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from retro_engine.memory.mixture import Mixture, class_of
from retro_engine.memory.ngram_memory import NgramMemory, Part
from retro_engine.memory.suffix_order import LONGEST, find

SEEN = 1 << 16  # places of a suffix whose next tokens are counted; of more as many, evenly spread in their order
TINY = torch.finfo(torch.float32).tiny


class MemoryBeside:
    """A memory with its weights; called for every token."""

    def __init__(self, memory: NgramMemory, mixture: Mixture):
        self.memory, self.mixture = memory, mixture

    def __call__(self, logits_V: Tensor, tokens: Sequence[int]) -> Tensor:
        """The logits [V] of what comes after `tokens`, a document from its first token on: log p, in fp32."""
        p = logits_V.float().softmax(-1).cpu().double().numpy()
        for weight, shares in self._guesses(tokens):
            p *= 1 - weight
            p[: len(shares)] += weight * shares
        return torch.from_numpy(p).clamp(min=TINY).log().to(logits_V.device, torch.float32)

    def _guesses(self, tokens: Sequence[int]) -> list[tuple[float, np.ndarray]]:
        """The weight of each suffix that says something of its own, the shortest first, and what came after it."""
        memory = self.memory
        text = np.array([memory.eod_id, *tokens][-LONGEST:], np.int64)
        ranges = [_ranges(part, text) for part in memory.parts]
        counts = sum((found[:, 1] - found[:, 0] for found in ranges), np.zeros(LONGEST + 1, np.int64))
        out = []
        for length, count in enumerate(counts.tolist()):
            if count == 0:
                break
            if length < LONGEST and counts[length + 1] == count:
                continue
            weight = float(self.mixture.weights_OC.flat[class_of(length, count)])
            out.append((weight, _followed(memory, [found[length] for found in ranges], length)))
        return out


def _ranges(part: Part, text: np.ndarray) -> np.ndarray:
    ranges = np.zeros((LONGEST + 1, 2), np.int64)
    longest = find(part.tokens, part.order, part.starts, text, len(text) - 1, ranges)
    ranges[longest + 1 :] = 0
    return ranges


def _followed(memory: NgramMemory, ranges: Sequence[np.ndarray], length: int) -> np.ndarray:
    """The share of each token among those that came after the places of these ranks."""
    counts = np.zeros(memory.vocab_size)
    for part, (first, end) in zip(memory.parts, ranges):
        if length == 0:
            counts += np.diff(part.starts)
        elif end > first:
            step = max(1.0, (end - first) / SEEN)
            ranks = (first + np.arange(0, end - first, step)).astype(np.int64)
            places = part.order[ranks].astype(np.int64) + 1
            seen = np.bincount(part.tokens[places[places < len(part.tokens)]], minlength=memory.vocab_size)
            counts += seen * step
    return counts / max(counts.sum(), 1.0)
