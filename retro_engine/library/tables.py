"""The tables of a library's file, word for word: a file whose tables are others is not opened."""

import functools
from typing import Any

import apsw

SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE counter (version INTEGER NOT NULL) STRICT;
CREATE TABLE namespaces (name TEXT PRIMARY KEY, documents INTEGER NOT NULL, chunks INTEGER NOT NULL,
  tokens INTEGER NOT NULL, bytes INTEGER NOT NULL) STRICT;
CREATE TABLE documents (key INTEGER PRIMARY KEY AUTOINCREMENT, namespace TEXT NOT NULL, id TEXT NOT NULL,
  title TEXT NOT NULL, chunks INTEGER NOT NULL, num_tokens INTEGER NOT NULL, bytes INTEGER NOT NULL,
  tokens_crc INTEGER NOT NULL, vectors_crc INTEGER NOT NULL, text_crc INTEGER NOT NULL,
  tokens BLOB NOT NULL, vectors BLOB, text TEXT NOT NULL, UNIQUE (namespace, id)) STRICT;
CREATE TABLE segments (name TEXT PRIMARY KEY, namespace TEXT NOT NULL, first_key INTEGER NOT NULL,
  last_key INTEGER NOT NULL, fingerprint TEXT NOT NULL) STRICT;
CREATE TABLE jobs (number INTEGER PRIMARY KEY AUTOINCREMENT, path TEXT NOT NULL, size INTEGER NOT NULL,
  modified INTEGER NOT NULL, namespace TEXT NOT NULL, state TEXT NOT NULL, done INTEGER NOT NULL,
  added INTEGER NOT NULL, failed INTEGER NOT NULL, reason TEXT NOT NULL) STRICT;
CREATE TABLE job_errors (job INTEGER NOT NULL, source TEXT NOT NULL, reason TEXT NOT NULL) STRICT;
CREATE INDEX job_errors_job ON job_errors (job);
"""


EXTENSION = """
CREATE TABLE metadata (key INTEGER PRIMARY KEY, fields TEXT NOT NULL, fields_crc INTEGER NOT NULL) STRICT;
CREATE TABLE followed (root TEXT NOT NULL, namespace TEXT NOT NULL, name TEXT NOT NULL, state TEXT NOT NULL,
  state_crc INTEGER NOT NULL, PRIMARY KEY (root, namespace, name)) STRICT;
"""
INSERT = """
INSERT INTO documents (namespace, id, title, chunks, num_tokens, bytes, tokens_crc, vectors_crc, text_crc, tokens, vectors, text)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""


def found(connection: apsw.Connection) -> set[tuple[str, str, str]]:
    """What a file consists of, but for SQLite's own tables and the indexes that these statements imply."""
    own = "(sql IS NULL AND type = 'index') OR (type = 'table' AND name IN ('sqlite_sequence', 'sqlite_stat1', 'sqlite_stat4'))"
    rows: list[Any] = connection.execute(f"SELECT type, name, sql FROM sqlite_schema WHERE NOT ({own})").fetchall()
    return set(rows)


@functools.cache
def expected(is_extended: bool) -> set[tuple[str, str, str]]:
    connection = apsw.Connection(":memory:")
    connection.execute(SCHEMA + EXTENSION if is_extended else SCHEMA)
    return found(connection)
