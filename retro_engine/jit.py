"""numba, imported when a compiled function is first called, with as many threads as OMP_NUM_THREADS says, which numba itself
does not read.

What reads no text takes neither its half second nor its 55 MB. The number of threads must be settled before: numba and torch
share one OpenMP runtime, and whoever starts numba's threads decides how many torch has from then on.
"""

import functools
import os
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

_compiling = threading.RLock()


class Compiled:
    """A function that numba compiles, with those that it calls, at its first call."""

    def __init__(self, function: FunctionType, options: dict[str, Any]):
        functools.update_wrapper(self, function)
        self._function, self._options = function, options
        self._compiled: Any = None

    def __call__(self, *args: Any) -> Any:
        return (self._compiled or self._compile())(*args)

    def _compile(self) -> Any:
        with _compiling:
            if self._compiled is None:
                named = {name: _real(value) for name, value in self._function.__globals__.items()
                         if name in self._function.__code__.co_names}  # fmt: skip
                given = self._function.__globals__ | named  # numba knows its own functions alone
                function = FunctionType(self._function.__code__, given, self._function.__name__)
                function.__module__, function.__qualname__ = self._function.__module__, self._function.__qualname__
                self._compiled = _load().njit(**self._options)(function)
        return self._compiled


class _Numba:
    """What our modules use of it."""

    @staticmethod
    def njit(**options: Any) -> Callable[[Any], Any]:
        return lambda function: Compiled(function, options)

    def __getattr__(self, name: str) -> Any:
        return getattr(_load(), name)


def _real(value: Any) -> Any:
    if isinstance(value, Compiled):
        return value._compiled or value._compile()
    return _load() if value is numba else value


def _load() -> Any:
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
    import numba as module

    return module


numba: Any = _Numba()
__all__ = ["numba"]
