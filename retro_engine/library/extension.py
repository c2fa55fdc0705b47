"""Two tables that a library's file gets when a document has metadata, or a folder is followed, for the first time.

`metadata` holds a document's fields by its key, `followed` what was read of each file of a folder (`following.py`). Until then
the file is as programs of before made it, and read by them.
"""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import apsw

from retro_engine.data.corpus import FieldValue
from retro_engine.errors import StoreError

# by the index alone: a table's own rows hold texts and tokens
BY_NAMESPACE = (
    "SELECT documents.key, id, fields, fields_crc FROM documents INDEXED BY sqlite_autoindex_documents_1 "
    "JOIN metadata ON metadata.key = documents.key WHERE namespace = ?"
)


def _crc(text: str) -> int:
    return zlib.crc32(text.encode())


def _read(path: Path, what: str, text: object, mark: object) -> dict[str, Any]:
    """An object that is kept as text. Raises StoreError where it is damaged."""
    if not isinstance(text, str) or _crc(text) != mark:
        raise StoreError(f"{path} is damaged", what, "restore it from a copy")
    return dict(json.loads(text))


def add_metadata(connection: apsw.Connection, key: int, fields: Mapping[str, FieldValue]) -> None:
    text = json.dumps(dict(fields), ensure_ascii=False)
    connection.execute("INSERT INTO metadata VALUES (?, ?, ?)", (key, text, _crc(text)))


def remove_metadata(connection: apsw.Connection, keys: Sequence[int]) -> None:
    connection.executemany("DELETE FROM metadata WHERE key = ?", [(key,) for key in keys])


def clear(connection: apsw.Connection, namespace: str) -> None:
    """Forget all of a namespace whose documents are still there."""
    named = "SELECT key FROM documents WHERE namespace = ?"
    connection.execute(f"DELETE FROM metadata WHERE key IN ({named})", (namespace,))
    connection.execute("DELETE FROM followed WHERE namespace = ?", (namespace,))


def metadata_of(connection: apsw.Connection, path: Path, key: int) -> dict[str, FieldValue]:
    """The fields of one document."""
    row: Any = connection.execute("SELECT fields, fields_crc FROM metadata WHERE key = ?", (key,)).fetchone()
    return {} if row is None else _read(path, f"the metadata of document {key}", *row)


def all_metadata(
    connection: apsw.Connection, path: Path, namespace: str
) -> Iterator[tuple[int, dict[str, FieldValue]]]:
    """Key and fields of the documents of a namespace that have any."""
    for key, _, text, mark in connection.execute(BY_NAMESPACE, (namespace,)):
        yield key, _read(path, f"the metadata of document {key}", text, mark)


def keep_state(connection: apsw.Connection, root: str, namespace: str, name: str, state: dict[str, Any] | None) -> None:
    """What was read of a file; None forgets it."""
    if state is None:
        there = (root, namespace, name)
        connection.execute("DELETE FROM followed WHERE root = ? AND namespace = ? AND name = ?", there)
        return
    text = json.dumps(state, ensure_ascii=False)
    values = (root, namespace, name, text, _crc(text))
    connection.execute("INSERT OR REPLACE INTO followed VALUES (?, ?, ?, ?, ?)", values)


def states(connection: apsw.Connection, path: Path, root: str, namespace: str) -> dict[str, dict[str, Any]]:
    """What was read of the files of a followed folder, by their names."""
    statement = "SELECT name, state, state_crc FROM followed WHERE root = ? AND namespace = ? ORDER BY name"
    rows: list[Any] = connection.execute(statement, (root, namespace)).fetchall()
    return {name: _read(path, f"what was read of {name}", text, mark) for name, text, mark in rows}


def roots(connection: apsw.Connection, namespace: str) -> list[str]:
    """The folders that are followed."""
    rows = connection.execute("SELECT DISTINCT root FROM followed WHERE namespace = ? ORDER BY root", (namespace,))
    return [str(root) for (root,) in rows]
