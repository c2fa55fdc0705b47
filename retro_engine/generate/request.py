"""What is asked for and what comes back: a request, its events, the whole generation.

Letters: K neighbors, R tokens per neighbor, M chunk length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from retro_engine.config import ModelConfig
from retro_engine.errors import UsageError
from retro_engine.generate.grammar import Grammar
from retro_engine.generate.sampling import Sampling
from retro_engine.library.filters import Filter
from retro_engine.retrieval.hit import Hit

REFRESHES = ("chunk", "never")

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A token's natural log-probability under the model alone (before temperature, penalties and cuts)."""

    token: int
    text: str  # that the token alone adds: half a character is U+FFFD
    logprob: float | None  # None: the first token of a prompt, which nothing predicts
    top: tuple[tuple[int, str, float], ...] = ()  # the likeliest tokens, best first
    offset: int = 0  # characters of the text before it


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to generate."""

    prompt: str | list[int] = field(kw_only=False)
    max_new_tokens: int = field(default=64, kw_only=False)
    sampling: Sampling = field(default_factory=Sampling)
    neighbors: Sequence[str] | None = None  # None = retrieve, [] = retrieval off, else texts to read instead
    num_neighbors: int | None = None  # None = the model's k
    retrieved_length: int | None = None  # tokens of each neighbor; None = the model's r
    refresh: str = "chunk"  # never: the prompt's neighbors are read to the end
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    stop_ids: tuple[int, ...] = ()  # tokens that end it, beside those of the tokenizer
    grammar: Grammar | None = None  # that the answer must match
    logprobs: int | None = None  # None = none, 0 = of the chosen tokens, n = and of the n likeliest
    echo: bool = False  # the prompt is part of the text (and of the log-probabilities)
    add_bos: bool = False  # begin with the tokenizer's beginning-of-document token
    pad_prompt: bool = True  # left-pad so that the prompt's last token ends a chunk and reads neighbors
    passed_over: int = 0  # of the best neighbors, which the prompt itself holds
    is_chat: bool = False  # a chat template wrote the prompt: tokens that end a text may end its turns
    mode: str | None = None  # of a live library's search: lexical, dense, hybrid; None = as it was opened
    where: Filter | None = None  # which of the library's documents are read, by their metadata
    min_score: float | None = None  # of what is read; None = all that is found
    caller: str = ""  # who asks: each has a share of the engine and prefixes of his own; "" = nobody else is there

    def __post_init__(self) -> None:
        rules = (
            ("max_new_tokens", self.max_new_tokens >= (0 if self.echo else 1), "at least one token; 0 = echo alone"),
            ("num_neighbors", self.num_neighbors is None or self.num_neighbors >= 1, "at least one; neighbors=[] = off"),
            ("refresh", self.refresh in REFRESHES, f"one of {', '.join(REFRESHES)}"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "must be 0 or more"),
            ("passed_over", self.passed_over >= 0, "must be 0 or more"),
        )  # fmt: skip
        for name, holds, rule in rules:
            if not holds:
                raise UsageError(f"{name}={getattr(self, name)} cannot be used", rule)
        if self.where is not None and self.neighbors is not None:
            raise UsageError("a filter cannot be used", "neighbors are given: nothing is searched", "leave one out")
        if "" in self.stop or isinstance(self.stop, str):
            raise UsageError(f"stop={self.stop!r} cannot be used", "a tuple of texts, none of them empty")
        least = self.sampling.min_tokens
        if least > self.max_new_tokens:
            raise UsageError(f"min_tokens={least} cannot be used", f"at most {self.max_new_tokens} are generated")


def request_cost(request: Request, config: ModelConfig, has_retriever: bool) -> int:
    """Tokens that a request for a prompt of ids computes at most, those of each chunk's neighbors included."""
    tokens = len(request.prompt) + request.max_new_tokens
    if not config.retrieval or not (has_retriever if request.neighbors is None else request.neighbors):
        return tokens
    K = request.num_neighbors or (config.num_neighbors if request.neighbors is None else len(request.neighbors))
    R = config.r if request.retrieved_length is None else request.retrieved_length
    return tokens + tokens * K * R // config.chunk_size


@dataclass(frozen=True, kw_only=True)
class Event:
    """A piece of text as it comes; the pieces joined are the whole text."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    new_hits: list[Hit] | None = None  # the neighbors that this piece and those after it can read, when they change
    finish_reason: FinishReason | None = None  # set in the last event
    stopped_by: str | None = None  # the text of `stop` that ended it
    neighbor_tokens: int = 0  # that were read so far
    cached_tokens: int = 0  # of the prompt, that were remembered
    notes: list[str] = field(default_factory=list)
    error: BaseException | None = None  # in the last event of a request that failed


@dataclass
class TextSegment:
    """A run of generated text and the neighbors that it could read."""

    text: str
    neighbors: list[Hit]


@dataclass(kw_only=True)
class Generation:
    """What was generated; `segments` split it at the chunk boundaries."""

    text: str  # with echo, the prompt first
    tokens: list[int]  # generated, those of a stop string included
    segments: list[TextSegment]
    notes: list[str] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    prompt_tokens: int = 0
    logprobs: list[TokenLogprob] | None = None  # with echo, the prompt's first

    @property
    def neighbors(self) -> list[Hit]:
        """The neighbors of the first generated token."""
        return self.segments[0].neighbors if self.segments else []
