"""Work off the event loop and beside the engine: each caller in turn, so many that wait, none for a client who left.

`brief` takes milliseconds: tokens, a search. `write` changes documents, one writer after the other, as the library
does. `long` takes seconds: explanations, many embeddings, many searches; its work asks between its parts whether it is
still wanted.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from starlette.types import Receive

from retro_engine.generate.fair import FairPool
from retro_engine.serve.api_error import ClientLeft

T = TypeVar("T")
Check = Callable[[], None]
BRIEF_THREADS = 2
MAX_BRIEF = 256  # of one caller that wait, where no more are said


class Work:
    """The threads of one server; close it."""

    def __init__(self, max_waiting: int = 64):
        """`max_waiting`: of each caller, of long work."""
        self._brief = FairPool(BRIEF_THREADS, "brief", max(MAX_BRIEF, max_waiting))
        self._write = FairPool(1, "write", max(MAX_BRIEF, max_waiting))
        self._long = FairPool(1, "long", max_waiting)
        self._is_closed = threading.Event()

    def stats(self) -> dict[str, int]:
        return {"waiting": self._brief.waiting + self._write.waiting + self._long.waiting}

    def submit(self, caller: str, work: Callable[..., T], *arguments: Any) -> "Future[T]":
        """Raises BusyError where too many of this caller wait."""
        return self._brief.submit(caller, work, *arguments)

    async def brief(self, caller: str, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.wrap_future(self.submit(caller, work, *arguments))

    async def write(self, caller: str, work: Callable[..., T], *arguments: Any) -> T:
        """Goes on when nobody waits any more: what was begun is written or not, as the library says."""
        return await asyncio.wrap_future(self._write.submit(caller, work, *arguments))

    async def long(self, caller: str, receive: Receive, work: Callable[..., T], *arguments: Any) -> T:
        """`work(*arguments, check)`: `check` raises once the client has left, or nobody waits any more."""
        is_over = threading.Event()

        def check() -> None:
            if is_over.is_set() or self._is_closed.is_set():
                raise ClientLeft

        future = asyncio.wrap_future(self._long.submit(caller, work, *arguments, check))
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait((future, gone), return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                raise ClientLeft
            return future.result()
        finally:
            is_over.set()
            gone.cancel()
            if future.cancel():  # what runs on ends at its next check, and nobody hears of it
                with contextlib.suppress(asyncio.CancelledError):
                    await future

    def close(self) -> None:
        """End what runs at its next check; what waits is cancelled."""
        self._is_closed.set()
        self._long.close()
        self._write.close()
        self._brief.close()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
