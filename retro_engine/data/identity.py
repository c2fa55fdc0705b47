"""What makes a document the same one again: its own id, else the file that it is, else its content.

A row's id is its key `id` or BEIR's `_id`. What has none is known by what does not depend on the way it came in: a
file that is one document by its real path, whatever spelling named it, and a row by a hash of its title and text.
A path may hold what no id may, and macOS spells letters in parts: ids of files are NFC, the rest of it escaped.
"""

import hashlib
import math
import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retro_engine.data.inputs import shown

ID_KEYS = ("id", "_id")
LARGEST_FLOAT = 1 << 53  # from there on floats skip whole numbers
HASH_DIGITS = 24
MAX_ID_BYTES = 512  # of a document's id in a library
CONTROL = ("Cc", "Cs", "Zl", "Zp")  # control characters, half surrogates, line and paragraph separators
UNSEEN = ("Cf", "Cn", "Co")  # zero widths and what turns the direction of a line, unassigned, of private use
UNSEEN_LETTERS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")  # fillers that show nothing


def own_id(row: Mapping[str, Any]) -> str | None:
    """The id that a row brings along, None where it brings none. Raises ValueError for one that cannot be used.

    A float is the whole number that it was before a table with gaps made it one.
    """
    for key in ID_KEYS:
        value = row.get(key)
        if is_missing(value):
            continue
        if isinstance(value, str):
            if not value.strip():
                raise ValueError(f"{key!r} is empty (a row without the key gets an id)")
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{key!r} is {type(value).__name__}, not text or a number")
        if isinstance(value, float) and not abs(value) < LARGEST_FLOAT:
            raise ValueError(f"{key!r} is the float {value}, whose last digits are lost (write it as text)")
        return str(int(value)) if value == int(value) else repr(value)
    return None


def is_missing(value: Any) -> bool:
    """Whether a row lacks a value: tables have null or NaN there."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def content_id(title: str, text: str) -> str:
    """The id of what has no other: the same title and text are the same document."""
    raw = f"{title}\0{text}".encode("utf-8", "surrogatepass")
    return f"row-{hashlib.sha256(raw).hexdigest()[:HASH_DIGITS]}"


def file_id(path: Path, folder: Path) -> str:
    r"""The id of a file that is one document: its real path, from `folder` but where they have nothing in common.

    In NFC; \xNN and \uNNNN stand for what an id may not hold; of a path that is too long there is a hash.
    """
    real, start = os.path.realpath(path), os.path.realpath(folder)
    name = real if os.path.commonpath((real, start)) == os.sep else os.path.relpath(real, start)
    if not _is_another(composed(real), real):
        name = composed(name)
    escaped = "".join(_escaped(letter) for letter in shown(name))
    if escaped.startswith(" "):
        escaped = f"\\x20{escaped[1:]}"
    raw = escaped.encode()
    return escaped if len(raw) <= MAX_ID_BYTES else f"file-{hashlib.sha256(raw).hexdigest()[:HASH_DIGITS]}"


def composed(text: str) -> str:
    """In Unicode's form NFC: one spelling of what looks the same."""
    return unicodedata.normalize("NFC", text)


def is_unseen(letter: str) -> bool:
    """Whether nobody sees a character, or it shows the others in another order."""
    return unicodedata.category(letter) in UNSEEN or letter in UNSEEN_LETTERS


def _escaped(letter: str) -> str:
    is_hidden = unicodedata.category(letter) in CONTROL or is_unseen(letter)
    return letter.encode("unicode_escape").decode() if is_hidden else letter


def _is_another(path: str, real: str) -> bool:
    """Whether there is a second file that is spelled so; some file systems find the same one by both spellings."""
    try:
        return path != real and not os.path.samefile(path, real)
    except OSError:
        return False
