"""The index of an open library: each namespace's snapshot, and the thread that makes segments of deltas.

A segment's folder is published first, then named in the library's file in the transaction that forgets those it
replaces: a kill leaves a folder that nothing names, removed when the library is next opened for writing. Segments cover
ranges of keys that ascend, the delta all keys after them, so what is in the file says what belongs where. The file may be
anybody's: only names of eight digits are a segment's, and a name that is not is never opened or removed.
"""

import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np

from retro_engine.data import files
from retro_engine.errors import MissingInputError, RetroError, StoreError, UnavailableError
from retro_engine.library.documents import Chunker, Prepared, num_chunks
from retro_engine.library.file import LibraryFile
from retro_engine.library.segment_files import open_segment, publish_segment
from retro_engine.library.segments import (
    Delta,
    Segment,
    Snapshot,
    View,
    merge_views,
    tail_to_merge,
)

SEGMENTS = "segments"
SEGMENT_NAME = re.compile(r"[0-9]{8}")
FINGERPRINT = re.compile(r"[0-9a-f]{64}")
READ_DOCUMENTS = 256  # read at once when the index is made from documents
SHOWN_S = 60.0  # from a write's commit to its snapshot: longer only where a damaged index is made again
MAX_NOTES = 100
LAST = 10**8  # names of segments count up to here, then again from 1
LARGEST_KEY = (1 << 63) - 1
SegmentRow = tuple[str, str, int, int, str]  # name, namespace, first key, last key, fingerprint


@dataclass(frozen=True)
class Shown:
    """What is seen at one time. Replaced as a whole: no version is known before its documents are found."""

    version: int
    snapshots: dict[str, Snapshot]  # by namespace


