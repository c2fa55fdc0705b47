"""One sequence in the making: its tokens, its text as it can be shown, where it ends.

Letters: K neighbors, R tokens per neighbor, M chunk length, L chunks, V vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from retro_engine.data.tokenizer import Tokenizer
from retro_engine.generate.detokenizer import Detokenizer
from retro_engine.generate.drafts import Drafts, Guess
from retro_engine.generate.grammar import UNFINISHED, Matcher
from retro_engine.generate.request import Event, FinishReason, Generation, Request, TextSegment, TokenLogprob
from retro_engine.generate.sampling import adjusted, choose
from retro_engine.memory.suffix_order import LONGEST
from retro_engine.retrieval.hit import Found, Hit


@dataclass(eq=False, kw_only=True)
class DecodingSequence:
    """A request that is worked on; made by `Generator.open`."""

    request: Request
    tokenizer: Tokenizer
    chunk_size: int  # M
    tokens: list[int]  # padding, prompt, what was generated
    pad: int
    K: int
    R: int
    is_reading: bool
    in_front: bool  # of the decoder's own keys
    given: Found | None  # read at every chunk boundary from the prompt's last token on; in front once, before its first
    notes: list[str]
    drafts: Drafts | None = None
    matcher: Matcher | None = None  # of the request's grammar
    beside: Callable[[Tensor, Sequence[int]], Tensor] | None = None  # a memory: the logits with what it knows
    filled: int = 0  # tokens that the cache has
    read: int = 0  # tokens of neighbors so far
    cached: int = 0  # tokens of the prompt that were remembered
    finish_reason: FinishReason | None = None
    segments: list[TextSegment] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str = ""  # that was shown

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)  # padding included
        self.seen = set(self.tokens[self.pad :])
        self._counts: Counter[int] = Counter()  # of the tokens that were generated
        self._unsaid = list(self.notes)
        self._random = torch.Generator().manual_seed(self.request.sampling.seed)
        self._text = Detokenizer(self.tokenizer, () if self.request.echo else self.tokens[self.pad :])
        self._echoed, self._num_echoed = "", self.pad  # with echo: text of the prompt, and its tokens so far
        special = [self.tokenizer.special_id(stop.strip()) for stop in self.request.stop]  # never in a decoded text
        self.end_ids = {*self.tokenizer.end_ids, *(i for i in special if i is not None), *self.request.stop_ids}
        self._shown_tokens = self.pad - self.prompt_length if self.request.echo else 0
        self._shown_logprobs = 0
        self._decoded = ""  # generated text that is not shown yet
        self._new_hits: list[Hit] | None = None
        self._stopped_by: str | None = None

    @property
    def produced(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def total(self) -> int:
        """Tokens of the cache that it may come to need."""
        return self.prompt_length + self.request.max_new_tokens

    @property
    def neighbor_tokens(self) -> int:
        """Of the neighbors that it reads at a time."""
        if not self.is_reading:
            return 0
        return self.R * (self.K if self.given is None else len(self.given.lengths_K))

    def texts(self, stop: int) -> list[str]:
        """Of the chunks that the tokens up to `stop` complete."""
        M = self.chunk_size
        chunks = [self.tokens[max(u * M, self.pad) : (u + 1) * M] for u in range(self.filled // M, stop // M)]
        return self.tokenizer.decode_batch(chunks)

    @property
    def looks_anew(self) -> bool:
        """Whether other neighbors are read where a chunk ends, or the same ones by the chunk."""
        return self.is_reading and not (self.in_front and self.given is not None)

    def completes(self) -> bool:
        """Whether the next step ends a chunk whose neighbors are read."""
        return self.looks_anew and len(self.tokens) % self.chunk_size == 0

    def keep_found(self, found: Found) -> None:
        """Hits that the next text can read; with refresh="never" they stay."""
        if self._new_hits is not None and self.segments:  # a whole chunk without text: half a character, still
            self.segments.append(TextSegment("", self._new_hits))
        self._new_hits = found.hits
        if self.drafts is not None:
            self.drafts.read([tokens[:length].tolist() for tokens, length in zip(found.tokens_KR, found.lengths_K)])
        if self.request.refresh == "never" and self.given is None:
            self.given = found

    def guesses(self, most: int) -> list[Guess]:
        """At what comes after the newest token: up to the token before one that ends a chunk whose neighbors are read."""
        assert self.drafts is not None
        place, M = len(self.tokens) - 1, self.chunk_size
        most = min(most, self.total - len(self.tokens) - 1)
        if self.looks_anew:
            most = min(most, (place + 1 + M) // M * M - 2 - place)
        return self.drafts.propose(self.tokens, most)

    def note_prompt(self, logits_TV: Tensor, start: int) -> None:
        """Log-probabilities of the prompt's tokens after each of tokens start ... start + t - 1."""
        if start <= self.pad:
            self.logprobs.append(self._logprob(None, self.tokens[self.pad]))
            self._echo(self.pad + 1)
        for place in range(max(start, self.pad), min(start + len(logits_TV), self.prompt_length - 1)):
            logits_V = self._with_memory(logits_TV[place - start], place + 1)
            self.logprobs.append(self._logprob(logits_V, self.tokens[place + 1]))
            self._echo(place + 2)

    def _with_memory(self, logits_V: Tensor, stop: int) -> Tensor:
        """The logits of what comes after the tokens up to `stop`, with what a memory knows."""
        if self.beside is None:
            return logits_V
        return self.beside(logits_V, self.tokens[max(self.pad, stop - LONGEST) : stop])

    def _echo(self, stop: int) -> None:
        """The text of the prompt's tokens up to `stop`."""
        if self._num_echoed < stop:
            self._echoed += self._text.push(self.tokens[self._num_echoed : stop])
            self._num_echoed = stop

    def _logprob(self, logits_V: Tensor | None, token: int) -> TokenLogprob:
        if logits_V is None:
            return TokenLogprob(
                token=token, text=self.tokenizer.decode([token]), logprob=None
            )  # what comes first has no text before it
        values = logits_V.to(torch.promote_types(logits_V.dtype, torch.float32)).log_softmax(-1)
        best = values.topk(min(self.request.logprobs or 0, len(values)))
        ids = best.indices.tolist()
        texts = self.tokenizer.pieces([token, *ids])
        top = tuple(zip(ids, texts[1:], best.values.tolist()))
        return TokenLogprob(token=token, text=texts[0], logprob=float(values[token]), top=top, offset=self._text.length)

    def accept(self, logits_V: Tensor) -> Event | None:
        """Choose the next token; what there is to show of it, if anything."""
        sampling, count = self.request.sampling, len(self.tokens) - self.prompt_length
        if count == 0 and self.request.echo:
            self._echo(self.prompt_length)
        if count >= self.request.max_new_tokens:  # 0: only the prompt is scored
            self.finish_reason = "length"
            return self._event(self._flush())
        logits_V = self._with_memory(logits_V, len(self.tokens))
        logits = adjusted(logits_V, sampling, self.seen, self._counts, self.end_ids)
        if self.matcher is not None:
            logits = self.matcher.allowed(logits, logits_V)
        token = choose(logits, sampling, self._random)
        if token in self.end_ids:
            self.finish_reason = "stop"
            return self._event(self._flush())
        self.tokens.append(token)
        self.seen.add(token)
        self._counts[token] += 1
        if self.request.logprobs is not None:
            self.logprobs.append(self._logprob(logits_V, token))
        self._decoded += self._text.push([token])
        shown = self._before_stop()
        reason = self._end(token, count + 1)
        if self.finish_reason is None and reason is not None:
            shown += self._flush()
            self.finish_reason = self.finish_reason or reason
        return self._event(shown)

    def _end(self, token: int, count: int) -> FinishReason | None:
        """Why it ends with its newest token, the `count`-th: the grammar lets nothing more come, or it is long enough."""
        if self.matcher is not None:
            self.matcher.accept(token)
            if self.matcher.is_over:
                return "stop"
        if count < self.request.max_new_tokens:
            return None
        if self.matcher is not None and not self.matcher.is_complete:
            self.notes.append(UNFINISHED)
            self._unsaid.append(UNFINISHED)
        return "length"

    def _before_stop(self) -> str:
        """What can be shown of the decoded text: all before a stop string, or before what may become one."""
        stops = self.request.stop
        found = [(place, stop) for stop in stops if (place := self._decoded.find(stop)) >= 0]
        if found:
            place, self._stopped_by = min(found)
            self.finish_reason = "stop"
            shown, self._decoded = self._decoded[:place], ""
            return shown
        held = max((_overlap(self._decoded, stop) for stop in stops), default=0)
        cut = len(self._decoded) - held
        shown, self._decoded = self._decoded[:cut], self._decoded[cut:]
        return shown

    def _flush(self) -> str:
        """The rest, at the end: half a character is U+FFFD."""
        self._decoded += self._text.push([], is_last=True)
        shown = self._before_stop() + self._decoded
        self._decoded = ""
        return shown

    def _event(self, text: str) -> Event | None:
        if not self.segments and self.request.echo:
            text = self._echoed + text
        if not text and self.segments and self.finish_reason is None:
            return None
        return self._shown(text)

    def _shown(self, text: str, error: BaseException | None = None) -> Event:
        hits, self._new_hits = self._new_hits, None
        notes, self._unsaid = self._unsaid, []
        if hits is not None or not self.segments:
            self.segments.append(TextSegment("", hits or []))
        self.segments[-1].text += text
        self.text += text
        tokens = self.tokens[self.prompt_length + self._shown_tokens :]
        logprobs = None if self.request.logprobs is None else self.logprobs[self._shown_logprobs :]
        self._shown_tokens, self._shown_logprobs = len(self.tokens) - self.prompt_length, len(self.logprobs)
        return Event(
            text=text,
            tokens=tokens,
            logprobs=logprobs,
            new_hits=hits,
            finish_reason=self.finish_reason,
            stopped_by=self._stopped_by,
            neighbor_tokens=self.read,
            cached_tokens=self.cached,
            notes=notes,
            error=error,
        )

    def end(self, reason: FinishReason | None, error: BaseException | None = None) -> Event:
        """Its last event, where it was not the sequence itself that ended."""
        self.finish_reason = reason
        return self._shown("", error)

    def generation(self) -> Generation:
        assert self.finish_reason is not None
        return Generation(
            text=self.text,
            tokens=self.produced,
            segments=self.segments,
            notes=self.notes,
            finish_reason=self.finish_reason,
            prompt_tokens=self.prompt_length - self.pad,
            logprobs=None if self.request.logprobs is None else self.logprobs,
        )


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def stacked(found: list[Found], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens [n, k, r] and lengths [n, k] of neighbors, of which some have fewer or shorter ones."""
    K = max(one.tokens_KR.shape[0] for one in found)
    R = max(one.tokens_KR.shape[1] for one in found)
    tokens = np.full((len(found), K, R), pad_id, np.int64)
    lengths = np.zeros((len(found), K), np.int64)
    for number, one in enumerate(found):
        k, r = one.tokens_KR.shape
        tokens[number, :k, :r], lengths[number, :k] = one.tokens_KR, one.lengths_K
    return torch.from_numpy(tokens).to(device), torch.from_numpy(lengths).to(device)
