"""A fair share: turns, the places that a caller can hold, and the threads that work in that order."""

import threading
from concurrent.futures import CancelledError, Future
from concurrent.futures import wait as wait_for

import pytest

from retro_engine.generate.fair import BusyError, FairPool, FairQueue


def drained(queue: FairQueue[int]) -> list[int]:
    """In the order in which all would be taken, each given back at once."""
    out = []
    while (item := queue.take(lambda _: True, 9)) is not None:
        out.append(item)
        queue.give_back({1: "a", 2: "b", 3: "c"}[item // 10])
    return out


def test_callers_take_turns() -> None:
    queue: FairQueue[int] = FairQueue()
    queue.put("a", [10, 11, 12, 13], 99)
    queue.put("b", [20, 21], 99)
    queue.put("c", [30], 99)
    assert drained(queue) == [10, 20, 30, 11, 21, 12, 13]


def test_who_holds_least_is_next_and_who_holds_most_waits() -> None:
    queue: FairQueue[int] = FairQueue()
    queue.put("a", [10, 11, 12], 99)
    assert [queue.take(lambda _: True, 2) for _ in range(3)] == [10, 11, None]
    queue.put("b", [20, 21, 22], 99)
    assert [queue.take(lambda _: True, 2) for _ in range(3)] == [20, 21, None]
    queue.give_back("b")
    queue.give_back("b")
    queue.give_back("a")
    assert [queue.take(lambda _: True, 2) for _ in range(2)] == [22, 12]  # b holds none, a one


def test_only_what_is_ready_is_taken() -> None:
    queue: FairQueue[int] = FairQueue()
    queue.put("a", [10, 11], 99)
    assert queue.take(lambda item: item == 11, 9) == 11
    assert queue.take(lambda item: item == 11, 9) is None
    assert list(queue) == [10]
    assert queue.remove("a", 10)
    assert not queue.remove("a", 10)
    assert len(queue) == 0


def test_a_caller_fills_his_queue_and_nobody_elses() -> None:
    queue: FairQueue[int] = FairQueue()
    for name in "abc":
        for number in range(8):
            queue.put(name, [number], 8)
        with pytest.raises(BusyError, match="8 requests are waiting"):
            queue.put(name, [8], 8)
    for number in range(4):  # 24 wait, and there is room for 32
        queue.put("d", [number], 8)
    with pytest.raises(BusyError, match="4 requests are waiting"):
        queue.put("d", [4], 8)
    queue.put("e", [5, 6], 8)  # nobody who has nothing there is refused while there is room
    with pytest.raises(BusyError):
        queue.put("f", [7, 8, 9], 8)
    assert len(queue) == 30
    alone: FairQueue[int] = FairQueue()
    for number in range(8):
        alone.put("", [number], 8)  # a process of one's own
    with pytest.raises(BusyError):
        alone.put("", [8], 8)


def test_one_callers_work_leaves_a_thread_for_another() -> None:
    pool = FairPool(2, "test")
    gate = threading.Event()
    held = [pool.submit("a", gate.wait, 20) for _ in range(5)]
    assert pool.submit("b", lambda: 7).result(10) == 7
    assert not any(future.done() for future in held)
    held[-1].cancel()
    assert pool.waiting == 3
    gate.set()
    wait_for(held[:-1], 20)  # one that is cancelled while it waits is never told so
    assert [future.cancelled() for future in held] == [False] * 4 + [True]
    failed: Future[None] = pool.submit("a", int, "x")
    assert isinstance(failed.exception(10), ValueError)
    pool.close()


def test_what_waits_when_a_pool_closes_is_cancelled() -> None:
    pool = FairPool(1, "test", max_waiting=2)
    gate, begun = threading.Event(), threading.Event()
    running = pool.submit("a", lambda: (begun.set(), gate.wait(20)))
    assert begun.wait(10)
    waiting = [pool.submit("a", int) for _ in range(2)]
    with pytest.raises(BusyError):
        pool.submit("a", int)
    closing = threading.Thread(target=pool.close)
    closing.start()
    for future in waiting:
        with pytest.raises(CancelledError):
            future.result(10)
    gate.set()
    closing.join(10)
    assert running.done()
    assert not closing.is_alive()
