"""The index of an open library: each namespace's snapshot, and the thread that makes segments of deltas.

A segment's folder is published first, then named in the library's file in the transaction that forgets those it
replaces: a kill leaves a folder that nothing names, removed when the library is next opened. Segments cover ranges of
keys that ascend, the delta all keys after them, so what is in the file says what belongs where.
"""

import shutil
import threading
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from retro_engine.errors import MissingInputError, RetroError, StoreError
from retro_engine.retrieval.library_documents import Batch, Chunker, num_chunks
from retro_engine.retrieval.library_file import LibraryFile
from retro_engine.retrieval.library_index import (
    Delta,
    Segment,
    Snapshot,
    View,
    merge,
    tail_to_merge,
)
from retro_engine.retrieval.library_segments import open_segment, publish_segment
from retro_engine.retrieval.library_terms import terms_of

SEGMENTS = "segments"
READ_DOCUMENTS = 256  # read at once when the index is made from documents
SegmentRow = tuple[str, str, int, int, str]  # name, namespace, first key, last key, fingerprint


class LibraryIndex:
    """Snapshots are read without a lock; they are replaced by whoever holds the library's."""

    def __init__(self, file: LibraryFile, chunker: Chunker, delta_chunks: int, lock: "threading.RLock"):
        self.file, self.chunker, self.delta_chunks = file, chunker, delta_chunks
        self.folder = file.path.parent / SEGMENTS
        self.notes: list[str] = []  # what was mended while opening, and merges that failed
        self._lock = lock
        self._merge_lock = threading.Lock()
        self._wake = threading.Event()
        self._is_stopping = False
        self.snapshots: dict[str, Snapshot] = {}
        self.load()
        self._thread = threading.Thread(target=self._merge_when_due, name="library-merge", daemon=True)

    def start(self) -> None:
        self._wake.set()
        self._thread.start()

    def stop(self) -> None:
        """End the background merges, and let go of the segments' files. The caller does not hold the lock."""
        self._is_stopping = True
        self._wake.set()
        self._thread.join()
        self.snapshots = {}

    def show(self, namespace: str, dead: Sequence[int], keys: Sequence[int], batch: Batch | None) -> None:
        """Publish a snapshot without the dead keys and with the new documents."""
        old = self.snapshots.get(namespace) or (self._empty_delta(),)
        views = [view.without(dead) for view in old] if dead else list(old)
        delta = views[-1].part
        assert isinstance(delta, Delta), "a snapshot ends with its delta"
        if batch is not None:
            delta.append(keys, batch.num_chunks, batch.terms, batch.vectors)
        views[-1] = views[-1].grown()
        self.snapshots = {**self.snapshots, namespace: tuple(views)}
        if len(views[-1].alive) >= self.delta_chunks:
            self._wake.set()

    def forget(self, namespaces: Sequence[str]) -> None:
        """Publish that these hold nothing; their segments are named by nothing any more."""
        gone = [view.part for name in namespaces for view in self.snapshots.get(name, ())]
        self.snapshots = {name: views for name, views in self.snapshots.items() if name not in namespaces}
        _remove_folders(gone)

    def parts(self, namespace: str) -> dict[str, Any]:
        views = self.snapshots.get(namespace, ())
        return {
            "segments": [view.num_alive for view in views[:-1]],
            "delta": views[-1].num_alive if views else 0,
            "dead": sum(len(view.alive) - view.num_alive for view in views),
        }

    def _empty_delta(self) -> View:
        return View.whole(Delta(self.chunker.width))

    # Merging

    def merge_all(self, is_all: bool = False) -> None:
        """Make segments of the deltas now; `is_all`: one of each namespace."""
        for namespace in list(self.snapshots):
            self._merge(namespace, is_all, min_chunks=1)

    def _merge_when_due(self) -> None:
        while not self._is_stopping:
            self._wake.wait()
            self._wake.clear()
            try:
                for namespace in list(self.snapshots):
                    if not self._is_stopping:
                        self._merge(namespace, False, self.delta_chunks)
            except RetroError as error:  # a full disk, say: the delta serves, and the next write tries again
                note = f"merge failed: {error.what}"
                if self.notes[-1:] != [note]:
                    self.notes.append(note)

    def _merge(self, namespace: str, is_all: bool, min_chunks: int) -> None:
        with self._merge_lock:
            with self._lock:
                views = self.snapshots.get(namespace, ())
                has_dead = any(view.num_alive < len(view.alive) for view in views)
                is_due = bool(views) and (
                    len(views[-1].alive) >= min_chunks or (is_all and (len(views) > 2 or has_dead))
                )
                if not is_due:
                    return
                first = tail_to_merge(views, is_all)
                self.snapshots = {**self.snapshots, namespace: (*views, self._empty_delta())}
            inputs = views[first:]
            merged, row = self._publish(namespace, merge(inputs)) if any(v.num_alive for v in inputs) else (None, None)
            with self._lock:
                current = self.snapshots.get(namespace, ())
                replaced, after = current[first : first + len(inputs)], current[first + len(inputs) :]
                if [id(view.part) for view in replaced] != [id(view.part) for view in inputs]:  # a reset came between
                    _remove_folders([merged] if merged else [])
                    return
                self._name(row, [view.part for view in replaced])
                views = current[:first]
                if merged is not None:
                    alive = np.concatenate([view.alive_keys() for view in replaced])
                    died = np.setdiff1d(merged.keys, alive, assume_unique=True).tolist()
                    views = (*views, View.whole(merged).without(died))
                self.snapshots = {**self.snapshots, namespace: (*views, *after)}
                _remove_folders([view.part for view in replaced])

    def _publish(self, namespace: str, segment: Segment) -> tuple[Segment, SegmentRow]:
        """Write a segment, and open what was written."""
        numbers = [int(path.name) for path in self.folder.iterdir()] if self.folder.is_dir() else []
        folder = self.folder / f"{1 + max(numbers, default=0):08d}"
        try:
            mark = publish_segment(segment, folder, self.file.fingerprint)
        except RetroError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        row = (folder.name, namespace, int(segment.keys[0]), int(segment.keys[-1]), mark)
        return open_segment(folder, self.file.fingerprint, mark), row

    def _name(self, row: SegmentRow | None, replaced: Sequence[Segment | Delta]) -> None:
        """Write down a new segment in place of others."""
        with self.file.transaction(is_write=False) as connection:
            for part in replaced:
                if isinstance(part, Segment) and part.folder is not None:
                    connection.execute("DELETE FROM segments WHERE name = ?", (part.folder.name,))
            if row is not None:
                connection.execute("INSERT INTO segments VALUES (?, ?, ?, ?, ?)", row)

    # Opening

    def load(self) -> None:
        """Every namespace's snapshot, from the segments there are and the documents that are in none."""
        rows: list[Any] = self.file.writer.execute("SELECT * FROM segments ORDER BY first_key").fetchall()
        names = {row[0] for row in rows}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name not in names:  # of a merge that was killed
                shutil.rmtree(path, ignore_errors=True)
        names_there: list[Any] = self.file.writer.execute("SELECT name FROM namespaces").fetchall()
        self.snapshots = {
            name: self._load_one(name, [row for row in rows if row[1] == name]) for (name,) in names_there
        }

    def _load_one(self, namespace: str, rows: Sequence[SegmentRow]) -> Snapshot:
        alive = self.file.keys(namespace)
        views: list[View] = []
        for row in rows:
            segment = self._open(row)
            if segment is not None:
                died = np.setdiff1d(segment.keys, alive, assume_unique=True).tolist()
                views.append(View.whole(segment).without(died))
        return (*views, View.whole(self._filled(namespace, rows[-1][3] if rows else 0, None)))

    def _open(self, row: SegmentRow) -> Segment | None:
        """A segment; one that is damaged is made again from its documents, None when they are all gone."""
        name, namespace, first_key, last_key, mark = row
        try:
            return open_segment(self.folder / name, self.file.fingerprint, mark)
        except (StoreError, MissingInputError) as error:
            self.notes.append(f"segment {name} was made again: {error.what}")
        delta = self._filled(namespace, first_key - 1, last_key)
        segment, new = self._publish(namespace, delta.segment()) if delta.keys else (None, None)
        with self.file.transaction(is_write=False) as connection:
            connection.execute("DELETE FROM segments WHERE name = ?", (name,))
            if new is not None:
                row = (new[0], namespace, first_key, last_key, new[4])
                connection.execute("INSERT INTO segments VALUES (?, ?, ?, ?, ?)", row)
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return segment

    def _filled(self, namespace: str, after: int, last: int | None) -> Delta:
        """A delta of the documents with keys after < key <= last."""
        delta = Delta(self.chunker.width)
        rows = self.file.contents(namespace, after, last)
        while batch := list(islice(rows, READ_DOCUMENTS)):
            keys, tokens, vectors = zip(*batch)
            counts = [num_chunks(len(ids), self.chunker.chunk_size, self.chunker.stride) for ids in tokens]
            terms = terms_of(self.chunker.texts(tokens)[1])
            delta.append(keys, counts, terms, None if vectors[0] is None else np.concatenate(vectors))
        return delta


def _remove_folders(parts: Sequence[Segment | Delta]) -> None:
    """Remove segments that nothing names any more; searches that still read them keep them mapped."""
    for part in parts:
        if isinstance(part, Segment) and part.folder is not None:
            shutil.rmtree(part.folder, ignore_errors=True)  # what stays is removed when the library is opened
