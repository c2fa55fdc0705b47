"""How the engine's events look to a client: OpenAI's completions and chat completions, whole or in pieces.

What is ours is in `retro`: in the first piece after each retrieval, or beside the choices.
"""

import json
import math
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from retro_engine.generate.engine import Times
from retro_engine.generate.request import Event, TokenLogprob
from retro_engine.retrieval.hit import Hit
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.service import Service
from retro_engine.serve.tools import Call, CallReader, Tool


def neighbors_json(hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """document, title, chunk (of the document; -1 = given), score, text, continuation, source (empty = given)."""
    return [{**vars(hit), "score": round(float(hit.score), 6)} for hit in hits]


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # made once: a token has a line of its own


def line(content: dict[str, Any], name: str | None = None) -> bytes:
    """A server-sent event."""
    text = _encode(content)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


class Answer(ABC):
    """How an answer looks; subclasses say what a choice is."""

    name = ""
    prefix = ""
    end = b"data: [DONE]\n\n"  # of a stream

    def __init__(self, service: Service, is_stream: bool):
        self.service = service
        self.head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "object": f"{self.name}.chunk" if is_stream and self.name == "chat.completion" else self.name,
            "created": int(time.time()),
            "model": service.name,
        }
        self.prompt_tokens = self.completion_tokens = self.neighbor_tokens = 0
        self.cached_tokens = 0  # of the prompts, that were remembered
        self.echoed: dict[int, int] = {}  # tokens of the prompt that a choice's first event begins with
        self.candidates = self.kept = 1  # sequences of each prompt, and the best of them that are shown
        self.has_logprobs = True  # that were asked for, and not made to choose by
        self.notes: list[str] = []  # of the server; those of sequences come with their events
        self.timed = False  # whether times are shown
        self.times: Times | None = None  # of the sequence that came last
        self.reasons: list[str] = []  # why sequences ended, in that order
        self._counted: set[int] = set()  # sequences that have begun
        self.events: list[tuple[int, Event]] = []

    @abstractmethod
    def choice(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]: ...

    @abstractmethod
    def delta(self, index: int, event: Event) -> dict[str, Any]:
        """A choice of a stream."""

    @abstractmethod
    def logprobs(self, entries: Sequence[TokenLogprob]) -> Any: ...

    def _count(self, index: int, event: Event) -> None:
        self.completion_tokens += len(event.tokens) - (0 if index in self._counted else self.echoed.get(index, 0))
        self._counted.add(index)
        if event.finish_reason is not None:
            self.reasons.append(event.finish_reason)
            self.neighbor_tokens += event.neighbor_tokens
            self.cached_tokens += event.cached_tokens if index % self.candidates == 0 else 0

    def add(self, index: int, event: Event) -> None:
        self._count(index, event)
        self.events.append((index, event))

    def piece(self, index: int, event: Event, with_usage: bool) -> dict[str, Any] | None:
        """An event of a stream; None when there is nothing to say yet."""
        self._count(index, event)
        if not (event.text or event.logprobs or event.new_hits is not None or event.finish_reason or event.notes):
            return None
        out: dict[str, Any] = {**self.head, "choices": [self.delta(index, event)]}
        notes, self.notes = [*self.notes, *event.notes], []
        if event.new_hits is not None or notes:
            out["retro"] = {**self._retro(), "neighbors": neighbors_json(event.new_hits or [])}
            if notes:
                out["retro"]["notes"] = notes
        if with_usage:
            out["usage"] = None
        return {**out, **self.timings()} if event.finish_reason is not None else out

    def lines(self, index: int, event: Event, with_usage: bool) -> bytes:
        """An event of a stream as it is sent."""
        piece = self.piece(index, event, with_usage)
        return b"" if piece is None else line(piece)

    def last_lines(self, with_usage: bool) -> bytes:
        """What follows the last event."""
        return line({**self.head, "choices": [], "usage": self.usage()}) if with_usage else b""

    def failed_lines(self, error: ApiError) -> bytes:
        """What ends a stream that cannot go on."""
        return line(error.body())

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "neighbor_tokens": self.neighbor_tokens,
        }

    def timings(self) -> dict[str, Any]:
        """In llama.cpp's form, where they were asked for: tokens and milliseconds of prompt and answer."""
        times = self.times
        if not self.timed or times is None or times.first is None or times.started is None:
            return {}
        prompt_ms, made_ms = 1e3 * (times.first - times.started), 1e3 * ((times.last or times.first) - times.first)
        prompt, made = self.prompt_tokens - self.cached_tokens, max(0, self.completion_tokens - self.candidates)
        found = {"cache_n": self.cached_tokens, "prompt_n": prompt, "prompt_ms": prompt_ms}
        found |= {"predicted_n": self.completion_tokens, "predicted_ms": made_ms}
        for name, tokens, ms in (("prompt", prompt, prompt_ms), ("predicted", made, made_ms)):
            found[f"{name}_per_token_ms"] = ms / max(1, tokens)
            found[f"{name}_per_second"] = 1e3 * tokens / ms if ms else 0.0
        return {"timings": found}

    def _retro(self) -> dict[str, Any]:
        return {"index_version": self.service.index_version}

    def whole(self, count: int) -> dict[str, Any]:
        """The answer of a request that does not stream: `retro.segments` splits each choice at its retrievals."""
        choices, notes = [], list[str]()
        places: dict[tuple[Any, ...], int] = {}  # of neighbors
        segments: list[dict[str, Any]] = []
        events: list[list[Event]] = [[] for _ in range(count)]
        for index, event in self.events:
            events[index].append(event)
        for index, mine in enumerate(self._best(events)):
            entries = [entry for event in mine for entry in event.logprobs or []]
            is_shown = self.has_logprobs and any(e.logprobs is not None for e in mine)
            logprobs = self.logprobs(entries) if is_shown else None
            text = "".join(event.text for event in mine)
            choices.append(self.choice(index, text, logprobs, mine[-1].finish_reason))
            for event in mine:
                notes += [note for note in event.notes if note not in notes]
                if event.new_hits is not None:
                    found = [tuple(one.items()) for one in neighbors_json(event.new_hits)]
                    numbers = [places.setdefault(one, len(places)) for one in found]
                    segments.append({"choice": index, "text": "", "neighbors": numbers})
                if event.text:
                    if not segments or segments[-1]["choice"] != index:
                        segments.append({"choice": index, "text": "", "neighbors": []})
                    segments[-1]["text"] += event.text
        neighbors = [dict(one) for one in places]
        retro = {**self._retro(), "neighbors": neighbors, "segments": segments, "notes": [*self.notes, *notes]}
        return {**self.head, "choices": choices, "usage": self.usage(), **self.timings(), "retro": retro}

    def _best(self, events: list[list[Event]]) -> list[list[Event]]:
        """Of each prompt's candidates those whose tokens are likeliest on the average, best first."""
        if self.kept == self.candidates:
            return events
        places = [range(first, first + self.candidates) for first in range(0, len(events), self.candidates)]
        means = [_mean_logprob(mine, self.echoed.get(index, 0)) for index, mine in enumerate(events)]
        best = [sorted(group, key=means.__getitem__, reverse=True)[: self.kept] for group in places]
        return [events[index] for group in best for index in group]


