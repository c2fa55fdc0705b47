"""What a live library searches: immutable segments and a delta that grows, seen through snapshots.

A part (segment or delta) holds documents in the order of their keys: `keys` [documents], `starts` [documents + 1]
(first chunk of each), `lengths` [chunks] (terms in each), and postings of counts. A view is a part with the chunks that are still alive; a snapshot is a tuple of views that
never changes, the delta last. BM25's statistics are counted over a snapshot, so a library that has lived scores as a
fresh one of the same documents does.
Letters: U chunks, T terms, Z embedding width.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from retro_engine.jit import numba
from retro_engine.library.codes import CodedVectors
from retro_engine.retrieval.analyzer import Terms
from retro_engine.retrieval.postings import Postings, joined


@dataclass(frozen=True)
class Segment:
    """A part that never changes."""

    keys: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    inverted: Postings  # the counts of each chunk
    vectors: np.ndarray | None = None  # [U, Z]
    codes: CodedVectors | None = None  # of the vectors, when there are many
    folder: Path | None = None

    def postings(self, hashes: np.ndarray, count: int) -> Postings:
        return self.inverted.of(hashes)

    def chunk_lengths(self, count: int) -> np.ndarray:
        return self.lengths

    def all_vectors(self, count: int) -> np.ndarray | None:
        return self.vectors


class Delta:
    """The newest documents, the terms of each chunk one after another. One writer appends; readers look no further
    than their view's count of chunks, and keep the arrays they have when larger ones take their place."""

    def __init__(self, width: int | None):
        self.keys, self.starts = array("q"), array("i", [0])
        self._hashes, self._counts = np.empty(1024, np.uint64), np.empty(1024, np.uint16)
        self._ends, self._lengths = np.empty(64, np.int64), np.empty(64, np.int32)  # of chunks, as in Terms
        self._vectors = None if width is None else np.empty((64, width), np.float32)
        self.codes = None

    def append(self, keys: Sequence[int], num_chunks: Sequence[int], terms: Terms, vectors: np.ndarray | None) -> None:
        first, end = self.starts[-1], self.starts[-1] + len(terms.ends)
        before = int(self._ends[first - 1]) if first else 0
        self._hashes = _extended(self._hashes, before, terms.hashes)
        self._counts = _extended(self._counts, before, terms.counts)
        self._ends = _extended(self._ends, first, terms.ends + before)
        self._lengths = _extended(self._lengths, first, terms.lengths)
        if self._vectors is not None and vectors is not None:
            self._vectors = _extended(self._vectors, first, vectors)
        for key, count in zip(keys, num_chunks):
            self.keys.append(key)
            self.starts.append(self.starts[-1] + count)
        assert self.starts[-1] == end, (self.starts[-1], end)

    def postings(self, hashes: np.ndarray, count: int) -> Postings:
        return Postings(hashes, *_find(_hash_table(hashes), hashes, self._hashes, self._counts, self._ends, count))

    def chunk_lengths(self, count: int) -> np.ndarray:
        return _frozen(self._lengths[:count])

    def all_vectors(self, count: int) -> np.ndarray | None:
        return None if self._vectors is None else self._vectors[:count]

    def segment(self) -> Segment:
        """The delta as a segment, once nothing is appended any more."""
        count = self.starts[-1]
        num_terms = int(self._ends[count - 1]) if count else 0
        return Segment(
            np.array(self.keys, np.int64),
            np.array(self.starts, np.int32),
            self._lengths[:count],
            Postings.inverted(self._hashes[:num_terms], self._counts[:num_terms], self._ends[:count]),
            self.all_vectors(count),
        )


def _extended(old: np.ndarray, count: int, new: np.ndarray) -> np.ndarray:
    """`old` with `new` after its first `count` rows: itself, or a larger copy."""
    end = count + len(new)
    out = old
    if end > len(old):
        out = np.empty((2 * end, *old.shape[1:]), old.dtype)
        out[:count] = old[:count]
    out[count:end] = new
    return out


@numba.njit(nogil=True, cache=True)
def _hash_table(hashes):  # type: ignore[no-untyped-def]
    """Where each of the hashes is, by its lowest bits; -1 = nowhere."""
    size = 4
    while size < 4 * len(hashes):
        size *= 2
    table = np.full(size, -1, np.int32)
    for term in range(len(hashes)):
        place = np.int64(hashes[term] & np.uint64(size - 1))
        while table[place] >= 0:
            place = (place + 1) & (size - 1)
        table[place] = term
    return table


@numba.njit(nogil=True, cache=True)
def _find(table, wanted, hashes, counts, ends, num_chunks):  # type: ignore[no-untyped-def]
    """The postings of the wanted terms in the first chunks of a delta."""
    last = ends[num_chunks - 1] if num_chunks else 0
    mask = len(table) - 1
    terms = np.empty(last, np.int32)  # of each entry
    sizes = np.zeros(len(wanted) + 1, np.int64)
    for entry in range(last):
        place = np.int64(hashes[entry] & np.uint64(mask))
        while table[place] >= 0 and wanted[table[place]] != hashes[entry]:
            place = (place + 1) & mask
        terms[entry] = table[place]
        if table[place] >= 0:
            sizes[table[place] + 1] += 1
    starts = np.cumsum(sizes)
    cursors = starts.copy()
    found_chunks = np.empty(starts[-1], np.int32)
    found_counts = np.empty(starts[-1], np.uint16)
    entry = 0
    for chunk in range(num_chunks):
        while entry < ends[chunk]:
            term = terms[entry]
            if term >= 0:
                found_chunks[cursors[term]] = chunk
                found_counts[cursors[term]] = counts[entry]
                cursors[term] += 1
            entry += 1
    return starts[:-1], starts[1:], found_chunks, found_counts


