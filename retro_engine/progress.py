"""Progress of long work: a bar on a terminal, a line every 10 s elsewhere, JSON events, or nothing.

Also asks before work that a measured sample says will be long.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from retro_engine.errors import UsageError

LINE_EVERY_S = 10.0
ASK_ABOVE_S = 600.0


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def seconds_each(work: Callable[[int, int], object], count: int, sample: int) -> float:
    """Of one of `count` rows, from first to last - 1 of a sample in the middle; a few are done before, and may compile."""
    sample = min(sample, count)
    middle = (count - sample) // 2
    work(middle, middle + min(4, sample))
    start = time.monotonic()
    work(middle, middle + sample)
    return (time.monotonic() - start) / max(1, sample)


def note(text: str) -> None:
    """A line to standard error, for what is no part of a command's progress."""
    print(f"note: {text}", file=sys.stderr, flush=True)


@dataclass
class Reporter:
    """Where a command's words go: `mode` text, json or quiet; results go to standard output, the rest to stderr."""

    mode: str = "text"
    is_yes: bool = True  # never ask

    def say(self, line: str) -> None:
        if self.mode == "json":
            print(json.dumps({"event": "note", "text": line}), file=sys.stderr, flush=True)
        elif self.mode == "text":
            print(line, file=sys.stderr, flush=True)

    def confirm(self, estimate: str, seconds: float) -> None:
        """Say what the work will cost; on a terminal ask when it is long. Raises UsageError for a no."""
        self.say(estimate)
        if seconds > ASK_ABOVE_S and not self.is_yes and sys.stdin.isatty():
            print("Continue? [y/N] ", end="", file=sys.stderr, flush=True)
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                raise UsageError("stopped before the work began", "", "--yes does not ask")

    @contextmanager
    def progress(self, what: str, total: int, unit: str) -> Iterator["Meter"]:
        meter = Meter(what, total, unit, self.mode)
        try:
            yield meter
        finally:
            meter.close()


class Meter:
    """Counts units done; shows rate and time left."""

    def __init__(self, what: str, total: int, unit: str, mode: str):
        self.what, self.total, self.unit, self.mode = what, total, unit, mode
        self.done, self._start, self._last = 0, time.monotonic(), time.monotonic()
        self._is_terminal = mode == "text" and sys.stderr.isatty()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self._last >= (0.2 if self._is_terminal else LINE_EVERY_S):
            self._last = now
            self._show(now)

    def close(self) -> None:
        if self._is_terminal and self.done:
            self._show(time.monotonic())
            print(file=sys.stderr)

    def _show(self, now: float) -> None:
        rate = self.done / max(1e-9, now - self._start)
        left_s = (self.total - self.done) / max(1e-9, rate)
        if self.mode == "json":
            event = {
                "event": "progress",
                "what": self.what,
                "done": self.done,
                "total": self.total,
                "rate": rate,
                "left_s": left_s,
            }
            print(json.dumps(event), file=sys.stderr, flush=True)
        elif self._is_terminal:
            filled = int(24 * self.done / max(1, self.total))
            bar = "#" * filled + "." * (24 - filled)
            print(
                f"\r{self.what} [{bar}] {self.done:,}/{self.total:,} {self.unit}, {rate:,.0f}/s, {left_s:.0f} s left ",
                end="",
                file=sys.stderr,
            )
        elif self.mode == "text":
            print(
                f"{self.what}: {self.done:,} of {self.total:,} {self.unit}, {rate:,.0f}/s, {left_s:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
