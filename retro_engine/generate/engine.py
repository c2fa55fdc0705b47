"""Generation for many at once: a bounded queue, one thread that computes, a stream of events for each request."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from retro_engine.errors import RetroError
from retro_engine.generate.generator import Generator
from retro_engine.generate.request import Event, Generation, Request

OnEvent = Callable[[Event], None]


class BusyError(RetroError):
    """The queue is full."""

    exit_code = 5


class Stream:
    """The events of one request."""

    def __init__(self, request: Request, on_event: OnEvent | None):
        self.request = request
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._on_event = on_event
        self._is_cancelled = False
        self._is_done = threading.Event()
        self._generation: Generation | None = None
        self._error: BaseException | None = None

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
        self._is_cancelled = True

    def result(self) -> Generation:
        """Wait for the whole generation."""
        self._is_done.wait()
        if self._error is not None:
            raise self._error
        assert self._generation is not None
        return self._generation

    def _send(self, event: Event) -> None:
        if self._on_event is not None:
            self._on_event(event)
        else:
            self._events.put(event)


class Engine:
    def __init__(
        self,
        generator: Generator,
        max_batch: int = 8,
        max_waiting: int = 64,
        retrieval_threads: int = 1,
        deterministic: bool = False,
    ):
        self.generator = generator
        self._waiting: queue.Queue[Stream | None] = queue.Queue(max_waiting)
        self._running = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_event: OnEvent | None = None) -> Stream:
        """Raises UsageError for a request that cannot be answered, BusyError when the queue is full."""
        stream = Stream(request, on_event)
        try:
            self._waiting.put_nowait(stream)
        except queue.Full:
            raise BusyError("the queue is full", "", "try again in a moment") from None
        return stream

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join()

    def stats(self) -> dict[str, Any]:
        return {"running": self._running, "waiting": self._waiting.qsize(), "tokens_per_s": 0.0, "cache_bytes": 0}

    def _run(self) -> None:
        while (stream := self._waiting.get()) is not None:
            self._running = 1
            request = stream.request
            try:
                out = self.generator.generate(
                    str(request.prompt),
                    request.max_new_tokens,
                    request.sampling,
                    request.neighbors,
                    request.num_neighbors,
                    request.retrieved_length,
                    request.pad_prompt,
                )
                stream._generation = out
                stream._send(Event(out.text, out.tokens, None, out.neighbors, out.finish_reason, out.notes))
            except RetroError as error:
                stream._error = error
                stream._send(Event("", [], error=error))
            stream._is_done.set()
            self._running = 0
