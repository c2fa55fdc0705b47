"""SIGTERM and SIGINT ask a run for a checkpoint at its next step; a second one ends the process at once."""

import contextlib
import os
import signal
from types import FrameType
from typing import Any


class StoppedError(Exception):
    """A validation that a signal cut short."""


class Signals:
    """The first signal that came while the context was open, by number."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        with contextlib.suppress(ValueError):  # not the main thread: the caller keeps its handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
