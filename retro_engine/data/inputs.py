r"""Which files are read: kinds by suffix, folders walked, and all that is passed over, each with its reason.

Every command that reads files finds them here. A name is bytes to the system and text to people: `shown` writes what
is not UTF-8, and control characters, as \xNN, so that a name can stand in ids, manifests and messages.
"""

import difflib
import errno
import glob
import io
import os
import stat
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from retro_engine.data import files
from retro_engine.errors import REMEDIES, MissingInputError, UsageError, read_error

TEXT_KINDS = (".txt", ".text", ".raw", ".tokens", ".md", ".markdown")
PAGE_KINDS = (".html", ".htm", ".xhtml")
DOCUMENT_KINDS = (".pdf", ".docx")
ROW_KINDS = (".jsonl", ".ndjson", ".json", ".tsv", ".csv", ".parquet")
KINDS = (*TEXT_KINDS, *PAGE_KINDS, *DOCUMENT_KINDS, *ROW_KINDS)
FORMATS = {  # what any file can be read as, whatever its name
    "text": ".txt",
    "markdown": ".md",
    **{
        kind.removeprefix("."): kind
        for kind in (".html", *DOCUMENT_KINDS, ".jsonl", ".json", ".tsv", ".csv", ".parquet")
    },
}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
KNOWN = f"known: {' '.join(KINDS)}, and with {' '.join(COMPRESSIONS)} behind"
NAMED = "rename it, or say what it is: --format text (of prepare and docs add)"
MOST_NAMES = 10_000  # of a folder, looked through for what was meant
SAID = 20  # files named one by one where a list of all of them is kept
_SPECIAL = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


@dataclass(frozen=True)
class SetAside:
    """A row or a file that is not used, and why; `is_fault`: something is wrong with it; `is_unread`: the system let nobody
    read it, so that what it holds is not known.
    """

    source: str
    reason: str
    is_fault: bool = True
    is_unread: bool = False


def checked_inputs(inputs: Sequence[str | Path]) -> list[str]:
    """As they were typed. Raises UsageError where there are none."""
    if not inputs:
        raise UsageError("there are no documents", "", "name files or folders")
    return [str(one) for one in inputs]


def is_unread(error: BaseException | None) -> bool:
    """Whether the system is why something was not read: neither that nothing is there, nor a place before its start (EINVAL),
    which damaged files name.
    """
    while error is not None:
        if isinstance(error, OSError) and isinstance(error.errno, int):  # of our own it is a text
            return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EINVAL)
        error = error.__cause__
    return False


def shown(path: str | Path) -> str:
    r"""A path as text that can be encoded and printed on one line."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode() if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter
        for letter in text
    )


def kind_of(path: Path) -> str:
    """The suffix by which a file is read, in lower case and without the compression's; "" where none is known."""
    name = path.name.lower()
    packed = _packed(name)
    kind = os.path.splitext(name.removesuffix(packed))[1]
    return kind if kind in KINDS and not (packed and kind == ".parquet") else ""


def stem_of(path: Path) -> str:
    """A file's name without its suffix and the compression's."""
    packed = _packed(path.name.lower())
    return os.path.splitext(path.name[: len(path.name) - len(packed)])[0]


def _packed(name: str) -> str:
    return next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")


def check_file(path: Path) -> os.stat_result:
    """The state of a file. Raises MissingInputError where it is none, or one whose end may never come."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        why = _why(error, path)
        what = f"{shown(path)} does not exist" if why == "" else f"{shown(path)} cannot be read"
        raise MissingInputError(what, why or nearest_path(path), "name one that does") from error
    if not stat.S_ISREG(found.st_mode):
        what = _SPECIAL.get(stat.S_IFMT(found.st_mode), "no file")
        raise MissingInputError(f"{shown(path)} is {what}", "a file is expected", "copy it to a file first")
    if not os.access(path, os.R_OK):
        raise MissingInputError(f"{shown(path)} cannot be read", "permission denied", f"chmod +r {shown(path)}")
    return found


def nearest_path(path: Path) -> str:
    """`did you mean PATH?` for what is called most like it in its folder, or an empty string."""
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in islice(entries, MOST_NAMES)]
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)
    return f"did you mean {shown(path.with_name(close[0]))}?" if close else ""


def _why(error: OSError | ValueError, path: Path) -> str:
    if isinstance(error, FileNotFoundError):
        return "a link to nothing" if path.is_symlink() else ""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def open_file(path: Path) -> BinaryIO:
    """Open a regular file to read; a FIFO or a device that came in its place is not waited for.

    Raises MissingInputError (an OSError), StoreError for what came in its place.
    """
    check_file(path)
    try:
        return io.BufferedReader(files.open_file(path))
    except MissingInputError:
        raise
    except OSError as error:
        do = REMEDIES.get(error.errno or 0, "let it be read, or name another one")
        raise MissingInputError(f"{shown(path)} cannot be read", error.strerror or "", do) from error


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a file. Raises MissingInputError, or UsageError for one of more than `limit` bytes."""
    with open_file(path) as file:
        try:
            raw = file.read(limit + 1)
        except OSError as error:
            raise read_error(error, shown(path)) from error
    if len(raw) > limit:
        raise UsageError(f"{shown(path)} is larger than {limit:,} bytes", "no such file is")
    return raw


