"""The SQLite file that is the truth of a live library: LIBRARY/documents.sqlite (docs/library.md has the tables).

WAL with synchronous=FULL, so what was acknowledged survives a kill and a power cut; one writing connection, any
number of reading ones. The file may be anybody's: its schema has to be ours, word for word, before anything is asked of
it. A key counts up and is never used again: a replaced document gets a new one, so a segment of
the index, which knows keys, needs no record of what died since.
"""

import contextlib
import errno
import json
import os
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import apsw
import numpy as np

from retro_engine.data import files, manifests
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import REMEDIES, MissingInputError, OutOfResourceError, StoreError, UsageError, read_error
from retro_engine.library import extension, tables
from retro_engine.library.documents import Prepared, num_chunks
from retro_engine.retrieval.analyzer import Analyzer, from_json

FILE = "documents.sqlite"
APPLICATION_ID = 0x5245544C  # "RETL", SQLite's mark of whose file it is
IDENTITY = 1  # of ids by real path and content; a library without it has them by place (`library_identity`)
VERSION = 2  # 1 had no analyzer: it reads words as its first version did
EXTENDED = 3  # once a document has metadata, or a folder is followed: tables.EXTENSION
OLDEST_SQLITE = (3, 51, 3)  # older ones can corrupt a WAL file that two connections write to

LITTLE_PAGES = 256  # of 4 KiB
SIDE_FILES = ("-wal", "-shm", "-journal")  # of SQLite's, beside the file
SUPER_JOURNAL = bytes.fromhex("d9d505f920a163d7")  # ends a journal that names another file, which SQLite would remove


def checksum(namespace: str, identifier: str, title: str) -> int:
    """CRC-32 of what a document is called; those of its tokens and its text go on from there.

    SQLite itself does not see a flipped bit.
    """
    return zlib.crc32(f"{namespace}\0{identifier}\0{title}\0".encode())


# A file that contradicts itself, or what it says its schema is.
DAMAGED = (
    *(apsw.CorruptError, apsw.NotADBError, apsw.SQLError, apsw.FormatError, UnicodeDecodeError),
    *(apsw.ConstraintError, apsw.MismatchError, apsw.TooBigError, apsw.RangeError, OverflowError),
)


@contextlib.contextmanager
def typed_errors(path: Path) -> Iterator[None]:
    """SQLite's errors as ours: a disk that fails, a lock and a missing permission are no damage."""
    try:
        yield
    except apsw.FullError as error:
        raise OutOfResourceError(
            f"no space left for {path}", "nothing of the last write was kept", "free some space and run it again"
        ) from error
    except DAMAGED as error:
        if isinstance(error, apsw.CorruptError | apsw.NotADBError):
            _check_reads(path)
        raise StoreError(f"{path} is damaged", str(error), "restore it from a copy") from error
    except apsw.ConnectionClosedError as error:
        raise UsageError(f"{path} is closed", "", "open it again") from error
    except (apsw.BusyError, apsw.LockedError) as error:
        raise UsageError(f"{path} is in use", "another program has it locked", "wait for it to end") from error
    except (apsw.IOError, apsw.NoMemError) as error:
        name = apsw.mapping_extended_result_codes.get(getattr(error, "extendedresult", -1), "")
        remedy = REMEDIES[errno.ENOMEM if isinstance(error, apsw.NoMemError) else errno.EIO]
        raise OutOfResourceError(f"{path} cannot be read or written", f"{error} {name}".strip(), remedy) from error
    except (apsw.ReadOnlyError, apsw.CantOpenError, apsw.PermissionsError) as error:
        _check_opens(path)
        do = "let it and its folder be read and written"
        raise MissingInputError(f"{path} cannot be read or written", str(error), do) from error


