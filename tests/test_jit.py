"""numba comes with the first call, and functions that call each other are compiled together."""

import subprocess
import sys

from retro_engine.jit import Compiled, numba


@numba.njit()
def twice(x):  # type: ignore[no-untyped-def]
    return 2 * x


@numba.njit()
def twice_and_one(x):  # type: ignore[no-untyped-def]
    """More than twice."""
    return twice(x) + 1


def test_functions_that_call_others() -> None:
    assert isinstance(twice_and_one, Compiled)
    assert (twice_and_one(3), twice(4)) == (7, 8)
    assert twice_and_one.__doc__ == "More than twice."


def test_searching_is_imported_without_it() -> None:
    code = "import sys, retro_engine.retrieval.search, retro_engine.library.live; print('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
