"""Generation for many at once: a bounded queue, one thread that computes, a stream of events for each request.

Sequences join and leave between steps (continuous batching). Each retrieves at its own chunk boundaries in a pool of
threads while the others go on. Prompts are taken in piece by piece between steps, from the prefix cache where it can.
"""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from retro_engine.errors import StoppedError, UsageError
from retro_engine.generate.decoding_batch import DecodingBatch
from retro_engine.generate.fair import BusyError, FairPool, FairQueue
from retro_engine.generate.generator import Generator
from retro_engine.generate.prefix import PrefixCache
from retro_engine.generate.request import Event, Generation, Request
from retro_engine.generate.sequence import DecodingSequence
from retro_engine.model.encodings import EncodingStats
from retro_engine.retrieval.hit import Found

__all__ = ["BusyError", "Engine", "Event", "Request", "Submission"]

T = TypeVar("T")
OnEvent = Callable[[Event], None]
RATE_S = 10.0  # tokens/s are of this last time


@dataclass
class Times:
    """When things happened to a request, by time.monotonic()."""

    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None  # it got a row
    first: float | None = None  # its first token came
    last: float | None = None


class Submission:
    """The events of one request; iterate over it, unless they go to an `on_event`."""

    def __init__(self, engine: "Engine", sequence: DecodingSequence, on_event: OnEvent | None):
        self._engine, self._on_event = engine, on_event
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._is_done = threading.Event()
        self._error: BaseException | None = None
        self.sequence = sequence
        self.is_cancelled = False
        self.found: Future[list[Found]] | None = None  # that it waits for
        self.times = Times()

    def __iter__(self) -> Iterator[Event]:
        """Blocks until the next event; raises what ended a request that failed."""
        while True:
            event = self._events.get()
            if event.error is not None:
                raise event.error
            yield event
            if event.finish_reason is not None:
                return

    def cancel(self) -> None:
        """End it before the next step, and free its row of the cache; no-op where it has ended."""
        self._engine.cancel(self)

    def result(self) -> Generation:
        """Wait for the end; raises what ended a request that failed."""
        self._is_done.wait()
        if self._error is not None:
            raise self._error
        return self.sequence.generation()

    @property
    def caller(self) -> str:
        return self.sequence.request.caller

    @property
    def is_done(self) -> bool:
        return self._is_done.is_set()

    def send(self, event: Event) -> None:
        """Pass an event on (the engine does)."""
        try:
            if self._on_event is None:
                self._events.put(event)
            else:
                self._on_event(event)
        finally:
            if event.finish_reason is not None:
                self._is_done.set()

    def fail(self, error: Exception) -> None:
        """End with an error (the engine does)."""
        self._error = error
        self._is_done.set()
        event = self.sequence.end(None, error)
        if self._on_event is None:
            self._events.put(event)
        else:
            with contextlib.suppress(Exception):  # it may be the one that failed
                self._on_event(event)


