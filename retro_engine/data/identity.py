"""What makes a document the same one again: its own id, else the file that it is, else its content.

A row's id is its key `id` or BEIR's `_id`. What has none is known by what does not depend on the way it came in: a
file that is one document by its real path, whatever spelling named it, and a row by a hash of its title and text.
"""

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ID_KEYS = ("id", "_id")
LARGEST_FLOAT = 1 << 53  # from there on floats skip whole numbers
HASH_DIGITS = 24


def own_id(row: Mapping[str, Any]) -> str | None:
    """The id that a row brings along, None where it brings none. Raises ValueError for one that cannot be used.

    A float is the whole number that it was before a table with gaps made it one.
    """
    for key in ID_KEYS:
        value = row.get(key)
        if value is None or (isinstance(value, float) and math.isnan(value)):
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


def content_id(title: str, text: str) -> str:
    """The id of what has no other: the same title and text are the same document."""
    raw = f"{title}\0{text}".encode("utf-8", "surrogatepass")
    return f"row-{hashlib.sha256(raw).hexdigest()[:HASH_DIGITS]}"


def file_id(path: Path, folder: Path) -> str:
    """The id of a file that is one document: its real path, from `folder` but where they have nothing in common."""
    real, start = os.path.realpath(path), os.path.realpath(folder)
    return real if os.path.commonpath((real, start)) == os.sep else os.path.relpath(real, start)
