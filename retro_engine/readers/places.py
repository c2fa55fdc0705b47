"""Where what can be made or fetched again is kept, and who may write there at a time.

RETRO_HOME, else XDG_CACHE_HOME/retro-engine, else ~/.cache/retro-engine: bases/ (readers/bases.py), opened/ (readers/kept.py) and
documents/ (readers/documents.py), which nobody but the user may read.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from retro_engine.data import files
from retro_engine.errors import InUseError, UnavailableError

VARIABLE = "RETRO_HOME"
WAIT_S = 600.0  # for another process
LOOK_EVERY_S = 0.1

Say = Callable[[str], None]


def nobody(line: str) -> None:
    """A `Say` that says nothing."""


def home() -> Path:
    named = os.environ.get(VARIABLE)
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(named).expanduser() if named else Path(cache) / "retro-engine"


def kept_type(dtype: str) -> str:
    """Of the weights that are kept for a reader that is opened in `dtype`."""
    return "bf16" if dtype == "bf16" else "fp32"


def make_private(folder: Path) -> None:
    """A folder that only its owner reads: what is kept there was read from the user's own files."""
    is_new = not folder.is_dir()
    files.make_folder(folder)
    if is_new:
        os.chmod(folder, 0o700)


@contextlib.contextmanager
def in_turn(folder: Path, say: Say = nobody, wait_s: float = WAIT_S) -> Iterator[None]:
    """Hold a folder's lock, after whoever has it now. Raises UnavailableError when that takes too long."""
    with contextlib.ExitStack() as stack:
        patiently(lambda: stack.enter_context(files.locked(folder)), folder, say, wait_s)
        yield


def patiently(take: Callable[[], object], folder: Path, say: Say = nobody, wait_s: float = WAIT_S) -> None:
    """Call `take` until no other process has the lock that it takes."""
    end, is_said = time.monotonic() + wait_s, False
    while True:
        try:
            take()
            return
        except InUseError as error:
            if time.monotonic() >= end:
                raise UnavailableError(error.what, error.why, "wait for it to end, or end it") from error
        if not is_said:
            say(f"{folder} is in use by another process: waiting")
            is_said = True
        time.sleep(LOOK_EVERY_S)