def _mean_logprob(events: list[Event], num_echoed: int) -> float:
    """Of the tokens that were generated; one that ended at once is the least likely."""
    entries = [entry for event in events for entry in event.logprobs or []][num_echoed:]
    return sum(entry.logprob or 0.0 for entry in entries) / len(entries) if entries else -math.inf


class CompletionAnswer(Answer):
    name, prefix = "text_completion", "cmpl"

    def choice(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def delta(self, index: int, event: Event) -> dict[str, Any]:
        logprobs = None if event.logprobs is None else self.logprobs(event.logprobs)
        return self.choice(index, event.text, logprobs, event.finish_reason)

    def logprobs(self, entries: Sequence[TokenLogprob]) -> Any:
        return {
            "tokens": [self._shown(entry.token, entry.text) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": [entry.offset for entry in entries],
        }

    def _shown(self, token: int, text: str) -> str:
        """Half a character as OpenAI writes it."""
        raw = self.service.token_bytes.of(token, text)
        return raw.decode() if _is_text(raw) else f"bytes:{_escaped(raw)}"

    def _top(self, entry: TokenLogprob) -> dict[str, float | None]:
        """The likeliest tokens, best first, and the one that was taken where it is none of them: each has its own name."""
        rows = [*entry.top]
        if rows and entry.token not in [token for token, _, _ in rows]:
            assert entry.logprob is not None
            rows.append((entry.token, entry.text, entry.logprob))
        named: dict[str, float | None] = {}
        for token, text, value in rows:
            name = self._shown(token, text)
            named[f"token_id:{token}" if name in named else name] = value
        return named


class ChatAnswer(Answer):
    name, prefix = "chat.completion", "chatcmpl"

    def __init__(self, service: Service, is_stream: bool, tools: Sequence[Tool] = ()):
        """`tools`: functions that the answer may call."""
        super().__init__(service, is_stream)
        self._tools = tools
        self._readers: dict[int, CallReader] = {}  # of the choices that have begun

    def choice(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        text, calls, reason = self.said(index, text, reason, is_last=True)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": [call.json() for call in calls]}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def delta(self, index: int, event: Event) -> dict[str, Any]:
        delta: dict[str, Any] = {} if index in self._readers else {"role": "assistant"}
        is_last = event.finish_reason is not None
        text, calls, reason = self.said(index, event.text, event.finish_reason, is_last)
        delta["content"] = text
        if calls:
            first = len(self._readers[index].calls) - len(calls)
            delta["tool_calls"] = [{"index": first + n, **call.json()} for n, call in enumerate(calls)]
        logprobs = None if event.logprobs is None else self.logprobs(event.logprobs)
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def said(self, index: int, text: str, reason: str | None, is_last: bool) -> tuple[str, list[Call], str | None]:
        """What came, as text and calls, and why it ended: with a call, where there was one."""
        reader = self._readers.setdefault(index, CallReader(self._tools))
        if not self._tools:
            return text, [], reason
        text, calls = reader.push(text, is_last)
        self.notes += [note for note in reader.notes if note not in self.notes]
        reader.notes = []
        return text, calls, "tool_calls" if reader.calls and reason == "stop" else reason

    def logprobs(self, entries: Sequence[TokenLogprob]) -> Any:
        def token(index: int, text: str, value: float | None) -> dict[str, Any]:
            raw = self.service.token_bytes.of(index, text)
            return {"token": raw.decode() if _is_text(raw) else _escaped(raw), "logprob": value, "bytes": list(raw)}

        return {
            "content": [
                {**token(e.token, e.text, e.logprob), "top_logprobs": [token(*one) for one in e.top]} for e in entries
            ],
            "refusal": None,
        }


class BlockAnswer(ChatAnswer):
    """A chat answer of blocks, one after the other: text that is being said, and calls."""

    def __init__(self, service: Service, is_stream: bool, tools: Sequence[Tool]):
        super().__init__(service, is_stream, tools)
        self._hits: list[dict[str, Any]] = []
        self._said: list[str] = []  # notes

    @abstractmethod
    def _push(self, text: str) -> bytes:
        """More of the text block."""

    @abstractmethod
    def _close_text(self) -> bytes:
        """The text block is whole, if one was begun."""

    @abstractmethod
    def _add_call(self, call: Call) -> bytes:
        """A whole block."""

    @abstractmethod
    def _note_end(self, reason: str | None, event: Event) -> None:
        """Why it ended: with a call `reason` says so, the event's own does not."""

    def _take(self, index: int, event: Event) -> bytes:
        """What comes of an event; of a whole answer nobody reads the lines."""
        self._hits += [hit for hit in neighbors_json(event.new_hits or []) if hit not in self._hits]
        self._said += event.notes
        is_last = event.finish_reason is not None
        text, calls, reason = self.said(index, event.text, event.finish_reason, is_last)
        out = self._push(text) if text else b""
        if calls or is_last:
            out += self._close_text()
        for call in calls:
            out += self._add_call(call)
        if is_last:
            self._note_end(reason, event)
        return out

    def _about(self) -> dict[str, Any]:
        return {**self._retro(), "neighbors": self._hits, "notes": [*self.notes, *self._said]}


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _escaped(raw: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in raw)