def standard_input() -> BinaryIO:
    """Standard input's bytes. Raises MissingInputError where it is closed, or a device whose end never comes."""
    if sys.stdin is None:
        raise MissingInputError("there is no standard input", "it is closed", "name a file")
    stream = sys.stdin.buffer
    try:
        found = os.fstat(stream.fileno())
    except OSError:  # a stream of Python's own
        return stream
    is_endless = stat.S_ISCHR(found.st_mode) and not stream.isatty()
    if is_endless and found.st_rdev != os.stat(os.devnull).st_rdev:
        raise MissingInputError("standard input is a device", "its end may never come", "name a file")
    return stream


def find_files(inputs: Sequence[str | Path], of_any_kind: bool = False) -> tuple[list[Path], list[SetAside]]:
    """The files that `inputs` name, folders walked in order of name, patterns (*, ?, **) matched, and what is passed over.
    `of_any_kind`: also those whose suffix says nothing, for the caller knows what they are.

    Links are followed; a file or folder that is reached a second time is passed over, so cycles end. Raises
    MissingInputError for a named path that cannot be read, UsageError for a named file of an unknown kind.
    """
    walk = _Walk(of_any_kind)
    for path in map(Path, inputs):
        if os.path.isdir(path):
            walk.add_folder(path)
            continue
        if glob.has_magic(str(path)) and not os.path.lexists(path):
            walk.add_matches(path)
            continue
        found = check_file(path)
        if not (of_any_kind or kind_of(path)):
            raise UsageError(f"{shown(path)} is of an unknown kind", KNOWN, NAMED)
        walk.add_file(path, found)
    return walk.files, walk.passed_over


def say_linked(paths: Sequence[Path], inputs: Sequence[str | Path], say: Callable[[str], None]) -> None:
    """How many of the files in named folders lie elsewhere: whoever copies or deletes the folder should know."""
    folders = {
        os.path.join(Path(given), ""): os.path.join(os.path.realpath(given), "")
        for given in inputs
        if os.path.isdir(given)
    }
    count = 0
    for path in paths:
        real = next((real for folder, real in folders.items() if str(path).startswith(folder)), None)
        count += real is not None and not os.path.realpath(path).startswith(real)
    if count:
        say(f"note: {count:,} of {len(paths):,} files lie elsewhere, behind links, which are followed")


def tell(passed_over: Sequence[SetAside], say: Callable[[str], None], listed_in: str | None = None) -> None:
    """Say what is passed over by name: all of it, or the first where the rest is listed in a file."""
    named = passed_over if listed_in is None else passed_over[:SAID]
    for row in named:
        say(f"passed over: {row.source}: {row.reason}")
    if listed_in is not None and passed_over:
        say(f"{len(passed_over):,} passed over, listed in {listed_in}")


class _Walk:
    """What has been found so far, and which files and folders were met."""

    def __init__(self, of_any_kind: bool) -> None:
        self.of_any_kind = of_any_kind
        self.files: list[Path] = []
        self.passed_over: list[SetAside] = []
        self._met: dict[tuple[int, int], str] = {}

    def add_file(self, path: Path, found: os.stat_result) -> None:
        if self._is_new(path, found, "file"):
            self.files.append(path)

    def add_matches(self, pattern: Path) -> None:
        matches = sorted(glob.glob(str(pattern), recursive=True))
        if not matches:
            raise MissingInputError(f"nothing matches {shown(pattern)}", "", "name a file, a folder or another pattern")
        for match in map(Path, matches):
            if (folder := self._add_entry(match)) is not None:
                self.add_folder(folder)

    def add_folder(self, top: Path) -> None:
        waiting = [top]  # no recursion: folders nest deeper than Python's stack
        while waiting:
            folder = waiting.pop()
            try:
                if not self._is_new(folder, folder.stat(), "folder"):
                    continue
                with os.scandir(folder) as entries:
                    names = sorted(entry.name for entry in entries)
            except OSError as error:
                self._pass_over(folder, f"the folder cannot be read: {error.strerror}")
                continue
            folders = [path for name in names if (path := self._add_entry(folder / name)) is not None]
            waiting += reversed(folders)

    def _add_entry(self, path: Path) -> Path | None:
        """Take a file or pass it over; a folder is returned."""
        if path.name.startswith("."):
            self._pass_over(path, "hidden: its name starts with a dot", is_fault=False)
            return None
        try:
            found = path.stat()
        except OSError as error:
            self._pass_over(path, _why(error, path) or "it has gone")
            return None
        if stat.S_ISDIR(found.st_mode):
            return path
        if not stat.S_ISREG(found.st_mode):
            self._pass_over(path, f"{_SPECIAL.get(stat.S_IFMT(found.st_mode), 'no file')}, not a file")
        elif not (self.of_any_kind or kind_of(path)):
            self._pass_over(path, "of an unknown kind", is_fault=False)
        elif not os.access(path, os.R_OK):
            self._pass_over(path, "it cannot be read: permission denied")
        else:
            self.add_file(path, found)
        return None

    def _is_new(self, path: Path, found: os.stat_result, what: str) -> bool:
        mark = (found.st_dev, found.st_ino)
        if mark in self._met:
            self._pass_over(path, f"the same {what} as {self._met[mark]}", is_fault=False)
            return False
        self._met[mark] = shown(path)
        return True

    def _pass_over(self, path: Path, reason: str, is_fault: bool = True) -> None:
        self.passed_over.append(SetAside(shown(path), reason, is_fault))
