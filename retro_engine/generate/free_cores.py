"""How many cores other processes leave to one that decodes, so that a step has no thread that waits for its core.

Reads /proc/stat (Linux; elsewhere, and on a GPU, nothing changes). A step is one parallel region of hundreds of pieces: where two threads
have one core and a half between them, it takes longer than one thread on a whole core does.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

STAT = Path("/proc/stat")
PERIOD_S, STALE_S = 0.1, 2.0  # a look costs 10 us; a mean over a longer time says little of now
# Cores: so much of one is taken before it is left, and so little before it is used again. A process that wants all of a core has half of
# it while a thread of ours is there.
TAKEN, FREE = 0.35, 0.15


class Look(NamedTuple):
    """Seconds so far: by the clock, that these cores did nothing which a process of ours would wait for, and that this process had."""

    when: float
    cores: frozenset[int]
    spare: float
    own: float


class FreeCores:
    """Asked before every step, from any thread."""

    def __init__(self, stat: Path = STAT):
        """`stat`: where the kernel writes what each core did."""
        self._stat, self._lock = stat, threading.Lock()
        self._last, self._were_free = self._read(), 0
        self._free = len(self._last.cores) if self._last is not None else 0

    def count(self, most: int) -> int:
        """Threads that have a core each: `most` at most, one at least."""
        self.look()
        return most if self._last is None else max(1, min(most, self._free))

    def look(self) -> None:
        """What is known is renewed where it is old; asked between steps too, so that it is known when they begin."""
        if self._last is not None and time.monotonic() - self._last.when >= PERIOD_S:
            with self._lock:
                self._update()

    @contextlib.contextmanager
    def threads(self) -> Iterator[None]:
        """In the block PyTorch has as many threads as there are free cores, and no more than it had before."""
        most = torch.get_num_threads()
        count = self.count(most)
        if count == most:
            yield
            return
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(most)  # other threads of this process start with what was set last

    def _update(self) -> None:
        last, now = self._last, self._read()
        self._last = now
        if now is None or last is None or now.cores != last.cores or now.when - last.when > STALE_S:
            return
        if (elapsed := now.when - last.when) < PERIOD_S / 2:  # another thread has just looked
            return
        taken = len(now.cores) - (now.spare - last.spare + now.own - last.own) / elapsed
        self._free, self._were_free = settled(len(now.cores) - taken, self._free, self._were_free)

    def _read(self) -> Look | None:
        """None where nothing can be known, or where a user wants a number of threads that stays."""
        if not hasattr(os, "sched_getaffinity") or os.environ.get("OMP_DYNAMIC", "").lower() in ("false", "0"):
            return None
        cores = frozenset(os.sched_getaffinity(0))
        try:
            lines = self._stat.read_text("ascii").splitlines()
            spare = sum(_spare(line.split()) for line in lines if line.startswith("cpu") and _core(line) in cores)
        except (OSError, ValueError, IndexError):
            return None
        return Look(time.monotonic(), cores, spare / os.sysconf("SC_CLK_TCK"), time.process_time())


def settled(free: float, before: int, were_free: int) -> tuple[int, int]:
    """Cores to use of those that were free in the last look, and how many might be used if the next look says so too.

    Fewer at once, more after two looks that agree, and none where what is taken lies between the two thresholds: no flapping.
    """
    fewer, more = int(free + TAKEN), int(free + FREE)
    if fewer < before:
        return max(1, fewer), 0
    if more > before and were_free > before:
        return min(more, were_free), 0
    return before, more


def _core(line: str) -> int:
    """-1: the line of all cores."""
    return int(line.split(maxsplit=1)[0].removeprefix("cpu") or -1)


def _spare(fields: list[str]) -> int:
    """Ticks that a core was idle, waited for a disk or was taken by a hypervisor, which fewer threads would not change; and what
    it did for processes of a lower priority, which give way, unless this is one of them.
    """
    nice, idle, waiting, stolen = (int(fields[number]) for number in (2, 4, 5, 8))
    return idle + waiting + stolen + (nice if os.getpriority(os.PRIO_PROCESS, 0) <= 0 else 0)
