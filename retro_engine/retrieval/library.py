"""The live library: documents are added, replaced and deleted while it is searched, and nothing acknowledged is lost.

LIBRARY/documents.sqlite is the truth; LIBRARY/segments/ is an index that is made from it and can be made again.
A write is on the disk, and seen by every search that starts after it, when its call returns. Searches take no lock:
they read a snapshot. One process has a library open; in it any number of threads may read, and writers take turns.
"""

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
import numpy as np

from retro_engine.data import files
from retro_engine.data.corpus import Document
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import MissingInputError, RetroError, StoreError, UsageError
from retro_engine.retrieval import library_file
from retro_engine.retrieval.library_documents import (
    Chunker,
    Embedder,
    Prepared,
    check_id,
    check_namespace,
    check_query,
    chunk_terms,
    num_chunks,
)
from retro_engine.retrieval.library_file import LibraryFile
from retro_engine.retrieval.library_index import Delta, Segment, Snapshot, View, merge, open_segment, publish_segment, tail_to_merge
from retro_engine.retrieval.library_search import Hit, Ranking, check_mode, drop_overlaps, rank

DEFAULT = "default"  # the namespace
DELTA_CHUNKS = 4096  # from then on the delta becomes a segment
SEGMENTS = "segments"
MAX_LIST = 1000
TRIES = 5  # of a search whose hits were deleted while it ran


@dataclass(frozen=True)
class Entry:
    """A line of a listing."""

    id: str
    title: str
    chunks: int
    tokens: int
    bytes: int


