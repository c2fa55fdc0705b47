"""Folders that a server follows (`retro serve --follow`): what is added, changed and deleted in them is so in its library.

One thread looks again and again (library/following.py says how); a folder that cannot be read now, or has vanished, is said and
looked at again: what was read of it stays.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retro_engine.errors import MissingInputError, RetroError, UsageError
from retro_engine.library import following
from retro_engine.library.library import Library
from retro_engine.progress import note

EVERY_S = 2.0  # between two looks, and where one takes long:
SHARE = 20  # times what the last one took


class _Closed(Exception):
    """The server stops."""


@dataclass
class Followed:
    """A folder, and what came of the last look at it."""

    path: Path
    files: int = 0
    documents: int = 0
    set_aside: int = 0
    state: str = "reading"  # then followed, or failed
    why: str = ""  # it failed

    def about(self) -> dict[str, Any]:
        """For a client, who need not know where it lies."""
        found = {name: value for name, value in vars(self).items() if name != "path"}
        return {"folder": self.path.name, **found, "why": self.why.replace(str(self.path), self.path.name)}


def check_folders(folders: Sequence[str]) -> list[Path]:
    """Raises MissingInputError for a folder that is none, UsageError for one within another."""
    paths = [Path(folder).resolve() for folder in folders]
    for path in paths:
        if not path.is_dir():
            raise MissingInputError(f"--follow {path} is no folder", "a folder is followed", "make it first")
        if sum(other == path or other in path.parents for other in paths) > 1:
            raise UsageError(f"--follow {path} is named twice", "within another, or again", "name it once")
    return paths


class FollowedFolders:
    """Keeps an open library at what folders hold; close it before the library."""

    def __init__(self, library: Library, folders: Sequence[str], every_s: float = EVERY_S):
        """Raises as `check_folders`."""
        self.library, self.every_s = library, every_s
        self.folders = [Followed(path) for path in check_folders(folders)]
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follow", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """After the file that is being read; the next start goes on."""
        self._is_closed.set()
        self._thread.join()

    def _check(self) -> None:
        if self._is_closed.is_set():
            raise _Closed

    def _run(self) -> None:
        took_s = 0.0
        while not self._is_closed.is_set():
            start = time.monotonic()
            for one in self.folders:
                try:
                    self._look(one)
                except _Closed:
                    return
            took_s = time.monotonic() - start
            self._is_closed.wait(max(self.every_s, SHARE * took_s))

    def _look(self, one: Followed) -> None:
        try:
            done = following.sync(self.library, one.path, check=self._check)
        except RetroError as error:
            why = f"{error.what}: {error.why}" if error.why else error.what
            if why != one.why:
                note(f"{one.path} is not followed now: {why}")
            one.state, one.why = "failed", why
            return
        one.files, one.documents, one.set_aside = done.num_files, done.num_documents, done.num_aside
        one.state, one.why = "followed", ""
