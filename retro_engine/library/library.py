"""The live library: documents are added, replaced and deleted while it is searched, and nothing acknowledged is lost.

LIBRARY/documents.sqlite is the truth; LIBRARY/segments/ is an index that is made from it and can be made again.
A write is on the disk, and seen by every search that starts after it, when its call returns. Searches take no lock:
they read a snapshot. One process has a library open; in it any number of threads may read, and writers take turns.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw
import numpy as np

from retro_engine.data import files
from retro_engine.data.corpus import Document, FieldValue
from retro_engine.data.identity import composed
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import MissingInputError, OutOfResourceError, RetroError, StoreError, UsageError
from retro_engine.library import extension
from retro_engine.library import file as library_file
from retro_engine.library.documents import (
    Chunker,
    Embedder,
    Prepared,
    check_id,
    check_namespace,
    check_query,
)
from retro_engine.library.embedders import SentenceEmbedder, own_embedder
from retro_engine.library.file import LibraryFile, checksum
from retro_engine.library.filters import Filter
from retro_engine.library.search import NOTHING, Ranking, check_mode, counts, rank, without_overlaps
from retro_engine.library.segments import Segment, Snapshot
from retro_engine.library.snapshots import LibraryIndex, Shown
from retro_engine.retrieval.analyzer import Analyzer
from retro_engine.retrieval.hit import Counts, Hit

DEFAULT = "default"  # the namespace
DELTA_CHUNKS = 4096  # from then on the delta becomes a segment
MAX_LIST = 1000
MOST_MATCHES = 32  # of filters whose documents are kept
MOST_SHOWN = 20  # names of fields, where a filter asks for others
TRIES = 100  # to read file and snapshot between two writes: one or two are enough


@dataclass(frozen=True)
class Entry:
    """A line of a listing."""

    id: str
    title: str
    chunks: int
    tokens: int
    bytes: int
    metadata: dict[str, FieldValue] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Matching:
    """What a filter lets through in one version."""

    version: int
    keys: np.ndarray  # of documents, ascending
    names: frozenset[str]  # of fields that any document has


class Library:
    """An open library. Close it, or use it as a context manager: its lock goes with it."""

    def __init__(
        self,
        folder: str | Path,
        embedder: Embedder | None = None,
        delta_chunks: int = DELTA_CHUNKS,
        is_read_only: bool = False,
        tokenizer: Tokenizer | None = None,
    ):
        """Open a library that `create` made, with the embedder it was made with.

        Without one it takes its own, hashed words or a SentenceTransformers model; a library of another can be searched but not
        added to.
        `is_read_only`: nothing in the folder is written, made again or removed; several may read at once. `tokenizer`: one that is
        open already; where it is the library's own there is no second one in memory.

        Raises MissingInputError where there is none; UsageError when another process has it open; StoreError for a
        damaged, foreign or newer one, or another embedder.
        """
        self.folder = Path(folder)
        if not (self.folder / library_file.FILE).is_file():
            raise MissingInputError(
                f"{self.folder} is not a library", f"it has no {library_file.FILE}", "retro docs add makes one"
            )
        with contextlib.ExitStack() as stack:
            stack.enter_context((files.read_locked if is_read_only else files.locked)(self.folder))
            self.file = LibraryFile(self.folder, is_read_only, tokenizer)
            stack.callback(self.file.close)
            if embedder is None:
                embedder = own_embedder(self.file.settings, self.file.tokenizer)
            self.chunker = Chunker(
                self.file.tokenizer,
                self.file.chunk_size,
                stride=self.file.stride,
                embedder=embedder,
                width=self.file.settings["width"],
                analyzer=self.file.analyzer,
            )
            self._check_embedder(embedder)
            self._lock = threading.RLock()  # writers, and whoever publishes a snapshot
            self._is_closed = False
            self._matches: dict[tuple[str, str], Matching] = {}  # by namespace and filter as JSON, where 1 is not true
            self._matches_lock = threading.Lock()
            with library_file.typed_errors(self.file.path):
                self._index = LibraryIndex(self.file, self.chunker, delta_chunks, self._lock)
            self._resources = stack.pop_all()
        self._index.start()

    @classmethod
    def create(
        cls,
        folder: str | Path,
        tokenizer: Tokenizer,
        chunk_size: int = 64,
        stride: int | None = None,
        embedder: Embedder | None = None,
        analyzer: Analyzer | None = None,
    ) -> None:
        """Make an empty library; `stride` tokens lie between the starts of chunks (None: chunk_size, no overlap).

        `analyzer`: how it reads words, from then on.
        """
        stride = chunk_size if stride is None else stride
        if not 1 <= chunk_size < 1 << 16 or not 1 <= stride <= chunk_size:
            raise UsageError(
                f"chunk_size={chunk_size}, stride={stride} cannot be used", "1 <= stride <= chunk_size <= 65,535"
            )
        width = None if embedder is None else int(np.asarray(embedder.encode(["width"])).shape[-1])
        settings = {
            "tokenizer": tokenizer.json,
            "chunk_size": chunk_size,
            "stride": stride,
            "embedder": None if embedder is None else embedder.name,
            "width": width,
            "analyzer": (analyzer or Analyzer()).to_json(),
        }
        if isinstance(embedder, SentenceEmbedder):
            settings["embedder_model"] = embedder.settings
        library_file.create(Path(folder), settings)

    def _check_embedder(self, embedder: Embedder | None) -> None:
        name = self.file.settings["embedder"]
        if embedder is not None and embedder.name != name:
            made = f"embedder {name}" if name else "no embedder"
            raise StoreError(
                f"{self.folder} was made with {made}", f"it was opened with {embedder.name}", "open it with its own"
            )

    def __enter__(self) -> "Library":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the background merge, and give the library's lock back."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._index.stop()
        with self._lock:
            self._resources.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise UsageError(f"{self.folder} is closed", "", "open it again")

    @property
    def version(self) -> int:
        """Counts up with every write that was acknowledged, across restarts; what it counted is found."""
        return self._index.shown.version

    # Writing

    def add(self, documents: Sequence[Document], namespace: str = DEFAULT) -> int:
        """Add documents, each replacing the one with its id; return the library's version with them in it.

        All of them or none: raises UsageError for one that is not allowed, OutOfResourceError for a full disk.
        """
        check_namespace(namespace)
        latest = {document.id: document for document in documents}  # the last of those with the same id
        return self.write(namespace, self.chunker.prepare(list(latest.values())), [])[0]

    def delete(self, ids: Sequence[str], namespace: str = DEFAULT) -> int:
        """Delete documents by id; return how many there were. An id stands for its form NFC as well, as files get it."""
        check_namespace(namespace)
        for identifier in ids:
            check_id(identifier)
        return self.write(namespace, None, list(dict.fromkeys((*ids, *map(composed, ids)))))[1]

    def write(
        self,
        namespace: str,
        batch: Prepared | None,
        deleted: Sequence[str],
        also: Callable[[apsw.Connection], None] | None = None,
    ) -> tuple[int, int]:
        """Documents, deletions and the changes that `also` makes in one transaction; the version, the number deleted."""
        with self._lock, library_file.typed_errors(self.file.path):
            self._check_open()
            if batch is not None and any(document.metadata for document in batch.documents):
                self.file.extend()
            try:
                with self.file.transaction() as connection:
                    gone = self.file.remove(namespace, list(deleted))
                    replaced: list[int] = []
                    keys: list[int] = []
                    if batch is not None and batch.documents:
                        gone_ids = [document.id for document in batch.documents]
                        replaced = self.file.remove(namespace, gone_ids)
                        keys = self.file.insert(namespace, batch)
                    if also is not None:
                        also(connection)
                version = self.file.version()
                self._index.show(version, namespace, gone + replaced, keys, batch)
            except RetroError:  # rolled back: what is seen is what there is
                raise
            except BaseException:  # stopped between disk and snapshot
                self._index.load()
                raise
        return version, len(gone)

    @contextlib.contextmanager
    def locked_transaction(self) -> Iterator[apsw.Connection]:
        """A transaction beside the documents: jobs."""
        with self._lock:
            self._check_open()
            with self.file.transaction(is_write=False) as connection:
                yield connection

    def reset(self, namespace: str | None = None) -> int:
        """Delete every document of a namespace, or of all (None); return how many there were."""
        if namespace is not None:
            check_namespace(namespace)
        with self._lock, library_file.typed_errors(self.file.path):
            self._check_open()
            names = list(self._index.snapshots) if namespace is None else [namespace]
            count = 0
            with self.file.transaction():
                for name in names:
                    count += self.file.clear(name)
            try:
                self._index.forget(self.file.version(), names)
            except BaseException:  # what is seen must not stay behind what there is
                self._index.load()
                raise
            if self.file.is_mostly_free():
                with contextlib.suppress(OutOfResourceError):  # no room to write it anew: its space is used again
                    self.file.vacuum()
        return count

    def vacuum(self) -> int:
        """Give the space of what was deleted back to the disk; return the bytes. Needs that much free as stays in use."""
        self.merge(is_all=True)
        with self._lock:
            self._check_open()
            return self.file.vacuum()

    # Reading

    def get(self, identifier: str, namespace: str = DEFAULT) -> Document | None:
        """A document, or None. Where none has this id, the one that has it in form NFC, as files get it."""
        check_namespace(namespace)
        check_id(identifier)
        statement = (
            "SELECT key, text_crc, id, title, text FROM documents WHERE namespace = ? AND id IN (?, ?) "
            "ORDER BY id = ? DESC LIMIT 1"
        )
        with self._view() as (connection, _):
            row: Any = connection.execute(
                statement, (namespace, identifier, composed(identifier), identifier)
            ).fetchone()
            about = self._metadata(connection, row, self.file.shows_extension(connection))
        if row is None:
            return None
        document = Document(row[2], row[3], row[4], metadata=about)
        names = checksum(namespace, document.id, document.title)
        self.file.check(row[0], row[1], document.text, names, str)
        return document

    def _metadata(
        self, connection: apsw.Connection, row: Sequence[Any] | None, is_extended: bool
    ) -> dict[str, FieldValue]:
        """Of the document that a row, whose first value is its key, is of; `is_extended`: what the connection shows."""
        return extension.metadata_of(connection, self.file.path, row[0]) if is_extended and row is not None else {}

    def entries(self, namespace: str = DEFAULT, after: str = "", limit: int = 100) -> list[Entry]:
        """Documents in the order of their ids' UTF-8, those after the id `after`; the last id begins the next page."""
        check_namespace(namespace)
        if not 1 <= limit <= MAX_LIST:
            raise UsageError(f"limit={limit} cannot be used", f"a page has 1 to {MAX_LIST:,} documents")
        statement = (
            "SELECT key, tokens_crc, tokens, octet_length(text), id, title, chunks, num_tokens, bytes "
            "FROM documents WHERE namespace = ? AND id > ? ORDER BY id LIMIT ?"
        )
        found = []
        with self._view() as (connection, _):
            is_extended = self.file.shows_extension(connection)
            rows: Any = connection.execute(statement, (namespace, after, limit))
            for row in rows:  # one document's tokens at a time
                key, crc, tokens, length, *entry = row
                self.file.typed([entry], str, str, int, int, int)
                self.file.check(key, crc, tokens, checksum(namespace, *entry[:2]))
                self.file.check_sizes(key, len(self.file.token_ids(key, tokens)), length, *entry[2:])
                entry.append(self._metadata(connection, row, is_extended))
                found.append(Entry(*entry))
        return found

    def statistics(self) -> dict[str, Any]:
        """Counts of each namespace, the index's parts, the version."""
        names = ("documents", "chunks", "tokens", "bytes")
        with self._view() as (connection, shown):
            rows: list[Any] = connection.execute(
                "SELECT name, documents, chunks, tokens, bytes FROM namespaces ORDER BY name"
            ).fetchall()
        counts = {name: dict(zip(names, numbers)) for name, *numbers in self.file.typed(rows, str, int, int, int, int)}
        return {
            "kind": "library",
            "version": shown.version,
            "chunk_size": self.file.chunk_size,
            "stride": self.file.stride,
            "embedder": self.file.settings["embedder"],
            "words": self.file.analyzer.describe(),
            "namespaces": {name: count | self._index.parts(name) for name, count in counts.items()},
            "merging": self._index.failure or "yes",
            "notes": list(self._index.notes),
        }

    @property
    def is_merging(self) -> bool:
        """Whether deltas become segments in the background, or would: False once that has failed for good."""
        return not self._index.failure

    def search(
        self,
        text: str,
        k: int = 10,
        mode: str = "lexical",
        namespace: str = DEFAULT,
        weights: Sequence[float] = (1.0, 1.0),
        where: Filter | None = None,
    ) -> list[Hit]:
        """The k best chunks for a text, best first; fewer where there are no more.

        Modes: lexical, dense, hybrid (both rankings fused with `weights`). Chunks that overlap better ones (stride <
        chunk_size) are left out. With a filter the search is that of a library of the documents that match. Raises UsageError for an empty or huge text, k below 1, or dense without vectors.
        """
        return [hit for hit, _ in self.find(text, k, mode, namespace, weights, where=where)]

    def find(
        self,
        text: str,
        k: int = 10,
        mode: str = "lexical",
        namespace: str = DEFAULT,
        weights: Sequence[float] = (1.0, 1.0),
        retrieved_length: int | None = None,
        beside: Callable[[np.ndarray], Counts] | None = None,
        where: Filter | None = None,
    ) -> list[tuple[Hit, np.ndarray]]:
        """`search`, with the tokens of each chunk and its continuation.

        Where `retrieved_length` tokens of each will be read, none is kept that shares one of them with a better one.
        `beside`: counts of terms in another collection, with whose scores those of mode lexical shall be comparable.
        """
        check_namespace(namespace)
        check_query(text, k)
        check_mode(mode, weights)
        if mode != "lexical" and self.chunker.width is None:
            raise UsageError(f"mode {mode} needs vectors", f"{self.folder} was made without an embedder", "lexical")
        vector = None if mode == "lexical" else self.chunker.embed([text], is_query=True)[0]
        reach = -(-(retrieved_length or self.file.chunk_size) // self.file.stride)
        with self._view() as (connection, shown):
            snapshot = shown.snapshots.get(namespace, ())
            if where is not None:
                keys = self._matching(connection, shown.version, namespace, where).keys
                snapshot = tuple(view.only(keys) for view in snapshot)
            if not any(view.num_alive for view in snapshot):  # then nothing is compiled, which takes 110 MiB
                return []
            hashes = self.file.analyzer.query(text)
            others = NOTHING if beside is None else beside(hashes)
            ranking = rank(
                snapshot, mode, hashes=hashes, vector=vector, weights=weights, k=k * (2 * reach - 1), beside=others
            )
            ranking = without_overlaps(snapshot, ranking, reach)[:k] if reach > 1 else ranking
            found = self._hits(connection, snapshot, ranking)
        self._check_open()  # not closed while it searched
        return found

    def counts(self, hashes: np.ndarray, namespace: str = DEFAULT) -> Counts:
        """How many chunks of a namespace have each of these terms, and how many it has."""
        return counts(self._index.snapshots.get(namespace, ()), hashes)

    def metadata(self, ids: Sequence[str], namespace: str = DEFAULT) -> dict[str, dict[str, FieldValue]]:
        """The fields of documents that have some, by id."""
        statement = "SELECT key FROM documents WHERE namespace = ? AND id = ?"
        found = {}
        with self._view() as (connection, _):
            is_extended = self.file.shows_extension(connection)
            for identifier in dict.fromkeys(ids):
                row: Any = connection.execute(statement, (namespace, identifier)).fetchone()
                found[identifier] = self._metadata(connection, row, is_extended)
        return {identifier: fields for identifier, fields in found.items() if fields}

    def _matching(self, connection: apsw.Connection, version: int, namespace: str, where: Filter) -> "Matching":
        """What a filter lets through; the newest answers are kept until the library changes."""
        asked = namespace, json.dumps(where.json)
        with self._matches_lock:
            known = self._matches.get(asked)
        if known is not None and known.version == version:
            return known
        keys, names = [], set[str]()
        if self.file.shows_extension(connection):
            for key, fields in extension.all_metadata(connection, self.file.path, namespace):
                names.update(fields)
                if where.matches(fields):
                    keys.append(key)
        found = Matching(version, np.array(sorted(keys), np.int64), frozenset(names))
        with self._matches_lock:
            self._matches.pop(asked, None)
            while len(self._matches) >= MOST_MATCHES:
                del self._matches[next(iter(self._matches))]
            self._matches[asked] = found
        return found

    def unknown_fields(self, where: Filter, namespace: str = DEFAULT) -> str:
        """What a filter asks for and no document has; "" where there is nothing to say."""
        with self._view() as (connection, shown):
            names = self._matching(connection, shown.version, namespace, where).names
        unknown = sorted(where.names - names)
        if not unknown:
            return ""
        known = ", ".join(sorted(names)[:MOST_SHOWN]) or "none"
        return f"no document has the field {', '.join(unknown)[:200]} (fields that documents have: {known})"

    def why_nothing(self, text: str, namespace: str = DEFAULT, where: Filter | None = None) -> str:
        """Why a search for a text has no hit."""
        if where is not None:
            with self._view() as (connection, shown):
                matching = self._matching(connection, shown.version, namespace, where)
            if not len(matching.keys):
                return self.unknown_fields(where, namespace) or "no document matches the filter"
        if not any(view.num_alive for view in self._index.snapshots.get(namespace, ())):
            return f"namespace {namespace} holds no document"
        return self.file.analyzer.why_nothing(text) or "none of its words is in a document"

    def _hits(self, connection: apsw.Connection, snapshot: Snapshot, ranking: Ranking) -> list[tuple[Hit, np.ndarray]]:
        """The texts and tokens of a ranking, but for documents that were deleted since."""
        m = self.file.chunk_size
        found: list[tuple[str, str, int, float]] = []
        tokens: list[np.ndarray] = []
        for view, chunk, score in ranking:
            key, number = snapshot[view].document(chunk)
            row: Any = connection.execute(
                "SELECT tokens_crc, namespace, id, title, tokens FROM documents WHERE key = ?", (key,)
            ).fetchone()
            if row is not None:
                self.file.check(key, row[0], row[4], checksum(*row[1:4]))
                end = number * self.file.stride + m
                tokens.append(self.file.token_ids(key, row[4])[end - m : end + m])
                found.append((row[2], row[3], number, score))
        texts = self.file.tokenizer.decode_batch([part.tolist() for row in tokens for part in (row[:m], row[m:])])
        pairs = zip(found, texts[::2], texts[1::2])
        hits = [Hit(*head, text, continuation, self.folder.name) for head, text, continuation in pairs]
        return list(zip(hits, tokens))

    @contextlib.contextmanager
    def _view(self) -> Iterator[tuple[apsw.Connection, Shown]]:
        """The file and the snapshots of one version, so that whatever is asked for agrees, whoever writes meanwhile."""
        self._check_open()
        for attempt in range(1, TRIES + 1):
            with self.file.reader() as connection, library_file.whole(connection, "BEGIN"):
                # the first question fixes what is seen of the file
                version = self.file.version(connection)
                self._index.wait_for(version)
                shown = self._index.shown
                if shown.version == version or attempt == TRIES:
                    yield connection, shown
                    return

    def last_key(self) -> int:
        """Of the document that was added last, whether it is still there or not."""
        rows = self.read("SELECT seq FROM sqlite_sequence WHERE name = 'documents'")
        return self.file.typed(rows, int)[0][0] if rows else 0

    def added_after(self, key: int, limit: int, namespace: str = DEFAULT) -> tuple[int, list[np.ndarray]]:
        """The first `limit` documents that were added after the one with a key: the last one's key, and the tokens of each of
        their chunks with its continuation, as `find` gives them.
        """
        columns = "key, tokens_crc, chunks, namespace, id, title, tokens"
        statement = f"SELECT {columns} FROM documents WHERE namespace = ? AND key > ? ORDER BY key LIMIT ?"
        last, neighbors = key, list[np.ndarray]()
        for last, crc, chunks, *head, raw in self.read(statement, namespace, key, limit):
            self.file.check(last, crc, raw, checksum(*head))
            starts = range(0, chunks * self.file.stride, self.file.stride)
            tokens = self.file.token_ids(last, raw)
            neighbors += [tokens[start : start + 2 * self.file.chunk_size] for start in starts]
        return last, neighbors

    def read(self, statement: str, *values: Any) -> list[Any]:
        """Rows of the library's tables."""
        self._check_open()
        with self.file.reader() as connection:
            return connection.execute(statement, values).fetchall()

    def merge(self, is_all: bool = False) -> None:
        """Make segments of the deltas now (`is_all`: one of each namespace), as the background thread does."""
        self._check_open()
        self.file.check_writable()
        self._index.merge_all(is_all)

    def verify(self) -> None:
        """Compare everything with everything. Raises StoreError for the first thing that does not fit."""
        if self.file.is_read_only and self._index.notes:
            raise StoreError(f"{self.folder}: {self._index.notes[0]}", "", "retro docs vacuum makes its index again")
        if self._index.failure:
            raise StoreError(f"{self.folder} merges no more", self._index.failure, "open it again")
        with self._lock:
            self.file.verify()
            for namespace, views in self._index.snapshots.items():
                indexed = np.concatenate([view.alive_keys() for view in views])
                if not np.array_equal(indexed, self.file.keys(namespace)):
                    where = self._index.folder
                    raise StoreError(f"{where} does not fit the documents of {namespace}", "", f"rm -r {where}")
            folders = self._segment_folders()
        for folder in folders:
            try:
                files.verify_files(folder, files.read_manifest(folder, "segment")["files"])
            except RetroError:
                if folder in self._segment_folders():  # else a merge took its place meanwhile, and removed it
                    raise

    def _segment_folders(self) -> list[Path]:
        """Those that are searched now."""
        parts = [view.part for views in self._index.snapshots.values() for view in views]
        return [part.folder for part in parts if isinstance(part, Segment) and part.folder is not None]