def _check_reads(path: Path) -> None:
    """Raises OutOfResourceError where the disk, not the file, is what is damaged: SQLite calls both the same."""
    try:
        for name in (path.name, path.name + SIDE_FILES[0]):
            if files.kind_of(path.with_name(name)) == "a file":
                files.sha256_file(path.with_name(name))
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        try:
            is_whole = connection.execute("PRAGMA integrity_check(1)").fetchall() == [("ok",)]
        finally:
            connection.close()
    except OSError as error:
        raise read_error(error, path) from error
    except (apsw.Error, StoreError):
        return
    if is_whole:
        why = "once: everything in the file can be read now, and fits together"
        raise OutOfResourceError(f"{path} could not be read", why, REMEDIES[errno.EIO])


def _check_opens(path: Path) -> None:
    """Raises OutOfResourceError where it is not the file's fault that SQLite cannot open it, which SQLite does not say."""
    try:
        with files.open_file(path):
            pass
    except OSError as error:
        known = read_error(error, path)
        if isinstance(known, OutOfResourceError):
            raise known from error


def create(folder: Path, settings: dict[str, Any]) -> None:
    """Make an empty library. Raises UsageError where there is one."""
    path = folder / FILE
    settings = {**settings, "identity": IDENTITY}
    with files.locked(folder), typed_errors(path):
        _check_is_file(path)
        connection = _connect(path)
        try:
            if not _is_empty(connection):
                what = "a library" if connection.pragma("application_id") == APPLICATION_ID else f"another {FILE}"
                raise UsageError(f"{folder} holds {what}", "it is not made anew", "open it, or choose another folder")
            connection.execute("PRAGMA journal_mode = WAL")
            with whole(connection):  # a library is there whole or not at all
                connection.execute(tables.SCHEMA)
                connection.execute("INSERT INTO counter VALUES (0)")
                marked = {**settings, "fingerprint": files.fingerprint(settings)}
                rows = [(name, json.dumps(value)) for name, value in marked.items()]
                connection.executemany("INSERT INTO settings VALUES (?, ?)", rows)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {VERSION}")
        finally:
            connection.close()
        files.sync(folder)


@contextlib.contextmanager
def whole(connection: apsw.Connection, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
    """All of the block's changes, or none; of a reader, what it sees is of one time.

    apsw's own `with connection` says "cannot rollback" where a failed disk has ended the transaction already, and hides why.
    """
    connection.execute(begin)
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            with contextlib.suppress(apsw.Error):  # what was met before says more; it ends with its connection
                connection.execute("ROLLBACK")
        raise


def is_made(folder: Path) -> bool:
    """Whether there is a library, or something else in its place; not where making one was never finished."""
    path = folder / FILE
    if not files.kind_of(path):
        return False
    if not path.is_file():  # opening it says what it is
        return True
    with typed_errors(path):
        try:
            return _is_begun(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY))
        except (
            apsw.CantOpenError,
            apsw.ReadOnlyError,
        ):  # making it was cut off: SQLite has to undo the half of it first
            return _is_begun(_connect(path))


def _is_begun(connection: apsw.Connection) -> bool:
    try:
        return not _is_empty(connection)
    finally:
        connection.close()


def set_analyzer(folder: Path, analyzer: Analyzer) -> None:
    """Let a library that nobody has open read words in another way; its index is made again when it is opened."""
    with files.locked(folder):
        file = LibraryFile(folder)
        try:
            with file.transaction(is_write=False) as connection:
                settings = {**file.settings, "analyzer": analyzer.to_json()}
                marked = {**settings, "fingerprint": files.fingerprint(settings)}
                rows = [(name, json.dumps(value)) for name, value in marked.items()]
                connection.executemany("INSERT OR REPLACE INTO settings VALUES (?, ?)", rows)
                connection.execute(f"PRAGMA user_version = {EXTENDED if file.is_extended else VERSION}")
        finally:
            file.close()


def _connect(path: Path) -> apsw.Connection:
    _check_side_files(path)
    connection = apsw.Connection(str(path))
    connection.set_busy_timeout(10_000)
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _is_empty(connection: apsw.Connection) -> bool:
    """Whether nobody has made anything of the file yet."""
    is_marked = connection.pragma("application_id") or connection.pragma("user_version")
    return not is_marked and not connection.execute("SELECT 1 FROM sqlite_schema").fetchall()


