"""Time on a GPU without the host's part: events around many calls that wait in the queue behind a pause.

A call costs the host up to some hundred microseconds, more than the kernel that it starts. So the GPU is told to pause first;
meanwhile the host queues an event, the calls and another event, and what lies between the events is the GPU's time alone.
Where the first event was reached before the last call was queued, the pause was too short, and the sample is taken again
with a longer one. An alternative that waits for the GPU itself is timed with what that costs, as it would be in a model.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch

ROUNDS = 20
SAMPLE_S = 2e-3  # the least that a sample takes: an event's clock ticks in half microseconds
MOST_CALLS = 64  # in a sample; a queue holds about a thousand launches
LONGEST_PAUSE_S = 0.2
CYCLES_A_SECOND = 2e9  # of what pauses: no less than a GPU has


class Pace(Protocol):
    """What is asked of a GPU; a test has one that is made up."""

    def pause(self, seconds: float) -> None: ...

    def mark(self) -> Any: ...

    def is_reached(self, mark: Any) -> bool: ...

    def between(self, first: Any, last: Any) -> float: ...


class Clock:
    """A CUDA device's stream: pauses and marks that are queued."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def pause(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * CYCLES_A_SECOND))

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def is_reached(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def between(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        """Seconds, waiting for both."""
        last.synchronize()
        return first.elapsed_time(last) * 1e-3


def in_turns(works: dict[str, Callable[[], Any]], clock: Pace, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of a call of each, `rounds` times, the alternatives one after the other in every round."""
    calls, pauses = {}, {}
    for name, work in works.items():
        work()  # compiles
        once = clock.between(*_marks(work, 2, clock, 0)) / 2
        calls[name] = max(1, min(MOST_CALLS, int(SAMPLE_S / max(once, 1e-9)) + 1))
        pauses[name] = 1e-3
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            pauses[name], seconds = _sample(work, calls[name], pauses[name], clock)
            times[name].append(seconds)
    return times


def _sample(work: Callable[[], Any], calls: int, pause: float, clock: Pace) -> tuple[float, float]:
    """The pause that was long enough (or the longest), and seconds a call."""
    while True:
        first, last, was_late = _queue(work, calls, clock, pause)
        seconds = clock.between(first, last) / calls
        if not was_late or pause >= LONGEST_PAUSE_S:
            return pause, seconds
        pause = min(LONGEST_PAUSE_S, 3 * pause)


def _queue(work: Callable[[], Any], calls: int, clock: Pace, pause: float) -> tuple[Any, Any, bool]:
    if pause:
        clock.pause(pause)
    first = clock.mark()
    for _ in range(calls):
        work()
    was_late = clock.is_reached(first)
    return first, clock.mark(), was_late


def _marks(work: Callable[[], Any], calls: int, clock: Pace, pause: float) -> tuple[Any, Any]:
    first, last, _ = _queue(work, calls, clock, pause)
    return first, last
