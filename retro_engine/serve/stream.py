"""From the engine's thread to a client: events in one queue, server-sent events, an end when the client leaves."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from retro_engine.errors import RetroError
from retro_engine.generate.engine import Submission, Times
from retro_engine.generate.request import Event, Request
from retro_engine.retrieval.hit import Hit
from retro_engine.serve.answers import Answer
from retro_engine.serve.api_error import ApiError, ClientLeft
from retro_engine.serve.metrics import Metrics
from retro_engine.serve.request_log import log_failure
from retro_engine.serve.service import Service


class RunningRequests:
    """The requests of one answer. Leaving its `async with` cancels what still runs."""

    def __init__(self, receive: Receive, metrics: Metrics):
        self._receive, self._metrics = receive, metrics
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self._streams: list[Submission] = []
        self._left = 0
        self._gone: asyncio.Task[None] | None = None
        self.found: list[list[Hit] | None] = []  # of each request, what stands in its prompt

    @classmethod
    async def start(
        cls, service: Service, requests: Sequence[Request], receive: Receive, metrics: Metrics
    ) -> "RunningRequests":
        """Submit all of them, or none, in the share of their caller. Raises what the engine raises."""
        running = cls(receive, metrics)
        arrivals = [running._arrival(index) for index in range(len(requests))]
        submitted = service.work.submit(requests[0].caller, service.engine.submit_all, requests, arrivals)
        try:
            running._streams = await asyncio.wrap_future(submitted)
        except asyncio.CancelledError:  # nobody waits, and the thread may be at it
            submitted.add_done_callback(_cancel_all)
            raise
        running._left = len(requests)
        return running

    def _arrival(self, index: int) -> Any:
        before: float | None = None

        def arrived(event: Event) -> None:
            nonlocal before
            now = time.monotonic()
            if before is not None and event.tokens:
                self._metrics.between(now - before)
            before = now
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

        return arrived

    def times(self, index: int) -> Times:
        return self._streams[index].times

    def cancel(self) -> None:
        for stream in self._streams:
            stream.cancel()

    async def __aenter__(self) -> "RunningRequests":
        self._gone = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()
        if self._gone is not None:
            self._gone.cancel()

    async def _watch(self) -> None:
        """Ends the iteration when the client is gone."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait(None)

    def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        return self

    async def __anext__(self) -> tuple[int, Event]:
        if not self._left:
            raise StopAsyncIteration
        return self._taken(await self._queue.get())

    def at_hand(self) -> tuple[int, Event] | None:
        """An event that has come already, or None."""
        if not self._left or self._queue.empty():
            return None
        return self._taken(self._queue.get_nowait())

    def _taken(self, item: tuple[int, Event] | None) -> tuple[int, Event]:
        """Raises ClientLeft, or what ended a request that failed."""
        if item is None:
            raise ClientLeft
        error = item[1].error
        if isinstance(error, RetroError):
            raise error
        if error is not None:
            log_failure("it failed in the engine", error)
            raise ApiError(500, "this is a bug in retro-engine; the server's log has its trace") from error
        if item[1].finish_reason == "cancelled":
            raise ApiError(503, "the server is stopping", headers={"retry-after": "5"})
        if item[1].finish_reason is not None:
            self._left -= 1
            self._metrics.ended(self._streams[item[0]].times, item[1].finish_reason)
        if self.found and (hits := self.found[item[0]]) is not None:  # its first event
            self.found[item[0]] = None
            return item[0], replace(item[1], new_hits=hits)
        return item


def _cancel_all(submitted: "Future[list[Submission]]") -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        for stream in submitted.result():
            stream.cancel()


class EventStream(Response):
    """Server-sent events. The status waits for the first event: a request that fails at once is no 200."""

    def __init__(
        self,
        running: RunningRequests,
        answer: Answer,
        with_usage: bool,
        count: Callable[[int, int], None],
        around: contextlib.AbstractContextManager[None],
    ):
        """`count` is told at the end how many tokens of prompts and answers there were; the stream is made within `around`."""
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self.headers["x-accel-buffering"] = "no"
        self.running, self.answer, self.with_usage, self.count = running, answer, with_usage, count
        self.around = around

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.running:
            with contextlib.suppress(ClientLeft), self.around:
                await self._send_all(send)
        self.count(self.answer.prompt_tokens, self.answer.completion_tokens)

    async def _send_all(self, send: Send) -> None:
        item = await anext(self.running, None)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            while item is not None:
                parts = []
                while item is not None:  # what came while the last ones were sent goes out together
                    self.answer.times = self.running.times(item[0])
                    parts.append(self.answer.lines(*item, self.with_usage))
                    item = self.running.at_hand()
                if any(parts):
                    await send(_body(b"".join(parts)))
                item = await anext(self.running, None)
            await send(_body(self.answer.last_lines(self.with_usage)))
        except RetroError as error:
            await send(_body(self.answer.failed_lines(ApiError(500, f"{error.what} {error.why}".strip()))))
        except ApiError as error:
            await send(_body(self.answer.failed_lines(error)))
        await send({"type": "http.response.body", "body": self.answer.end, "more_body": False})


def _body(raw: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": raw, "more_body": True}