def _connect_to_read(path: Path, is_still: bool) -> apsw.Connection:
    """`is_still`: nobody writes, and all that was written is in the file itself: SQLite then makes no file beside it."""
    options = "immutable=1" if is_still else "mode=ro"
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    connection = apsw.Connection(f"file:{quote(str(path.resolve()))}?{options}", flags=flags)
    connection.set_busy_timeout(10_000)
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection


def _check_is_file(path: Path) -> None:
    """Raises StoreError for a link: SQLite keeps its log beside what it points to, and writes there."""
    kind = files.kind_of(path)
    if kind not in ("", "a file"):
        raise StoreError(f"{path} is {kind}", "a library is in one folder", "put the file there, or link the folder")


def _check_side_files(path: Path) -> None:
    """Raises StoreError for what SQLite would wait for, follow or remove."""
    for end in SIDE_FILES:
        beside = path.with_name(path.name + end)
        kind = files.kind_of(beside)
        if kind not in ("", "a file"):
            raise StoreError(f"{beside} is {kind}", "SQLite keeps a file there", f"remove {beside}")
        if kind and end == "-journal":
            with files.open_file(beside) as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - len(SUPER_JOURNAL)))
                if file.read() == SUPER_JOURNAL:
                    raise StoreError(f"{beside} names another file", "a library is of one", f"remove {beside}")