def _frozen(values: np.ndarray) -> np.ndarray:
    """Contiguous and read-only, as a memory-mapped segment's arrays are: numba compiles its loops once."""
    values = np.ascontiguousarray(values)
    values.setflags(write=False)
    return values


@dataclass(frozen=True)
class View:
    """The chunks of a part that a snapshot sees."""

    part: Segment | Delta
    alive: np.ndarray  # [U] bool
    num_alive: int
    num_terms: int  # in the chunks that are alive

    @classmethod
    def whole(cls, part: Segment | Delta) -> "View":
        count = int(part.starts[-1])
        return cls(part, _frozen(np.ones(count, bool)), count, int(part.chunk_lengths(count).sum(dtype=np.int64)))

    def document(self, chunk: int) -> tuple[int, int]:
        """Key of a chunk's document, and the chunk's number in it."""
        place = bisect_right(self.part.starts, chunk) - 1
        return int(self.part.keys[place]), chunk - int(self.part.starts[place])

    def is_last(self, chunk: int) -> bool:
        """Whether its document ends with it."""
        starts = self.part.starts
        return int(starts[bisect_right(starts, chunk)]) == chunk + 1

    def without(self, keys: Sequence[int]) -> "View":
        """The view after some documents died, wherever they were."""
        ranges = []
        for key in keys:
            place = bisect_left(self.part.keys, key)
            if place < len(self.part.keys) and self.part.keys[place] == key:
                ranges.append((int(self.part.starts[place]), int(self.part.starts[place + 1])))
        if not ranges:
            return self
        alive = self.alive.copy()
        for first, last in ranges:
            alive[first:last] = False
        lengths = self.part.chunk_lengths(len(alive))
        num_dead_terms = int(lengths[self.alive & ~alive].sum(dtype=np.int64))
        return replace(
            self, alive=_frozen(alive), num_alive=int(alive.sum()), num_terms=self.num_terms - num_dead_terms
        )

    def only(self, keys: np.ndarray) -> "View":
        """The view of some documents alone, by their keys, wherever they are."""
        starts = np.array(self.part.starts[:], np.int64)  # a copy first: a writer cannot append while numpy looks at it
        is_kept = np.isin(np.array(self.part.keys[: len(starts) - 1], np.int64), keys)
        alive = self.alive & np.repeat(is_kept, np.diff(starts))[: len(self.alive)]
        lengths = self.part.chunk_lengths(len(alive))
        return replace(
            self, alive=_frozen(alive), num_alive=int(alive.sum()), num_terms=int(lengths[alive].sum(dtype=np.int64))
        )

    def grown(self) -> "View":
        """The view of a delta after documents were appended."""
        old, count = len(self.alive), int(self.part.starts[-1])
        alive = np.ones(count, bool)
        alive[:old] = self.alive
        num_terms = self.num_terms + int(self.part.chunk_lengths(count)[old:].sum(dtype=np.int64))
        return View(self.part, _frozen(alive), self.num_alive + count - old, num_terms)

    def alive_keys(self) -> np.ndarray:
        starts = np.array(self.part.starts, np.int64)
        return np.array(self.part.keys, np.int64)[self.alive[starts[:-1]]]


Snapshot = tuple[View, ...]


def tail_to_merge(snapshot: Snapshot, is_all: bool = False) -> int:
    """The first of the views that become one segment.

    Deltas do always (of a merge that failed there are several); a segment when those after it together are more than
    half as large, or when it is mostly dead.
    """
    first, size = len(snapshot) - 1, snapshot[-1].num_alive
    for place in reversed(range(len(snapshot) - 1)):
        view = snapshot[place]
        is_mostly_dead = 2 * view.num_alive < len(view.alive)
        if is_all or isinstance(view.part, Delta) or view.num_alive < 2 * size or is_mostly_dead:
            first, size = place, sum(other.num_alive for other in snapshot[place:])
    return first


def merge_views(views: Sequence[View]) -> Segment:
    """One segment of the chunks that are alive: byte for byte what their documents alone would make."""
    parts = [view.part.segment() if isinstance(view.part, Delta) else view.part for view in views]
    keys: list[np.ndarray] = []
    starts: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    renumbered: list[np.ndarray] = []
    vectors: list[np.ndarray] = []
    num_chunks = 0
    for view, part in zip(views, parts):
        is_alive = view.alive[part.starts[:-1]]
        numbers = np.cumsum(view.alive, dtype=np.int64) - 1 + num_chunks
        keys.append(part.keys[is_alive])
        starts.append(numbers[part.starts[:-1][is_alive]])
        lengths.append(part.lengths[view.alive])
        renumbered.append(np.where(view.alive, numbers, -1).astype(np.int32))
        rows = part.all_vectors(len(view.alive))
        if rows is not None:
            vectors.append(rows[view.alive])
        num_chunks += view.num_alive
    return Segment(
        np.concatenate(keys),
        np.concatenate([*starts, [num_chunks]]).astype(np.int32),
        np.concatenate(lengths),
        joined([part.inverted for part in parts], renumbered),
        np.concatenate(vectors) if vectors else None,
    )
