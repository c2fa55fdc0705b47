"""One large text as many documents, so that its parts have neighbors among each other: cut at blank lines or at headings.

Headings are Markdown's (# Title) and WikiText's ( = Title = ); a text is cut at the highest level that it has twice or more.
At blank lines a document ends once it has LEAST bytes: a paragraph alone is often shorter than a chunk.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from retro_engine.data.inputs import TEXT_KINDS, kind_of, shown
from retro_engine.data.streams import STREAM_ERRORS, Unusable, open_text
from retro_engine.errors import MissingInputError, UsageError

SPLITS = ("auto", "blank-lines", "headings", "none")
LARGE = 1 << 16  # bytes of a single file that auto splits
LEAST = 2000  # bytes
LONGEST_LINE = 1 << 20  # bytes looked at together; what is longer is no heading and not blank
_MARKDOWN = re.compile(rb"(#{1,6})\s+(.*?)\s*#*\s*$")
_WIKITEXT = re.compile(rb" ((?:= )+)(.*?)((?: =)+) ?\s*$")
_FENCES = (b"```", b"~~~")


@dataclass(frozen=True)
class Piece:
    """`line`: its first one, from 1 on."""

    line: int
    title: bytes
    text: bytes


def settle(split: str, paths: Sequence[Path], kind: str, say: Callable[[str], None]) -> str:
    """How texts are split, which is said: as asked, or with auto where there is one large text alone. `kind`: of all files,
    "" = by their names. Raises UsageError where nothing can be split.
    """
    texts = [path for path in paths if (kind or kind_of(path)) in TEXT_KINDS]
    if split == "none":
        return split
    if split != "auto":
        if not texts:
            raise UsageError(f"--split {split} cannot be used", "no input is a text", "leave it out")
        return split
    if len(paths) != 1 or not texts or paths[0].stat().st_size < LARGE:
        return "none"
    chosen = "blank-lines" if heading_level(paths[0]) is None else "headings"
    how = "headings" if chosen == "headings" else f"blank lines, into documents of {LEAST:,} bytes and more"
    say(f"{shown(paths[0])} is one large text: split at {how} (--split none keeps it whole)")
    return chosen


def heading_level(path: Path) -> int | None:
    """The highest level of headings that a text has twice or more; None = there is none, or it cannot be read."""
    try:
        with open_text(path)[0] as file:
            levels = Counter(level for _, line, level in _lines(file) if level)
    except (Unusable, MissingInputError, *STREAM_ERRORS):
        return None  # reading it says why
    return min((level for level, count in levels.items() if count > 1), default=None)


def pieces(file: IO[bytes], level: int | None, most: int) -> Iterator[Piece]:
    """A text's parts: from heading to heading of a `level`, None = at blank lines. Of one that is longer than `most` bytes
    no more comes than shows it.
    """
    text, first, title, was_blank = bytearray(), 1, b"", False
    for number, line, found in _lines(file):
        is_cut = found == level if level is not None else was_blank and len(text) >= LEAST
        if is_cut and text.strip():
            yield Piece(first, title, bytes(text))
        if is_cut:
            text, first = bytearray(), number
            title = _heading(line)[1] if level is not None else b""
        was_blank = not line.strip()
        text += line[: max(0, most + 1 - len(text))]
    if text.strip():
        yield Piece(first, title, bytes(text))


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes, int]]:
    """(number, line, level of the heading that it is; 0 = none); a line that is very long comes in parts."""
    number, is_fenced, is_start = 1, False, True
    while line := file.readline(LONGEST_LINE):
        if is_start and line.lstrip().startswith(_FENCES):
            is_fenced = not is_fenced
        yield number, line, _heading(line)[0] if is_start and not is_fenced else 0
        is_start = line.endswith(b"\n")
        number += is_start


def _heading(line: bytes) -> tuple[int, bytes]:
    if (found := _MARKDOWN.match(line)) is not None:
        return len(found[1]), found[2]
    found = _WIKITEXT.match(line)
    if found is not None and len(found[1]) == len(found[3]) and found[2]:
        return len(found[1]) // 2, found[2]
    return 0, b""