class Engine:
    """Close it, or use it as a context manager."""

    def __init__(
        self,
        generator: Generator,
        max_batch: int = 8,
        max_waiting: int = 64,
        retrieval_threads: int = 1,
        deterministic: bool = False,
        max_tokens: int | None = None,
        max_neighbors: int = 8,
        prefix_bytes: int = 256 << 20,
        shares_prefixes: bool = False,
    ):
        """`max_tokens`: of a sequence, prompt and answer (None: 2,048 or what the model was trained on, if more).

        `deterministic`: every request gets the same bits whatever is computed beside it; slower. Prompts that were
        taken in before are kept in at most `prefix_bytes`, each for its own caller unless `shares_prefixes`. Of each
        caller at most `max_waiting` wait.
        """
        for name, value in {"max_batch": max_batch, "max_waiting": max_waiting, "retrieval_threads": retrieval_threads, "max_neighbors": max_neighbors}.items():  # fmt: skip
            if value < 1:
                raise UsageError(f"{name}={value} cannot be used", "at least 1")
        config = generator.model.config
        self.generator, self.max_waiting = generator, max_waiting
        self.max_tokens = max(2048, config.encoder_seq_length) if max_tokens is None else max_tokens
        self.max_neighbors = max(max_neighbors, config.num_neighbors) * config.r
        self.prefixes = PrefixCache(prefix_bytes, shares_prefixes)
        self._batch = DecodingBatch(
            generator.model,
            pad_id=generator.tokenizer.pad_id,
            size=max_batch,
            capacity=self.max_tokens,
            neighbor_tokens=self.max_neighbors,
            deterministic=deterministic,
            prefixes=self.prefixes,
            encodings=generator.encodings,
            cores=generator.cores,
        )
        self._pool = FairPool(retrieval_threads, "retrieval")
        self._waiting: FairQueue[Submission] = FairQueue()
        self._streams: dict[DecodingSequence, Submission] = {}  # of those that have a row
        self.max_batch = max_batch
        self._most = max(1, max_batch - 1)  # rows of one caller
        self._counts: deque[float] = deque()  # when each token was made
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, request: Request, on_event: OnEvent | None = None) -> Submission:
        """Raises UsageError for a request that cannot be answered, BusyError when the queue is full.

        `on_event` is called from the engine's thread and must return at once.
        """
        return self.submit_all([request], [on_event])[0]

    def submit_all(self, requests: Sequence[Request], on_events: Sequence[OnEvent | None]) -> list[Submission]:
        """`submit` for the requests of one caller: all of them, or none. What they share is computed once."""
        sequences = self.generator.open_all(requests)
        for sequence in sequences:
            self._check(sequence)
        streams = [
            Submission(self, sequence, on_event) for sequence, on_event in zip(sequences, on_events, strict=True)
        ]
        with self._changed:
            if self._is_closed:
                raise StoppedError(1, "the engine is closed", "start it again")
            self._waiting.put(requests[0].caller, streams, self.max_waiting)
            for stream in streams:
                self._look_up(stream, stream.sequence.prompt_length)
            self._changed.notify()
        return streams

    def _check(self, sequence: DecodingSequence) -> None:
        if sequence.total > self.max_tokens:
            raise UsageError(
                f"{sequence.prompt_length} prompt and {sequence.request.max_new_tokens} new tokens",
                f"a sequence has at most {self.max_tokens}",
                "ask for fewer",
            )
        if sequence.neighbor_tokens > self.max_neighbors:
            raise UsageError(
                f"{sequence.neighbor_tokens} neighbor tokens", f"at most {self.max_neighbors} are read at a time"
            )

    def cancel(self, stream: Submission) -> None:
        with self._changed:
            stream.is_cancelled = True
            self._changed.notify()

    def close(self) -> None:
        """End the work; what is not done is cancelled."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        self._pool.close()

    def forget(self) -> None:
        """What it was asked so far was nobody's request: nothing of it is kept or counted. While nothing runs."""
        with self._changed:
            assert not self._streams and not len(self._waiting), "requests run"
            self.prefixes.forget()
            self._counts.clear()
        self.generator.forget()

    def stats(self) -> dict[str, Any]:
        """What it does now; tokens/s over the last ten seconds."""
        with self._changed:
            now = time.monotonic()
            num_tokens = sum(now - when <= RATE_S for when in self._counts)
            in_use = sum(sequence.filled for sequence in self._streams)
            return {
                "running": len(self._streams),
                "waiting": len(self._waiting),
                "tokens_per_s": num_tokens / RATE_S,
                "cache_bytes": in_use * self._batch.cache.bytes_per_token(),
                "prefix_bytes": self.prefixes.nbytes,
                "prefix_tokens_reused": self.prefixes.reused,
                "prefix_tokens_asked": self.prefixes.asked,
                **self._encodings(),
            }

    def _encodings(self) -> dict[str, int]:
        """Neighbors that were read from what is kept of them, those that were encoded, and the bytes that are kept."""
        kept = self.generator.encodings
        stats = EncodingStats() if kept is None else kept.stats
        return {"neighbors_kept": stats.hits, "neighbors_encoded": stats.misses, "neighbor_bytes": stats.nbytes}

    def _look_up(self, stream: Submission, stop: int) -> None:
        """Neighbors of the chunks up to token `stop`: at once where they are given, else in the pool."""
        sequence = stream.sequence
        if sequence.given is not None or not sequence.is_reading:
            stream.found = Future()
            stream.found.set_result(self.generator.find(sequence, stop))
        else:
            stream.found = self._pool.submit(stream.caller, self.generator.find, sequence, stop)
            stream.found.add_done_callback(self._wake)

    def _wake(self, _: object) -> None:
        with self._changed:
            self._changed.notify()

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(self._has_work)
                    if self._is_closed:
                        return
                    gone = [s for s in (*self._waiting, *self._streams.values()) if s.is_cancelled]
                    for stream in gone:
                        self._drop(stream)
                    joining = self._next()
                for stream in gone:
                    self._send(stream, stream.sequence.end("cancelled"))
                if joining is not None:
                    self._join(joining)
                if self._batch.joining is not None:
                    self._take_in(self._streams[self._batch.joining])
                self._step()
        finally:  # closed, or a bug: nobody waits for ever
            with self._changed:
                self._is_closed = True
                left = [*self._streams.values(), *self._waiting.clear()]
                self._streams.clear()
            for stream in left:
                self._send(stream, stream.sequence.end("cancelled"))

    def _has_work(self) -> bool:
        streams = (*self._waiting, *self._streams.values())
        is_ready = any(_is_found(self._streams[sequence]) for sequence in self._batch.decoding)
        can_join = self._has_row() and self._waiting.next(_is_found, self._most) is not None
        is_cancelled = any(stream.is_cancelled for stream in streams)
        return self._is_closed or is_ready or can_join or is_cancelled or self._batch.joining is not None

    def _has_row(self) -> bool:
        return self._batch.joining is None and len(self._batch.decoding) < self._batch.size

    def _next(self) -> Submission | None:
        """The oldest that waits and has its neighbors, of the caller whose turn it is, when there is a row for it.

        The last row is for another caller than the one who has all others.
        """
        if not self._has_row():
            return None
        stream = self._waiting.take(_is_found, self._most)
        if stream is not None:
            self._streams[stream.sequence] = stream
        return stream

    def _drop(self, stream: Submission) -> None:
        """Out of the queue, and out of the cache."""
        with self._changed:
            self._waiting.remove(stream.caller, stream)
            if stream.found is not None:
                stream.found.cancel()
            if self._streams.pop(stream.sequence, None) is not None:
                self._waiting.give_back(stream.caller)
                if self._batch.holds(stream.sequence):
                    self._batch.leave(stream.sequence)

    def _join(self, stream: Submission) -> None:
        found = self._result(stream)
        stream.times.started = time.monotonic()
        if found is not None:
            self._attempt([stream], lambda: self._batch.join(stream.sequence, found))

    def _take_in(self, stream: Submission) -> None:
        """A piece of the joining prompt, and with the last one the first token."""
        logits = self._attempt([stream], self._batch.take_in)
        if logits is not None:
            self._batch.settle()
            self._accept(stream, logits[None])

    def _step(self) -> None:
        ready = [s for s in self._batch.decoding if _is_found(self._streams[s])]
        found = {}
        for sequence in ready:
            if self._streams[sequence].found is not None:
                chunks = self._result(self._streams[sequence])
                if chunks is not None:
                    found[sequence] = chunks[0]
        streams = [self._streams[sequence] for sequence in self._batch.decoding]
        waits = frozenset(stream.sequence for stream in streams if stream.sequence not in ready)
        if len(streams) == len(waits):
            return
        logits = self._attempt(streams, lambda: self._batch.step(found, waits))
        if logits is not None:
            for stream, logits_TV in zip(streams, logits):
                if stream.sequence not in waits:
                    self._accept(stream, logits_TV)

    def _accept(self, stream: Submission, logits_TV: Tensor) -> None:
        """Choose the tokens that come, pass on what there is to show, and look up what the next step reads."""
        sequence, stream.found = stream.sequence, None
        events = self._attempt([stream], lambda: self._batch.accepted(sequence, logits_TV)) or []
        with self._changed:
            now = time.monotonic()
            stream.times.first, stream.times.last = stream.times.first or now, now
            self._counts.extend([now] * len(events))
            while self._counts and now - self._counts[0] > RATE_S:
                self._counts.popleft()
        if sequence.finish_reason is not None:
            self._drop(stream)
        elif sequence in self._streams and sequence.completes():
            self._look_up(stream, len(sequence.tokens))
        for event in events:
            if event is not None:
                self._send(stream, event)

    def _result(self, stream: Submission) -> list[Found] | None:
        """What was found for it; None where the search failed, which ends it."""
        assert stream.found is not None
        return self._attempt([stream], stream.found.result)

    def _send(self, stream: Submission, event: Event) -> None:
        if not stream.is_done:
            self._attempt([stream], lambda: stream.send(event))

    def _attempt(self, streams: list[Submission], work: Callable[[], T]) -> T | None:
        """`work` for some requests; what it raises ends these alone."""
        try:
            return work()
        except Exception as error:  # the last resort of a thread that works for many
            for stream in streams:
                self._drop(stream)
                if not stream.is_done:
                    stream.fail(error)
            return None


def _is_found(stream: Submission) -> bool:
    return stream.found is None or stream.found.done()