class LibraryFile:
    """An open documents.sqlite: one writer, whose caller holds a lock, and a pool of readers."""

    def __init__(self, folder: Path, is_read_only: bool = False, tokenizer: Tokenizer | None = None):
        """`is_read_only`: nothing is written, also not beside the file; `writer` then only reads. `tokenizer`: one that is open,
        taken where it is the library's.

        Raises MissingInputError where there is no library, StoreError for one that is damaged, foreign or newer.
        """
        self.path, self.is_read_only = folder / FILE, is_read_only
        if tuple(int(part) for part in apsw.sqlite_lib_version().split(".")) < OLDEST_SQLITE:
            raise StoreError(f"SQLite {apsw.sqlite_lib_version()} can corrupt files", "", "pip install --upgrade apsw")
        if not self.path.is_file():
            raise MissingInputError(f"{folder} is not a library", f"it has no {FILE}", "retro docs add makes one")
        _check_is_file(self.path)
        self._is_still = False
        with typed_errors(self.path):
            self.writer = self._connect_to_read() if is_read_only else _connect(self.path)
            try:
                self._check(folder)
                if not is_read_only:
                    self.writer.execute(
                        "PRAGMA journal_mode = WAL"
                    )  # stays in the file: not before it is known as ours
                found: list[Any] = self.writer.execute("SELECT name, value FROM settings").fetchall()
            except (apsw.Error, StoreError, MissingInputError):
                self.writer.close()
                raise
        try:
            self.settings: dict[str, Any] = {name: json.loads(value) for name, value in found}
            manifests.SETTINGS(self.settings, "settings")
            self.chunk_size: int = self.settings["chunk_size"]
            self.stride: int = self.settings["stride"]
            if tokenizer is None or tokenizer.json != self.settings["tokenizer"]:
                tokenizer = Tokenizer(self.settings["tokenizer"], str(self.path))
            self.tokenizer = tokenizer
            self.fingerprint: str = self.settings.pop("fingerprint")  # what a segment of the index was made with
        except (ValueError, TypeError, RecursionError) as error:
            self.writer.close()
            raise StoreError(f"{self.path} is damaged", f"its settings: {error}", "restore it from a copy") from error
        is_whole = files.fingerprint(self.settings) == self.fingerprint and self.stride <= self.chunk_size
        if not is_whole or (self.settings["embedder"] is None) != (self.settings["width"] is None):
            self.writer.close()
            raise StoreError(f"{self.path} is damaged", "the checksum of its settings", "restore it from a copy")
        self.analyzer = from_json(self.settings.get("analyzer"), str(self.path))
        self._readers: deque[apsw.Connection] = deque()

    def _check(self, folder: Path) -> None:
        mark, version = self.writer.pragma("application_id"), self.writer.pragma("user_version")
        if _is_empty(self.writer):
            raise MissingInputError(f"{folder} is not a library", "making it was never finished", "make it again")
        if mark != APPLICATION_ID:
            raise StoreError(f"{self.path} is not a library of retro-engine", f"its application id is {mark:#x}")
        if version not in (1, VERSION, EXTENDED):
            raise StoreError(
                f"{self.path} has version {version}", f"this program reads 1 to {EXTENDED}", "update retro-engine"
            )
        self.is_extended = version == EXTENDED
        if tables.found(self.writer) != tables.expected(self.is_extended):
            raise StoreError(f"{self.path} is not as this program makes it", "its tables are others", "make it again")

    def _connect_to_read(self) -> apsw.Connection:
        """The first connection of a library that is only read."""
        _check_side_files(self.path)
        wal = self.path.with_name(self.path.name + "-wal")
        self._is_still = not (wal.exists() and wal.stat().st_size)  # else it was killed: SQLite has to look there
        try:
            connection = _connect_to_read(self.path, self._is_still)
            connection.execute("SELECT 1 FROM sqlite_schema").fetchall()
        except (apsw.CantOpenError, apsw.ReadOnlyError) as error:
            raise MissingInputError(
                f"{self.path} cannot be read where it is",
                "its last writer was killed, and SQLite cannot write beside it what its log holds",
                "copy the folder to where files can be written",
            ) from error
        return connection

    def close(self) -> None:
        self.close_readers()
        self.writer.close()

    def close_readers(self) -> None:
        while self._readers:
            self._readers.pop().close()

    @contextlib.contextmanager
    def reader(self) -> Iterator[apsw.Connection]:
        """A connection for reading that no other thread has."""
        with typed_errors(self.path):
            try:
                connection = self._readers.pop()
            except IndexError:
                connection = _connect_to_read(self.path, self._is_still)
            try:
                yield connection
            finally:
                self._readers.append(connection)

    @contextlib.contextmanager
    def transaction(self, is_write: bool = True) -> Iterator[apsw.Connection]:
        """All of the block's changes on the disk when it ends, or none. `is_write` counts the library's version up."""
        self.check_writable()
        with typed_errors(self.path), whole(self.writer):
            yield self.writer
            if is_write:
                self.writer.execute("UPDATE counter SET version = version + 1")

    def extend(self) -> None:
        """Make the tables for metadata and followed folders, where they are not there yet: programs of before read a library
        until it has some.
        """
        if self.is_extended:
            return
        with self.transaction(is_write=False) as connection:
            connection.execute(tables.EXTENSION)
            connection.execute(f"PRAGMA user_version = {EXTENDED}")
        self.is_extended = True

    def shows_extension(self, connection: apsw.Connection) -> bool:
        """Whether those tables are in what a connection reads: a snapshot may be older than `is_extended`."""
        return bool(connection.pragma("user_version") == EXTENDED)

    def check_writable(self) -> None:
        if self.is_read_only:
            raise UsageError(f"{self.path} is open for reading", "nothing is written", "open it for writing")

    def is_mostly_free(self) -> bool:
        """Whether more than half of the file, and more than a little, is of things that were deleted."""
        free, pages = self.writer.pragma("freelist_count"), self.writer.pragma("page_count")
        return 2 * free > pages and free > LITTLE_PAGES

    def vacuum(self) -> int:
        """Write the file anew without what was deleted; return the bytes saved. Raises OutOfResourceError where there
        is no room for that.
        """
        with typed_errors(self.path):
            before: Any = self.writer.pragma("page_count")
            self.writer.execute("VACUUM")
            self.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            after: Any = self.writer.pragma("page_count")
            return (before - after) * int(self.writer.pragma("page_size"))

    def version(self, connection: apsw.Connection | None = None) -> int:
        """How many writes there were, as a connection sees it."""
        rows = self.typed((connection or self.writer).execute("SELECT version FROM counter"), int)
        if len(rows) != 1:
            raise StoreError(f"{self.path} is damaged", "it has no version", "restore it from a copy")
        return int(rows[0][0])

    def insert(self, namespace: str, batch: Prepared) -> list[int]:
        """Write documents, inside a transaction; return their keys."""
        keys = []
        total_bytes = row = 0
        for d, ids, count in zip(batch.documents, batch.tokens, batch.num_chunks):
            vectors = None if batch.vectors is None else batch.vectors[row : row + count].astype("<f4").tobytes()
            tokens = ids.astype(ids.dtype.newbyteorder("<"), copy=False).tobytes()
            text = d.text.encode()
            names = checksum(namespace, d.id, d.title)
            marks = (zlib.crc32(tokens, names), zlib.crc32(vectors or b""), zlib.crc32(text, names))
            values = (namespace, d.id, d.title, count, len(ids), len(text), *marks, tokens, vectors, d.text)
            self.writer.execute(tables.INSERT, values)
            keys.append(self.writer.last_insert_rowid())
            if d.metadata:
                extension.add_metadata(self.writer, keys[-1], d.metadata)
            total_bytes += len(text)
            row += count
        self._count(namespace, len(keys), row, sum(map(len, batch.tokens)), total_bytes)
        return keys

    def remove(self, namespace: str, ids: list[str]) -> list[int]:
        """Delete documents, inside a transaction; return the keys of those that were there."""
        gone: list[Any] = []
        for identifier in ids:
            gone += self.writer.execute(
                "DELETE FROM documents WHERE namespace = ? AND id = ? RETURNING key, chunks, num_tokens, bytes",
                (namespace, identifier),
            ).fetchall()
        if gone:
            keys, *sizes = zip(*gone)
            if self.is_extended:
                extension.remove_metadata(self.writer, keys)
            self._count(namespace, -len(keys), *(-sum(size) for size in sizes))
            return list(keys)
        return []

    def clear(self, namespace: str) -> int:
        """Delete a namespace with all that is known of it, inside a transaction; how many documents it had."""
        if self.is_extended:
            extension.clear(self.writer, namespace)
        self.writer.execute("DELETE FROM documents WHERE namespace = ?", (namespace,))
        count = self.writer.changes()
        self.writer.execute("DELETE FROM segments WHERE namespace = ?", (namespace,))
        self.writer.execute("DELETE FROM namespaces WHERE name = ?", (namespace,))
        return count

    def _count(self, namespace: str, documents: int, chunks: int, tokens: int, num_bytes: int) -> None:
        self.writer.execute(
            "INSERT INTO namespaces VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT (name) DO UPDATE SET "
            "documents = documents + ?2, chunks = chunks + ?3, tokens = tokens + ?4, bytes = bytes + ?5",
            (namespace, documents, chunks, tokens, num_bytes),
        )

    def keys(self, namespace: str) -> np.ndarray:
        """The keys of a namespace's documents, ascending."""
        with self.reader() as connection:
            rows = self.typed(connection.execute("SELECT key FROM documents WHERE namespace = ?", (namespace,)), int)
            return np.sort(np.fromiter((key for (key,) in rows), np.int64))

    def typed(self, rows: Iterable[Any], *types: type) -> list[Any]:
        """Rows whose values are of these types: SQLite does not look when it reads. Raises StoreError."""
        found = list(rows)
        for row in found:
            if [type(value) for value in row] != list(types):
                raise StoreError(f"{self.path} is damaged", f"a row is {row!r:.80}", "restore it from a copy")
        return found

    def check(self, key: int, expected: int, content: object, start: int = 0, kind: type = bytes) -> None:
        """Raises StoreError when the checksum of a document's bytes or text, going on from `start`, is not `expected`.

        A flipped bit can also make NULL or a number of them.
        """
        raw = content.encode() if isinstance(content, str) else content
        if type(content) is not kind or not isinstance(raw, bytes) or zlib.crc32(raw, start) != expected:
            raise StoreError(
                f"{self.path} is damaged", f"document {key} has another checksum", "restore it from a copy"
            )

    def check_sizes(self, key: int, tokens: int, text: object, chunks: int, num_tokens: int, num_bytes: int) -> None:
        """Raises StoreError where what is said of a document's size is not that of its tokens and its text."""
        said = num_chunks(tokens, self.chunk_size, self.stride), tokens, text
        if (chunks, num_tokens, num_bytes) != said:
            raise StoreError(f"{self.path} is damaged", f"the size of document {key}", "restore it from a copy")

    def token_ids(self, key: int, raw: bytes) -> np.ndarray:
        """A document's tokens. Raises StoreError for what is outside the vocabulary."""
        dtype = np.dtype(self.tokenizer.dtype).newbyteorder("<")
        ids = np.frombuffer(raw, dtype) if raw and len(raw) % dtype.itemsize == 0 else np.empty(0, dtype)
        if not len(ids) or ids.max() >= self.tokenizer.vocab_size:
            raise StoreError(f"{self.path} is damaged", f"the tokens of document {key}", "restore it from a copy")
        return ids

    def _vector_rows(self, key: int, raw: bytes | None, count: int) -> np.ndarray | None:
        """A document's vectors, one a chunk. Raises StoreError unless they are, and of this library's width."""
        width = self.settings["width"]
        if width is None and raw is None:
            return None
        if width is None or raw is None or len(raw) != 4 * width * count:
            raise StoreError(f"{self.path} is damaged", f"the vectors of document {key}", "restore it from a copy")
        rows = np.frombuffer(raw, "<f4").reshape(count, width)
        if not np.isfinite(rows).all():
            raise StoreError(f"{self.path} has NaN", f"in the vectors of document {key}", "restore it from a copy")
        return rows

    def verify(self) -> None:
        """Read everything. Raises StoreError for the first thing that does not fit."""
        with self.reader() as connection:
            for (problem,) in connection.execute("PRAGMA integrity_check").fetchall():
                if problem != "ok":
                    raise StoreError(f"{self.path} is damaged", str(problem), "restore it from a copy")
            sums = "SELECT namespace, count(*), sum(chunks), sum(num_tokens), sum(bytes) FROM documents GROUP BY 1 ORDER BY 1"
            counted = connection.execute("SELECT * FROM namespaces WHERE documents > 0 ORDER BY name").fetchall()
            if connection.execute(sums).fetchall() != counted:
                raise StoreError(f"{self.path} contradicts itself", "its counts do not fit", "restore it from a copy")
            statement = "SELECT key, tokens_crc, vectors_crc, text_crc, namespace, id, title, tokens, vectors, text FROM documents"
            rows: Any = connection.execute(statement)
            for key, tokens_crc, vectors_crc, text_crc, namespace, identifier, title, tokens, vectors, text in rows:
                names = checksum(namespace, identifier, title)
                self.check(key, tokens_crc, tokens, names)
                self.check(key, vectors_crc, b"" if vectors is None else vectors)
                self.check(key, text_crc, text, names, str)
            if self.is_extended:
                for (name,) in self.typed(connection.execute("SELECT name FROM namespaces"), str):
                    for _ in extension.all_metadata(connection, self.path, name):
                        pass

    def contents(
        self, namespace: str, after: int, last: int | None = None
    ) -> Iterator[tuple[int, str, np.ndarray, np.ndarray | None]]:
        """Key, title, tokens and vectors of the documents with keys after < key <= last, ascending."""
        with self.reader() as connection:
            for key, identifier, title, tokens_crc, vectors_crc, tokens, vectors in connection.execute(
                "SELECT key, id, title, tokens_crc, vectors_crc, tokens, vectors FROM documents "
                "WHERE namespace = ? AND key > ? AND key <= ? ORDER BY key",
                (namespace, after, (1 << 62) if last is None else last),
            ):
                self.check(key, tokens_crc, tokens, checksum(namespace, identifier, title))
                self.check(key, vectors_crc, b"" if vectors is None else vectors)
                ids = self.token_ids(key, tokens)
                rows = self._vector_rows(key, vectors, num_chunks(len(ids), self.chunk_size, self.stride))
                yield key, title, ids, rows
