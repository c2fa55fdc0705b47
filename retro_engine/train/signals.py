"""How a run's process ends: SIGTERM and SIGINT ask for a checkpoint at the next step, a second one ends it at once; one of
several leaves without the interpreter's teardown.
"""

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn


class StoppedError(Exception):
    """A validation that a signal cut short."""


class Signals:
    """The first signal that came while the context was open, by number; `say` is told at once what it does."""

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        self._say = say
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
        self._say("stopping after this step, with a checkpoint; again: at once, without one")


def leave(code: int) -> NoReturn:
    """End this process, one of several, with `code` when all is said and written.

    The threads of gloo's groups live as long as anything refers to a group. One that drops a tensor while the interpreter
    is torn down asks for its lock, is ended in the middle of C++ and takes the process with it (SIGABRT): a run that has
    trained well would then count as failed. So what is registered for the end is done, and nothing is torn down.
    """
    atexit._run_exitfuncs()  # there is no public way; loggers (wandb) finish in them
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
