"""How long threads that have nothing to do keep their cores: briefly where a model decodes.

PyTorch's threads (GNU's OpenMP) wait for the next piece of work by spinning 300,000 times, which is 4 to 20 milliseconds: longer than
a slice of the scheduler. Where another process takes a core, two of them share one, and who waits for the other keeps it from working.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

SPINS = "20000"  # a quarter to one millisecond: with a tenth of it prompts take 1.4 times as long. Training has many short pieces with more between them: it keeps the default
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def short_waits() -> dict[str, str]:
    """What a process that decodes has in its environment before it imports torch; nothing where a user said something else."""
    return {} if any(name in os.environ for name in VARIABLES) else {VARIABLES[0]: SPINS}


def wait_shortly() -> None:
    """For a command that decodes. No-op where torch is there already: it reads the environment once."""
    if "torch" not in sys.modules:
        os.environ.update(short_waits())


@contextlib.contextmanager
def started_to_wait_shortly() -> Iterator[None]:
    """Processes that are started in the block wait as a command that decodes does."""
    added = short_waits()
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
