"""The next token from logits: greedy, temperature, top-k, top-p."""

from dataclasses import dataclass

import torch
from torch import Tensor

from retro_engine.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. `greedy` ignores the rest; top_k 0 and top_p 1 keep every token."""

    greedy: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = (
            (
                "temperature",
                self.temperature,
                self.temperature > 0,
                "must be above 0; greedy=true takes the likeliest token",
            ),
            ("top_k", self.top_k, self.top_k >= 0, "must be 0 (off) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "must be in (0, 1]"),
        )
        for name, value, holds, rule in rules:
            if not holds:
                raise UsageError(f"inference.{name}={value} cannot be used", rule)


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token id from the logits [V] of one position."""
    if sampling.greedy:
        return int(logits_V.argmax())
    scaled = logits_V.float() / sampling.temperature
    if sampling.top_k:
        floor = scaled.topk(min(sampling.top_k, scaled.shape[0])).values[-1]
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    if sampling.top_p < 1:  # the smallest set of likeliest tokens with that much probability (arXiv 1904.09751)
        ordered, order = scaled.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        scaled = scaled.masked_fill(torch.zeros_like(beyond).scatter(0, order, beyond), -torch.inf)
    return int(torch.multinomial(scaled.softmax(-1), 1, generator=generator))
