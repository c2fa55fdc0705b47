"""Progress of long work: a bar on a terminal, a line every 10 s elsewhere, JSON events, or nothing.

Also asks before work that a measured sample says will be long.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from retro_engine.errors import UsageError

LINE_EVERY_S = 10.0
ASK_ABOVE_S = 600.0
BAR = 16  # characters
SLOW_S = 0.5  # what takes longer is shown as seconds each
CLEAR = "\r\x1b[K"  # the terminal's line
FIGURES = {  # of `Meter.figures`, as people read them
    "loss": "loss {:.3f}",
    "valid_bits_per_byte": "validation {:.3f} bits per byte",
    "tokens_per_s": "{:,.0f} tokens/s",
}


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
    _has_bar: bool = field(default=False, repr=False)  # on the terminal's line

    def say(self, line: str) -> None:
        if self.mode == "json":
            print(json.dumps({"event": "note", "text": line}), file=sys.stderr, flush=True)
        elif self.mode == "text":
            print(f"{CLEAR}{line}" if self._has_bar else line, file=sys.stderr, flush=True)

    def say_now(self, line: str) -> None:
        """`say` from a signal's handler, which may interrupt a print: past Python's buffers."""
        text = json.dumps({"event": "note", "text": line}) if self.mode == "json" else f"{CLEAR * self._has_bar}{line}"
        if self.mode != "quiet":
            with suppress(OSError, ValueError, AttributeError):  # no standard error
                os.write(sys.stderr.fileno(), f"{text}\n".encode())

    def confirm(self, estimate: str, seconds: float) -> None:
        """Say what the work will cost; on a terminal ask when it is long. Raises UsageError for a no."""
        self.say(estimate)
        if seconds > ASK_ABOVE_S and not self.is_yes and sys.stdin.isatty():
            print("Continue? [y/N] ", end="", file=sys.stderr, flush=True)
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                raise UsageError("stopped before the work began", "", "--yes does not ask")

    @contextmanager
    def progress(self, what: str, total: int, unit: str, done: int = 0) -> Iterator["Meter"]:
        """`done`: of an earlier run, which say nothing of this one's rate."""
        meter = Meter(what, total, unit, self.mode, done)
        self._has_bar = meter.is_terminal
        try:
            yield meter
        finally:
            meter.close()
            self._has_bar = False


class Meter:
    """Counts units done; shows rate, time left, and the `figures` of the moment."""

    def __init__(self, what: str, total: int, unit: str, mode: str, done: int = 0):
        self.what, self.total, self.unit, self.mode = what, total, unit, mode
        self.done, self._first = done, done
        self._start = self._last = time.monotonic()
        self.is_terminal = mode == "text" and sys.stderr.isatty()
        self.figures: Callable[[], Mapping[str, float]] = dict  # asked when they are shown

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self._last >= (0.2 if self.is_terminal else LINE_EVERY_S):
            self._last = now
            self._show(now)

    def close(self) -> None:
        if self.is_terminal and self.done > self._first:
            self._show(time.monotonic())
            print(file=sys.stderr)

    def _show(self, now: float) -> None:
        rate = (self.done - self._first) / max(1e-9, now - self._start)
        left_s, figures = (self.total - self.done) / max(1e-9, rate), self.figures()
        if self.mode == "json":
            counts = {"done": self.done, "total": self.total, "rate": rate, "left_s": left_s}
            event = {"event": "progress", "what": self.what, **counts, **figures}
            print(json.dumps(event), file=sys.stderr, flush=True)
            return
        known = [form.format(figures[name]) for name, form in FIGURES.items() if name in figures]
        rest = ", ".join([f"{duration(left_s)} left", *known, _pace(rate)])  # a narrow terminal cuts the end
        if self.is_terminal:
            filled = int(BAR * self.done / max(1, self.total))
            bar = "#" * filled + "." * (BAR - filled)
            line = f"{self.what} [{bar}] {self.done:,}/{self.total:,} {self.unit}, {rest}"
            print(f"{CLEAR}{line[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
        elif self.mode == "text":
            line = f"{self.what}: {self.done:,} of {self.total:,} {self.unit}, {rest}"
            print(line, file=sys.stderr, flush=True)


def _pace(rate: float) -> str:
    """Units a second; of slow ones seconds each."""
    if 0 < rate < 1 / SLOW_S:
        return f"{1 / rate:.1f} s each"
    return f"{rate:,.0f}/s"