class LibraryIndex:
    """Snapshots are read without a lock; they are replaced by whoever holds the library's."""

    def __init__(self, file: LibraryFile, chunker: Chunker, delta_chunks: int, lock: "threading.RLock"):
        self.file, self.chunker, self.delta_chunks = file, chunker, delta_chunks
        self.folder = file.path.parent / SEGMENTS
        files.own_folder(self.folder)
        self.notes: list[str] = []  # what was mended while opening, and merges that failed
        self.failure = ""  # why nothing is merged any more
        self._lock = lock
        self._merge_lock = threading.Lock()
        self._wake = threading.Event()
        self._is_stopping = False
        self._changed = threading.Condition()
        self.shown = Shown(0, {})
        self.load()
        self._thread = threading.Thread(target=self._merge_when_due, name="library-merge", daemon=True)

    @property
    def snapshots(self) -> dict[str, Snapshot]:
        return self.shown.snapshots

    def _show(self, snapshots: dict[str, Snapshot], version: int | None = None) -> None:
        """Replace what is seen; without a version it is the same documents in other segments."""
        with self._changed:
            self.shown = Shown(self.shown.version if version is None else version, snapshots)
            self._changed.notify_all()

    def wait_for(self, version: int) -> None:
        """Until what is on the disk in this version is seen too: its writer is between the two, for milliseconds."""
        if self.shown.version >= version:
            return
        with self._changed:
            if not self._changed.wait_for(lambda: self.shown.version >= version or self._is_stopping, SHOWN_S):
                raise UnavailableError("the index is behind the documents", f"for {SHOWN_S:.0f} s", "ask again")

    def start(self) -> None:
        """Begin to merge; a library that is only read has nothing to merge."""
        if not self.file.is_read_only:
            self._wake.set()
            self._thread.start()

    def stop(self) -> None:
        """End the background merges, and let go of the segments' files. The caller does not hold the lock."""
        self._is_stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        self._show({})

    def show(
        self, version: int, namespace: str, dead: Sequence[int], keys: Sequence[int], batch: Prepared | None
    ) -> None:
        """Publish a snapshot without the dead keys and with the new documents, and with it the version."""
        old = self.snapshots.get(namespace) or (self._empty_delta(),)
        views = [view.without(dead) for view in old] if dead else list(old)
        delta = views[-1].part
        assert isinstance(delta, Delta), "a snapshot ends with its delta"
        if batch is not None:
            delta.append(keys, batch.num_chunks, batch.terms, batch.vectors)
        views[-1] = views[-1].grown()
        self._show({**self.snapshots, namespace: tuple(views)}, version)
        if len(views[-1].alive) >= self.delta_chunks:
            self._wake.set()

    def forget(self, version: int, namespaces: Sequence[str]) -> None:
        """Publish that these hold nothing; their segments are named by nothing any more."""
        gone = [view.part for name in namespaces for view in self.snapshots.get(name, ())]
        self._show({name: views for name, views in self.snapshots.items() if name not in namespaces}, version)
        self._remove(gone)

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
                self._note(f"merge failed: {error.what}")
            except OSError as error:
                self._note(f"merge failed: {error}")
            except BaseException as error:  # a bug: searches go on, and it is said where a user looks
                self.failure = f"the merging thread died: {type(error).__name__}: {error}"
                self._note(self.failure)
                raise

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
                self._show({**self.snapshots, namespace: (*views, self._empty_delta())})
            inputs = views[first:]
            merged, row = (
                self._publish(namespace, merge_views(inputs)) if any(v.num_alive for v in inputs) else (None, None)
            )
            with self._lock:
                current = self.snapshots.get(namespace, ())
                replaced, after = current[first : first + len(inputs)], current[first + len(inputs) :]
                if [id(view.part) for view in replaced] != [id(view.part) for view in inputs]:  # a reset came between
                    self._remove([merged] if merged else [])
                    return
                self._name(row, [view.part for view in replaced])
                views = current[:first]
                if merged is not None:
                    alive = np.concatenate([view.alive_keys() for view in replaced])
                    died = np.setdiff1d(merged.keys, alive, assume_unique=True).tolist()
                    views = (*views, View.whole(merged).without(died))
                self._show({**self.snapshots, namespace: (*views, *after)})
                self._remove([view.part for view in replaced])

    def _publish(self, namespace: str, segment: Segment) -> tuple[Segment, SegmentRow]:
        """Write a segment, and open what was written."""
        with self.file.reader() as connection:
            named = {row[0] for row in self.file.typed(connection.execute("SELECT name FROM segments"), str)}
        taken = {int(name) for name in self._names() | named if SEGMENT_NAME.fullmatch(name)}
        number = next(n for n in count(1 + max(taken, default=0)) if n % LAST and n % LAST not in taken) % LAST
        folder = self.folder / f"{number:08d}"
        try:
            mark = publish_segment(segment, folder, self.file.fingerprint)
        except (RetroError, MemoryError):
            files.remove_folder(self.folder, folder.name)
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
        connection = self.file.writer
        rows = self.file.typed(
            connection.execute("SELECT * FROM segments ORDER BY first_key, last_key"), str, str, int, int, str
        )
        if not self.file.is_read_only:
            for name in self._names() - {row[0] for row in rows}:  # of a merge that was killed
                files.remove_folder(self.folder, name)
        names_there = self.file.typed(connection.execute("SELECT name FROM namespaces"), str)
        self._show(
            {name: self._load_one(name, [row for row in rows if row[1] == name]) for (name,) in names_there},
            self.file.version(),
        )

    def _names(self) -> set[str]:
        """The segments' folders; other things that lie there are left alone, and said once."""
        names = set()
        for name in os.listdir(self.folder) if files.own_folder(self.folder) else ():
            if SEGMENT_NAME.fullmatch(name):
                names.add(name)
            else:
                self._note(f"{self.folder / name} is not a segment: it is left alone")
        return names

    def _note(self, note: str) -> None:
        if note not in self.notes and len(self.notes) < MAX_NOTES:
            self.notes.append(note)

    def _load_one(self, namespace: str, rows: Sequence[SegmentRow]) -> Snapshot:
        """Every living document is in one of the views, in the order of keys, whatever the table of segments says."""
        alive = self.file.keys(namespace)
        views: list[View] = []
        last = 0
        for row in rows:
            part = self._open(row, last)
            if part is None or not len(part.keys):
                continue
            views += self._between(namespace, alive, last, int(part.keys[0]) - 1)
            died = np.setdiff1d(part.keys, alive, assume_unique=True).tolist()
            views.append(View.whole(part).without(died))
            last = int(part.keys[-1])
        return (*views, View.whole(self._filled(namespace, last, None)))

    def _between(self, namespace: str, alive: np.ndarray, after: int, last: int) -> list[View]:
        """The documents between two segments, where the table of segments has lost them."""
        first, end = np.searchsorted(alive, (after, last), "right")
        return [View.whole(self._filled(namespace, after, last))] if first < end else []

    def _open(self, row: SegmentRow, after: int) -> Segment | Delta | None:
        """A segment of keys above `after`; one that is damaged is made again from its documents, None when they are
        all gone. Of a library that is only read they are then searched as a delta.
        """
        name, namespace, first_key, last_key, mark = row
        try:
            _check_row(row, after)
            segment = open_segment(files.child(self.folder, name), self.file.fingerprint, mark)
            if first_key <= segment.keys[0] and segment.keys[-1] <= last_key:
                return segment
            raise StoreError(f"{self.folder / name} has other documents", "the library names their keys")
        except (StoreError, MissingInputError) as error:
            made = "is damaged, its documents are searched one by one" if self.file.is_read_only else "was made again"
            self._note(f"segment {name!s:.20} {made}: {error.what}")
        after, last_key = max(after, first_key - 1), min(last_key, LARGEST_KEY)
        delta = self._filled(namespace, after, last_key) if after < last_key else Delta(self.chunker.width)
        if self.file.is_read_only:
            return delta
        made_again, new = self._publish(namespace, delta.segment()) if delta.keys else (None, None)
        with self.file.transaction(is_write=False) as connection:
            connection.execute("DELETE FROM segments WHERE name = ?", (name,))
            if new is not None:
                connection.execute("INSERT INTO segments VALUES (?, ?, ?, ?, ?)", new)
        if SEGMENT_NAME.fullmatch(name):
            files.remove_folder(self.folder, name)
        return made_again

    def _remove(self, parts: Sequence[Segment | Delta]) -> None:
        """Remove segments that nothing names any more; searches that still read them keep them mapped."""
        for part in parts:
            if isinstance(part, Segment) and part.folder is not None:
                files.remove_folder(self.folder, part.folder.name)  # what stays is removed at the next opening

    def _filled(self, namespace: str, after: int, last: int | None) -> Delta:
        """A delta of the documents with keys after < key <= last."""
        delta = Delta(self.chunker.width)
        rows = self.file.contents(namespace, after, last)
        while batch := list(islice(rows, READ_DOCUMENTS)):
            keys, titles, tokens, vectors = zip(*batch)
            counts = [num_chunks(len(ids), self.chunker.chunk_size, self.chunker.stride) for ids in tokens]
            terms = self.chunker.terms(titles, counts, self.chunker.texts(tokens)[1])
            delta.append(keys, counts, terms, None if vectors[0] is None else np.concatenate(vectors))
        return delta


def _check_row(row: SegmentRow, after: int) -> None:
    """Raises StoreError for a row of the table of segments that this program has not written."""
    name, _, first_key, last_key, mark = row
    if not SEGMENT_NAME.fullmatch(name):
        raise StoreError(f"the name {name!r:.80} is not a segment's", "it has eight digits")
    if not after < first_key <= last_key <= LARGEST_KEY or not FINGERPRINT.fullmatch(mark):
        raise StoreError(f"segment {name} is said to have keys {first_key} ... {last_key}", f"after {after}")
