"""The next token from logits: biases and penalties, then greedy, or temperature, min-p, top-k, top-p. Letter: V vocabulary."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from retro_engine.errors import UsageError

TINY = torch.finfo(torch.float32).tiny  # what is smaller is 0 to the logits
LARGEST = torch.finfo(torch.float32).max
MAX_PENALTY, MAX_BIAS = 2.0, 100.0  # OpenAI's bounds
NAMES = {"min_tokens": "min_tokens_to_generate"}  # the settings' names


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen. top_k 0 and top_p 1 keep every token; with `greedy` the likeliest one is taken."""

    greedy: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0  # tokens less likely than this share of the likeliest are left out; 0 = off
    repetition_penalty: float = 1.0  # logits of tokens seen are divided (above 0) or multiplied (below) by it
    presence_penalty: float = 0.0  # taken off the logits of tokens that were generated
    frequency_penalty: float = 0.0  # and as often as each was
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, and what is added to its logit
    min_tokens: int = 0  # a token that ends the text is not chosen before

    def __post_init__(self) -> None:
        """Raises UsageError for a value that cannot be used, and for two that contradict each other."""
        needs_sampling = "contradicts greedy=true, which takes the likeliest token"
        rules = (
            (
                "temperature",
                TINY <= self.temperature <= LARGEST,
                f"must be {TINY:.3g} or more; greedy=true takes the likeliest token",
            ),
            ("top_k", self.top_k >= 0, "must be 0 (off) or more"),
            ("top_p", TINY <= self.top_p <= 1, f"must be from {TINY:.3g} to 1"),
            ("min_p", 0 <= self.min_p <= 1, "must be from 0 (off) to 1"),
            ("presence_penalty", abs(self.presence_penalty) <= MAX_PENALTY, f"at most {MAX_PENALTY:g} either way"),
            ("frequency_penalty", abs(self.frequency_penalty) <= MAX_PENALTY, f"at most {MAX_PENALTY:g} either way"),
            ("logit_bias", all(abs(b) <= MAX_BIAS for _, b in self.logit_bias), f"at most {MAX_BIAS:g} either way"),
            ("seed", 0 <= self.seed < 1 << 63, "must be 0 or more, and below 2^63"),
            ("repetition_penalty", TINY <= self.repetition_penalty <= LARGEST, f"must be {TINY:.3g} or more; 1 is off"),
            ("min_tokens", self.min_tokens >= 0, "must be 0 (off) or more"),
            ("temperature", not self.greedy or self.temperature == 1, needs_sampling),
            ("top_k", not self.greedy or self.top_k in (0, 1), needs_sampling),
            ("top_p", not self.greedy or self.top_p == 1, needs_sampling),
            ("min_p", not self.greedy or self.min_p == 0, needs_sampling),
        )
        for name, holds, rule in rules:
            if not holds:
                raise UsageError(f"inference.{NAMES.get(name, name)}={getattr(self, name)} cannot be used", rule)


def adjusted(
    logits_V: Tensor,
    sampling: Sampling,
    seen: Iterable[int],
    counts: Mapping[int, int],
    end_ids: Iterable[int],
) -> Tensor:
    """The logits after biases, penalties and the minimum length.

    `seen`: tokens of prompt and answer (repetition_penalty, arXiv 1909.05858 section 4.1); `counts`: how often each token
    was generated (presence_penalty, frequency_penalty).
    """
    is_short = sum(counts.values()) < sampling.min_tokens
    is_pressed = bool(counts) and (sampling.presence_penalty != 0 or sampling.frequency_penalty != 0)
    if sampling.repetition_penalty == 1 and not (is_short or is_pressed or sampling.logit_bias):
        return logits_V
    logits = logits_V.clone()
    if sampling.logit_bias:
        ids, biases = zip(*sampling.logit_bias)
        logits[list(ids)] += torch.tensor(biases, dtype=logits.dtype, device=logits.device)
    if sampling.repetition_penalty != 1:
        penalty, places = sampling.repetition_penalty, torch.tensor(sorted(set(seen)), device=logits.device)
        values = logits[places]
        logits[places] = torch.where(values > 0, values / penalty, values * penalty).clamp(-LARGEST, LARGEST)
    if is_pressed:
        times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        logits[list(counts)] -= sampling.presence_penalty + sampling.frequency_penalty * times
    if is_short:
        logits[[i for i in end_ids if 0 <= i < len(logits)]] = -torch.inf
    return logits


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token id from the logits [V] of one position."""
    if sampling.greedy:
        return int(logits_V.argmax())
    logits_V = logits_V.float()
    scaled = (logits_V - logits_V.max()) / sampling.temperature  # at most 0: nothing overflows that counts
    if sampling.min_p:
        scaled = scaled.masked_fill(scaled < math.log(sampling.min_p), -torch.inf)
    if sampling.top_k:
        floor = scaled.topk(min(sampling.top_k, scaled.shape[0])).values[-1]
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    if sampling.top_p < 1:  # the smallest set of likeliest tokens with that much probability (arXiv 1904.09751)
        ordered, order = scaled.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        scaled = scaled.masked_fill(torch.zeros_like(beyond).scatter(0, order, beyond), -torch.inf)
    return int(torch.multinomial(scaled.softmax(-1), 1, generator=generator))