class Library:
    """An open library. Close it, or use it as a context manager: its lock goes with it."""

    def __init__(self, folder: str | Path, embedder: Embedder | None = None, delta_chunks: int = DELTA_CHUNKS):
        """Open a library that `create` made, with the embedder it was made with (None: lexical search only).

        Raises MissingInputError where there is none; UsageError when another process has it open; StoreError for a
        damaged, foreign or newer one, or another embedder.
        """
        self.folder, self.delta_chunks = Path(folder), delta_chunks
        if not (self.folder / library_file.FILE).is_file():
            raise MissingInputError(
                f"{self.folder} is not a library", f"it has no {library_file.FILE}", "retro docs add makes one"
            )
        with contextlib.ExitStack() as stack:
            stack.enter_context(files.locked(self.folder))
            self.file = LibraryFile(self.folder)
            stack.callback(self.file.close)
            self.chunker = Chunker(
                self.file.tokenizer, self.file.chunk_size, self.file.stride, embedder, self.file.settings["width"]
            )
            self._check_embedder(embedder)
            self._lock = threading.RLock()  # writers, and whoever publishes a snapshot
            self._merge_lock = threading.Lock()
            self._wake = threading.Event()
            self._is_closed = False
            self.notes: list[str] = []  # what was mended while opening, and merges that failed
            with library_file.typed_errors(self.file.path):
                self._version = self.file.version()
                self._snapshots = self._load()
            self._resources = stack.pop_all()
        self._merger = threading.Thread(target=self._merge_loop, name="library-merger", daemon=True)
        self._merger.start()
        self._wake.set()

    @classmethod
    def create(
        cls,
        folder: str | Path,
        tokenizer: Tokenizer,
        chunk_size: int = 64,
        stride: int | None = None,
        embedder: Embedder | None = None,
    ) -> None:
        """Make an empty library; `stride` tokens lie between the starts of chunks (None: chunk_size, no overlap)."""
        stride = chunk_size if stride is None else stride
        if not 1 <= chunk_size < 1 << 16 or not 1 <= stride <= chunk_size:
            raise UsageError(
                f"chunk_size={chunk_size}, stride={stride} cannot be used", "1 <= stride <= chunk_size <= 65,535"
            )
        width = 0 if embedder is None else int(np.asarray(embedder.encode(["width"])).shape[-1])
        name = None if embedder is None else embedder.name
        library_file.create(Path(folder), tokenizer, chunk_size, stride, name, width)

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
        self._wake.set()
        self._merger.join()
        with self._lock:
            self._resources.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise UsageError(f"{self.folder} is closed", "", "open it again")

    @property
    def version(self) -> int:
        """Counts up with every write that was acknowledged, across restarts."""
        return self._version

    # Writing

    def add(self, documents: Sequence[Document], namespace: str = DEFAULT) -> int:
        """Add documents, each replacing the one with its id; return the library's version with them in it.

        All of them or none: raises UsageError for one that is not allowed, OutOfResourceError for a full disk.
        """
        check_namespace(namespace)
        latest = {document.id: document for document in documents}  # the last of those with the same id
        prepared = self.chunker.prepare(list(latest.values()))
        self.write(namespace, prepared, [])
        return self._version

    def delete(self, ids: Sequence[str], namespace: str = DEFAULT) -> int:
        """Delete documents by id; return how many there were."""
        check_namespace(namespace)
        for identifier in ids:
            check_id(identifier)
        return self.write(namespace, [], list(ids))

    def write(
        self,
        namespace: str,
        documents: Sequence[Prepared],
        deleted: Sequence[str],
        also: Callable[[apsw.Connection], None] | None = None,
    ) -> int:
        """Documents, deletions and the changes that `also` makes in one transaction; return the number deleted."""
        with self._lock:
            self._check_open()
            try:
                with self.file.transaction() as connection:
                    gone = self.file.remove(namespace, list(deleted))
                    replaced = self.file.remove(namespace, [d.document.id for d in documents])
                    keys = self.file.insert(namespace, list(documents)) if documents else []
                    if also is not None:
                        also(connection)
                self._version = self.file.version()
                self._show(namespace, gone + replaced, list(zip(keys, documents)))
            except RetroError:  # rolled back: what is seen is what there is
                raise
            except BaseException:  # stopped between disk and snapshot
                self._version, self._snapshots = self.file.version(), self._load()
                raise
        return len(gone)

    def _show(self, namespace: str, dead: list[int], new: list[tuple[int, Prepared]]) -> None:
        """Publish a snapshot without the dead and with the new."""
        old = self._snapshots.get(namespace) or (View.whole(Delta(self.chunker.width)),)
        views = [view.without(dead) for view in old] if dead else list(old)
        delta = views[-1].part
        assert isinstance(delta, Delta), "a snapshot ends with its delta"
        for key, document in new:
            delta.append(key, document.terms, document.vectors)
        views[-1] = views[-1].grown()
        self._snapshots = {**self._snapshots, namespace: tuple(views)}
        if len(views[-1].alive) >= self.delta_chunks:
            self._wake.set()

    def reset(self, namespace: str | None = None) -> int:
        """Delete every document of a namespace, or of all (None); return how many there were."""
        if namespace is not None:
            check_namespace(namespace)
        with self._lock:
            self._check_open()
            names = list(self._snapshots) if namespace is None else [namespace]
            with self.file.transaction() as connection:
                count = 0
                for name in names:
                    for table in ("documents", "segments"):
                        connection.execute(f"DELETE FROM {table} WHERE namespace = ?", (name,))
                        count += connection.changes() if table == "documents" else 0
                    connection.execute("DELETE FROM namespaces WHERE name = ?", (name,))
            self._version = self.file.version()
            gone = [view.part for name in names for view in self._snapshots.get(name, ())]
            self._snapshots = {name: views for name, views in self._snapshots.items() if name not in names}
            self._remove_folders(gone)
        return count

    # Reading

    def get(self, identifier: str, namespace: str = DEFAULT) -> Document | None:
        """A document, or None."""
        check_namespace(namespace)
        check_id(identifier)
        rows = self._read("SELECT id, title, text FROM documents WHERE namespace = ? AND id = ?", namespace, identifier)
        return Document(*rows[0]) if rows else None

    def list(self, namespace: str = DEFAULT, after: str = "", limit: int = 100) -> "list[Entry]":
        """Documents in the order of their ids' UTF-8, those after the id `after`; the last id begins the next page."""
        check_namespace(namespace)
        if not 1 <= limit <= MAX_LIST:
            raise UsageError(f"limit={limit} cannot be used", f"a page has 1 to {MAX_LIST:,} documents")
        rows = self._read(
            "SELECT id, title, chunks, num_tokens, bytes FROM documents WHERE namespace = ? AND id > ? ORDER BY id LIMIT ?",
            namespace,
            after,
            limit,
        )
        return [Entry(*row) for row in rows]

    def statistics(self) -> dict[str, Any]:
        """Counts of each namespace, the index's parts, the version."""
        names = ("documents", "chunks", "tokens", "bytes")
        rows = self._read("SELECT name, documents, chunks, tokens, bytes FROM namespaces ORDER BY name")
        parts = {
            name: {
                "segments": [view.num_alive for view in views[:-1]],
                "delta": views[-1].num_alive,
                "dead": sum(len(view.alive) - view.num_alive for view in views),
            }
            for name, views in self._snapshots.items()
        }
        counts = {name: dict(zip(names, numbers)) for name, *numbers in rows}
        return {
            "kind": "library",
            "version": self._version,
            "chunk_size": self.file.chunk_size,
            "stride": self.file.stride,
            "embedder": self.file.settings["embedder"],
            "namespaces": {name: count | parts.get(name, {}) for name, count in counts.items()},
            "notes": list(self.notes),
        }

    def search(
        self,
        text: str,
        k: int = 10,
        mode: str = "lexical",
        namespace: str = DEFAULT,
        weights: Sequence[float] = (1.0, 1.0),
    ) -> "list[Hit]":
        """The k best chunks for a text, best first; fewer where there are no more.

        Modes: lexical, dense, hybrid (both rankings fused with `weights`). Chunks that overlap better ones (stride <
        chunk_size) are left out. Raises UsageError for an empty or huge text, k below 1, or dense without vectors.
        """
        check_namespace(namespace)
        check_query(text, k)
        check_mode(mode, weights)
        if mode != "lexical" and self.chunker.width is None:
            raise UsageError(f"mode {mode} needs vectors", f"{self.folder} was made without an embedder", "lexical")
        vector = None if mode == "lexical" else self.chunker.embed([text])[0]
        reach = -(-self.file.chunk_size // self.file.stride)
        hits: list[Hit] = []
        for _ in range(TRIES):
            self._check_open()
            snapshot = self._snapshots.get(namespace, ())
            ranking = rank(snapshot, mode, text, vector, weights, k * (2 * reach - 1))
            ranking = drop_overlaps(snapshot, ranking, reach)[:k] if reach > 1 else ranking
            hits = self._hits(snapshot, ranking)
            if len(hits) == len(ranking):
                break
        return hits

    def source(self, mode: str = "lexical", namespace: str = DEFAULT) -> "Callable[[str, int], list[Hit]]":
        """This library as a source of `combined`."""
        return lambda text, k: self.search(text, k, mode, namespace)

    def _hits(self, snapshot: Snapshot, ranking: Ranking) -> "list[Hit]":
        """The texts of a ranking, but for documents that were deleted since."""
        m, size = self.file.chunk_size, np.dtype(self.file.tokenizer.dtype).itemsize
        found, rows = [], []
        with self.file.reader() as connection:
            for view, chunk, score in ranking:
                key, number = snapshot[view].document(chunk)
                start = number * self.file.stride
                row = connection.execute(
                    "SELECT id, title, substr(tokens, ?, ?) FROM documents WHERE key = ?",
                    (1 + start * size, 2 * m * size, key),
                ).fetchone()
                if row is not None:
                    tokens = np.frombuffer(row[2], np.dtype(self.file.tokenizer.dtype).newbyteorder("<")).tolist()
                    rows += [tokens[:m], tokens[m:]]
                    found.append((row[0], row[1], number, score))
        texts = self.file.tokenizer.decode_batch(rows)
        return [Hit(*head, *texts[2 * i : 2 * i + 2], self.folder.name) for i, head in enumerate(found)]

    def _read(self, statement: str, *values: Any) -> "list[Any]":
        self._check_open()
        with self.file.reader() as connection:
            return connection.execute(statement, values).fetchall()

    # The index

    def merge(self, is_all: bool = False) -> None:
        """Make segments of the deltas now (`is_all`: one of each namespace), as the background thread does."""
        for namespace in list(self._snapshots):
            self._merge(namespace, is_all, min_chunks=1)

    def _merge_loop(self) -> None:
        while not self._is_closed:
            self._wake.wait()
            self._wake.clear()
            try:
                for namespace in list(self._snapshots):
                    if self._is_closed:
                        return
                    self._merge(namespace, False, self.delta_chunks)
            except RetroError as error:  # a full disk, say: the delta serves, and the next write tries again
                note = f"merge failed: {error.what}"
                if self.notes[-1:] != [note]:
                    self.notes.append(note)

    def _merge(self, namespace: str, is_all: bool, min_chunks: int) -> None:
        with self._merge_lock:
            with self._lock:
                views = self._snapshots.get(namespace, ())
                is_due = bool(views) and (len(views[-1].alive) >= min_chunks or (is_all and len(views) > 2))
                if self._is_closed or not is_due:
                    return
                first = tail_to_merge(views, is_all)
                inputs = views[first:]
                fresh = View.whole(Delta(self.chunker.width))  # what is written from now on
                self._snapshots = {**self._snapshots, namespace: (*views, fresh)}
            merged = None
            if any(view.num_alive for view in inputs):
                folder = self.folder / SEGMENTS / f"{self._next_segment():08d}"
                mark = publish_segment(merge(inputs), folder, self.file.fingerprint)
                merged = View.whole(open_segment(folder, self.file.fingerprint, mark))
                merged_row = (folder.name, namespace, int(merged.part.keys[0]), int(merged.part.keys[-1]), mark)
            with self._lock:
                current = self._snapshots.get(namespace, ())
                parts = [view.part for view in current]
                if [id(view.part) for view in inputs] != [id(p) for p in parts[first : first + len(inputs)]]:  # a reset came between
                    self._remove_folders([merged.part] if merged else [])
                    return
                replaced = current[first : first + len(inputs)]
                with self.file.transaction(is_write=False) as connection:
                    names = [(v.part.folder.name,) for v in replaced if not isinstance(v.part, Delta)]
                    connection.executemany("DELETE FROM segments WHERE name = ?", names)
                    if merged is not None:
                        connection.execute("INSERT INTO segments VALUES (?, ?, ?, ?, ?)", merged_row)
                        alive = np.concatenate([view.alive_keys() for view in replaced])
                        died = np.setdiff1d(merged.part.keys, alive, assume_unique=True)
                        merged = merged.without(died.tolist())
                new = (*current[:first], *([merged] if merged else []), *current[first + len(inputs) :])
                self._snapshots = {**self._snapshots, namespace: new}
                self._remove_folders([view.part for view in replaced])

    def _next_segment(self) -> int:
        root = self.folder / SEGMENTS
        return 1 + max((int(path.name) for path in root.iterdir() if path.name.isdigit()), default=0) if root.is_dir() else 1

    def _remove_folders(self, parts: "Sequence[Any]") -> None:
        """Remove segments that nothing names any more; searches that still read them keep them mapped."""
        for part in parts:
            if not isinstance(part, Delta) and part.folder is not None:
                shutil.rmtree(part.folder, ignore_errors=True)  # what stays is removed when the library is opened

    def _load(self) -> dict[str, Snapshot]:
        """Every namespace's snapshot, from the segments there are and the documents that are in none."""
        rows = self.file.writer.execute("SELECT namespace, name, first_key, last_key, fingerprint FROM segments")
        segments: dict[str, list[tuple[Any, ...]]] = {}
        for namespace, *rest in sorted(rows.fetchall(), key=lambda row: row[2]):
            segments.setdefault(namespace, []).append(tuple(rest))
        named = {row[0] for each in segments.values() for row in each}
        root = self.folder / SEGMENTS
        for path in root.iterdir() if root.is_dir() else ():
            if path.name not in named:  # a merge that was killed
                shutil.rmtree(path, ignore_errors=True)
        names = [name for (name,) in self.file.writer.execute("SELECT name FROM namespaces").fetchall()]
        return {name: self._load_namespace(name, segments.get(name, [])) for name in names}

    def _load_namespace(self, namespace: str, segments: "list[tuple[Any, ...]]") -> Snapshot:
        alive = self.file.keys(namespace)
        views: list[View] = []
        last = 0
        for name, first_key, last_key, mark in segments:
            try:
                view = View.whole(open_segment(self.folder / SEGMENTS / name, self.file.fingerprint, mark))
                views.append(view.without(np.setdiff1d(view.part.keys, alive, assume_unique=True).tolist()))
            except (StoreError, MissingInputError) as error:
                self.notes.append(f"segment {name} was built again: {error.what}")
                views += self._built_again(namespace, name, first_key, last_key)
            last = last_key
        return (*views, View.whole(self._filled(namespace, last, None)))

    def _built_again(self, namespace: str, name: str, first_key: int, last_key: int) -> "list[View]":
        """The segment that takes the place of a damaged one, made from the documents; none when they are all gone."""
        segment = self._filled(namespace, first_key - 1, last_key).segment()
        folder = self.folder / SEGMENTS / f"{self._next_segment():08d}"
        mark = publish_segment(segment, folder, self.file.fingerprint) if len(segment.keys) else ""
        with self.file.transaction(is_write=False) as connection:
            connection.execute("DELETE FROM segments WHERE name = ?", (name,))
            if mark:
                row = (folder.name, namespace, first_key, last_key, mark)
                connection.execute("INSERT INTO segments VALUES (?, ?, ?, ?, ?)", row)
        shutil.rmtree(self.folder / SEGMENTS / name, ignore_errors=True)
        return [View.whole(open_segment(folder, self.file.fingerprint, mark))] if mark else []

    def _filled(self, namespace: str, after: int, last: int | None) -> Delta:
        """A delta of the documents with keys after < key <= last."""
        delta = Delta(self.chunker.width)
        for key, tokens, vectors in self.file.contents(namespace, after, last):
            delta.append(key, chunk_terms(self.chunker.texts(tokens)), vectors)
        return delta

    def verify(self) -> None:
        """Compare everything with everything. Raises StoreError for the first thing that does not fit."""
        with self._lock:
            self._verify_file()
            for namespace, views in self._snapshots.items():
                indexed = np.concatenate([view.alive_keys() for view in views])
                if not np.array_equal(indexed, self.file.keys(namespace)):
                    root = self.folder / SEGMENTS
                    raise StoreError(f"{root} does not fit the documents of {namespace}", "", f"rm -r {root}")
            folders = [v.part.folder for views in self._snapshots.values() for v in views if isinstance(v.part, Segment)]
        for folder in folders:
            if folder is not None and folder.is_dir():  # not merged away since
                files.verify_files(folder, files.read_manifest(folder, "segment")["files"])

    def _verify_file(self) -> None:
        for (problem,) in self._read("PRAGMA integrity_check"):
            if problem != "ok":
                raise StoreError(f"{self.file.path} is damaged", problem, "restore it from a copy")
        sums = "SELECT namespace, count(*), sum(chunks), sum(num_tokens), sum(bytes) FROM documents GROUP BY 1 ORDER BY 1"
        counted = "SELECT * FROM namespaces WHERE documents > 0 ORDER BY name"
        if self._read(sums) != self._read(counted):
            raise StoreError(f"{self.file.path} contradicts itself", "its counts do not fit", "restore it from a copy")
