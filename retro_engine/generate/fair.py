"""A fair share of what is scarce: callers take turns, and none can fill another's queue or hold every place alone.

A caller is a name; "" is whoever has this process to himself, and is not held back. `FairQueue` is the order of the
engine's queue, `FairPool` runs functions in it.
"""

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from retro_engine.errors import RetroError, UnavailableError

T = TypeVar("T")
R = TypeVar("R")


CALLERS = 4  # full queues there is room for


class BusyError(RetroError):
    """The queue is full: ask again later."""

    exit_code = 5


class FairQueue(Generic[T]):
    """What waits and what has been taken, by caller. Its owner locks it."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()  # the caller whose turn is next first
        self.taken: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[T]:
        return (item for items in self._waiting.values() for item in items)

    def put(self, caller: str, items: list[T], limit: int) -> None:
        """All of them or none. Raises BusyError for more than `limit` of a caller that wait. Where many press, all of them
        together have room for `CALLERS` times that, and who has some already leaves as much free as he takes.
        """
        mine = len(self._waiting.get(caller, ())) + len(items)
        free = CALLERS * limit - len(self) - len(items)
        if mine > limit or free < 0 or (mine > len(items) and mine > free):
            raise BusyError(f"{mine - len(items)} requests are waiting", "", "ask again in a moment")
        self._waiting.setdefault(caller, deque()).extend(items)

    def next(self, is_ready: Callable[[T], bool], most: int) -> tuple[str, T] | None:
        """The oldest that is ready, of the caller who holds least, then of the one whose turn it is; who holds `most`
        waits.
        """
        ready = [
            (caller, item)
            for caller, items in self._waiting.items()
            if (not caller or self.taken[caller] < most) and (item := next(filter(is_ready, items), None)) is not None
        ]
        return min(ready, key=lambda one: self.taken[one[0]], default=None)  # the first of those who hold least

    def take(self, is_ready: Callable[[T], bool], most: int) -> T | None:
        """`next`, which leaves the queue; its caller is last in turn."""
        found = self.next(is_ready, most)
        if found is None:
            return None
        caller, item = found
        self.remove(caller, item)
        self.taken[caller] += 1
        if caller in self._waiting:
            self._waiting.move_to_end(caller)
        return item

    def remove(self, caller: str, item: T) -> bool:
        """Out of the queue; False where it does not wait."""
        items = self._waiting.get(caller, deque())
        if item not in items:
            return False
        items.remove(item)
        if not items:
            del self._waiting[caller]
        return True

    def give_back(self, caller: str) -> None:
        """What was taken is done."""
        self.taken[caller] -= 1
        if self.taken[caller] <= 0:
            del self.taken[caller]

    def clear(self) -> list[T]:
        left = list(self)
        self._waiting.clear()
        return left


class FairPool:
    """Threads that run what callers submit, in turn. Close it."""

    def __init__(self, threads: int, name: str, max_waiting: int = 1 << 30):
        """A caller holds all threads but one, where there are two and more."""
        self.max_waiting, self._most = max_waiting, max(1, threads - 1)
        self._queue: FairQueue[_Job] = FairQueue()
        self._changed = threading.Condition()
        self._is_closed = False
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def submit(self, caller: str, work: Callable[..., R], *arguments: Any) -> "Future[R]":
        """Raises BusyError as `FairQueue.put` does, UnavailableError once it is closed. A future that is cancelled while it waits is never run."""
        job = _Job(caller, Future(), work, arguments)
        with self._changed:
            if self._is_closed:
                raise UnavailableError("the work has ended", "this process is stopping", "start it again")
            self._queue.put(caller, [job], self.max_waiting)
            self._changed.notify()
        job.future.add_done_callback(lambda future: self._forget(job) if future.cancelled() else None)
        return job.future

    def close(self) -> None:
        """Wait for what runs; what waits is cancelled."""
        with self._changed:
            self._is_closed = True
            left = self._queue.clear()
            self._changed.notify_all()
        for job in left:
            job.future.cancel()
        for thread in self._threads:
            thread.join()

    def _forget(self, job: "_Job") -> None:
        with self._changed:
            self._queue.remove(job.caller, job)

    def _run(self) -> None:
        job: _Job | None = None
        while True:
            with self._changed:
                if job is not None:
                    self._queue.give_back(job.caller)
                    self._changed.notify_all()
                while (job := self._queue.take(lambda _: True, self._most)) is None:
                    if self._is_closed:
                        return
                    self._changed.wait()
            job.run()


class _Job:
    def __init__(self, caller: str, future: "Future[Any]", work: Callable[..., Any], arguments: tuple[Any, ...]):
        self.caller, self.future, self.work, self.arguments = caller, future, work, arguments

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            answer = self.work(*self.arguments)
        except BaseException as error:  # whoever waits for the future is told, as executors do
            self.future.set_exception(error)
        else:
            self.future.set_result(answer)
