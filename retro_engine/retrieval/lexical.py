"""The published BM25 index of a store: blocks of 65,536 chunks are counted apart, and merged term by term.

`analyzer` reads the terms, those of a document's title with each of its chunks; `bm25` scores and searches the
`postings`, whose values are scores with the idf of this store. Reads and writes
INDEX/manifest.json and five .npy files whose hashes the manifest has, opened memory-mapped; an index of version 1 has
vocabulary.json, the words themselves, instead of terms.npy. Letters: Q queries, U chunks, K neighbors.
"""

import io
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.data import files
from retro_engine.data.store import Store
from retro_engine.errors import MissingInputError, OutOfResourceError, StoreError, UsageError
from retro_engine.jit import numba
from retro_engine.progress import Reporter
from retro_engine.retrieval import analyzer_loops, bm25
from retro_engine.retrieval.analyzer import FIRST, Analyzer, code_points, from_json, titled
from retro_engine.retrieval.bm25_search import search
from retro_engine.retrieval.executor import Executor, Piece, Stage, Stream, is_finished, remove_shards, run_stage
from retro_engine.retrieval.left_out import LeftOut
from retro_engine.retrieval.postings import Postings, do_fit, joined

ARRAYS = {"scores": "<f4", "chunks": "<i4", "starts": "<i8", "frequencies": "<i8"}
OUTPUTS = ("terms.npy", *(f"{name}.npy" for name in ARRAYS))
BLOCK_ROWS = 1 << 16
TEXT_ROWS = 1 << 13  # texts read at once
MERGE_POSTINGS = 1 << 22  # postings (a chunk that has a term) sorted at once
BLOCK_HEADER = 3  # i8: terms, postings, chunks


class Bm25Index:
    """BM25 scores of every term and chunk, by term; opened memory-mapped."""

    def __init__(self, folder: Path, store: Store):
        """Raises MissingInputError, or StoreError for an index of another store or a damaged one."""
        self.folder, self.store = folder, store
        self.manifest = files.read_manifest(folder, "index")
        store.check_mark(self.manifest["store"], f"{folder} indexes store", f"retro index {store.folder}")
        self.analyzer = from_json(self.manifest.get("analyzer"), str(folder))
        names = OUTPUTS if self.analyzer != FIRST else ("vocabulary.json", *OUTPUTS[1:])
        files.verify_files(folder, self.manifest["files"], needed=names)
        try:
            load = {name: files.map_npy(folder / f"{name}.npy", ARRAYS[name], 1) for name in ARRAYS}
            terms, order = self._read_terms()
        except OutOfResourceError:
            raise
        except (OSError, ValueError) as error:
            raise StoreError(f"{folder} cannot be read", str(error), f"retro index {store.folder}") from error
        self.num_chunks: int = store.num_rows
        starts = np.array(load["starts"])
        self._highest = np.float32(load["scores"].max(initial=0))
        holds = (
            self.manifest["chunks"] == self.num_chunks
            and do_fit(terms, starts, load["chunks"], load["scores"], self.num_chunks)
            and np.array_equal(np.diff(starts), load["frequencies"])
            and 0 <= float(load["scores"].min(initial=0)) <= float(self._highest) < math.inf
        )
        if not holds:
            raise StoreError(f"{folder} contradicts itself", "its arrays do not fit", f"retro index {store.folder}")
        self.postings = Postings(terms, starts[:-1][order], starts[1:][order], load["chunks"], load["scores"])

    def _read_terms(self) -> tuple[np.ndarray, np.ndarray | slice]:
        """The hashes of the terms, ascending, and the number of each in the arrays."""
        if self.analyzer != FIRST:
            return np.array(files.map_npy(self.folder / "terms.npy", "<u8", 1)), slice(None)
        path = self.folder / "vocabulary.json"
        vocabulary = files.read_json(path, 1 << 33)
        if not isinstance(vocabulary, dict) or list(vocabulary.values()) != list(range(len(vocabulary))):
            raise StoreError(f"{path} is damaged", "it does not number its words", f"retro index {self.store.folder}")
        nothing = np.empty(0, np.uint8), np.empty(0, np.uint32)
        hashes = analyzer_loops.hash_words(*code_points(list(vocabulary)), *nothing)
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @classmethod
    def build(
        cls,
        store: Store,
        folder: Path,
        executor: Executor | None = None,
        reporter: Reporter | None = None,
        analyzer: Analyzer | None = None,
    ) -> "Bm25Index":
        """Index every chunk of `store` and publish the index in `folder`; goes on where an earlier build ended.

        An index that is there keeps its reading of words unless `analyzer` is another, or it is of version 1.
        Peak memory: the vocabulary, and a block or 2^22 postings, whichever is more.
        """
        executor, reporter = executor or Executor(), reporter or Reporter("quiet")
        analyzer = analyzer or known_analyzer(folder) or Analyzer()
        blocks = -(-store.num_rows // BLOCK_ROWS)
        described = {"store": store.fingerprint, "k1": bm25.K1, "b": bm25.B, "analyzer": analyzer.to_json()}
        spec = {**described, "block_rows": BLOCK_ROWS}
        text, here = json.dumps(spec, sort_keys=True), folder.resolve()
        paths = (str(store.folder.resolve()),)
        count = Stage("bm25 terms", count_block, text, here, tuple(block_name(n) for n in range(blocks)), paths=paths)
        join = Stage("bm25 merge", merge_blocks, text, folder=here, outputs=OUTPUTS, paths=paths)
        with files.locked(folder):
            if not is_finished(join):
                run_stage(count, executor, reporter)
            hashes = run_stage(join, executor, reporter)
            content = {"retriever": "bm25", "chunks": store.num_rows, **described, "files": hashes}
            known = files.known_manifest(folder, "index")
            if any(known.get(key) != value for key, value in content.items()):
                files.write_manifest(folder, "index", content)
                for name in ("vocabulary.json", "vocabulary.json.ok"):  # of version 1
                    (folder / name).unlink(missing_ok=True)
            remove_shards(count)
        return cls(folder, store)

    def search(
        self,
        texts: Sequence[str],
        k: int,
        exclude: LeftOut | None = None,
        collection: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best chunks of each text: ids [Q, k] (-1 = fewer were found) and scores [Q, k], best first.

        `exclude`: rows that a query must not find. `collection`: the texts' terms, ascending, and their idf in a larger
        collection that scores shall be comparable across.
        """
        if k < 1:
            raise UsageError(f"k={k} cannot be used", "at least one neighbor is searched for")
        terms = self.analyzer.terms(texts, is_query=True)
        found = self.postings.of(terms.hashes)
        weights = np.ones(len(terms.hashes), np.float32)
        if collection is not None:
            here = bm25.idf(found.lasts - found.firsts, self.num_chunks)
            weights = (collection[1][np.searchsorted(collection[0], terms.hashes)] / here).astype(np.float32)
        contents, own = (exclude.contents_N, exclude.own_Q) if exclude is not None else (bm25.NO_CONTENTS,) * 2
        workers = min(numba.get_num_threads(), max(1, len(texts)))
        entries = found.firsts, found.lasts, weights, found.chunks, found.values
        return search(
            terms.ends,
            entries,
            highest=float(self._highest),
            contents=contents,
            own=own,
            num_chunks=self.num_chunks,
            k=k,
            workers=workers,
        )

    def frequencies(self, hashes: np.ndarray) -> np.ndarray:
        """Chunks that hold each term."""
        found = self.postings.of(hashes)
        return found.lasts - found.firsts

    def verify(self) -> None:
        """Compare every file with the manifest (opening has done so too)."""
        files.verify_files(self.folder, self.manifest["files"])

    def summary(self) -> dict[str, Any]:
        shown = {key: self.manifest[key] for key in ("kind", "retriever", "chunks", "store", "fingerprint")}
        read = {
            "words": self.analyzer.describe(),
            "terms": len(self.postings.terms),
            "postings": len(self.postings.chunks),
        }
        return {**shown, **read}


def known_analyzer(folder: Path) -> Analyzer | None:
    """How the index in `folder` reads words; None where there is none, or one of version 1, which is made again."""
    try:
        found = from_json(files.read_manifest(folder, "index").get("analyzer"), str(folder))
    except (MissingInputError, StoreError):
        return None
    return None if found == FIRST else found


def check_analyzers(indexes: Sequence[Bm25Index]) -> None:
    """Raise StoreError when indexes that shall be searched together read words in different ways."""
    for other in indexes[1:]:
        if other.analyzer != indexes[0].analyzer:
            do = f"retro index {other.store.folder} with the --stemmer and --stop-words of the first"
            first_version = next((index for index in (indexes[0], other) if index.analyzer == FIRST), None)
            raise StoreError(
                f"{indexes[0].folder} reads words with {indexes[0].analyzer.describe()}",
                f"{other.folder} with {other.analyzer.describe()}",
                do
                if first_version is None
                else f"retro index {first_version.store.folder}",  # no flags read so any more
            )


def block_name(number: int) -> str:
    return f"block-{number:05d}.bin"


def count_block(stage: Stage, shard: int) -> Sequence[Piece]:
    """How often each term is in each chunk of one block; terms ascending, chunks in order within a term."""
    spec = json.loads(stage.spec)
    store, analyzer = Store(stage.paths[0]), from_json(spec["analyzer"], stage.paths[0])
    first = shard * spec["block_rows"]
    last = min(first + spec["block_rows"], store.num_rows)
    parts = []
    for start in range(first, last, TEXT_ROWS):
        end = min(start + TEXT_ROWS, last)
        texts = [text for batch in store.texts(start, end) for text in batch]
        parts.append(analyzer.terms(titled(row_titles(store, start, end), texts)))
    ends = np.cumsum(np.concatenate([np.diff(part.ends, prepend=0) for part in parts]))
    hashes, counts = (np.concatenate([getattr(part, name) for part in parts]) for name in ("hashes", "counts"))
    postings = Postings.inverted(hashes, counts, ends)
    return [
        np.array([len(postings.terms), len(hashes), last - first], "<i8").tobytes(),
        postings.starts.astype("<i8").tobytes(),
        postings.terms.astype("<u8").tobytes(),
        (postings.chunks + first).astype("<i4").tobytes(),
        postings.values.astype("<i4").tobytes(),
        np.concatenate([part.lengths for part in parts]).astype("<i4").tobytes(),
    ]


def row_titles(store: Store, first: int, last: int) -> list[str]:
    """The title of the document of each of rows first ... last - 1."""
    documents: list[int] = []
    for shard in store.shards:
        rows = shard.arrays["rows"]
        begin, end = max(first - shard.first_row, 0), min(last - shard.first_row, rows.values.shape[0])
        if begin < end:
            rows.check_range(begin, end)
            documents += (rows.values[begin:end, 0].astype(np.int64) + shard.first_document).tolist()
    known = {number: store.name(number)[1] for number in set(documents)}
    return [known[number] for number in documents]


class Block:
    """A counted block, memory-mapped."""

    def __init__(self, path: Path, first: int):
        raw = files.mapped(path)
        num_terms, postings, rows = raw[: 8 * BLOCK_HEADER].view("<i8").tolist()
        ends = np.cumsum([8 * BLOCK_HEADER, 8 * (num_terms + 1), 8 * num_terms, 4 * postings, 4 * postings, 4 * rows])
        parts = [raw[start:end] for start, end in zip(ends, ends[1:])]
        self.first, self.starts, self.terms = first, parts[0].view("<i8"), parts[1].view("<u8")
        self.chunks, self.counts, self.lengths = (part.view("<i4") for part in parts[2:])

    def scored(self, terms: np.ndarray, idf: np.ndarray, average: float) -> Postings:
        """The postings of some terms, all between the first and the last of them, with scores."""
        low, high = np.searchsorted(self.terms, terms[0]), np.searchsorted(self.terms, terms[-1], "right")
        starts, held = self.starts[low : high + 1], self.terms[low:high]
        some = slice(int(starts[0]), int(starts[-1]))
        chunks, tf = self.chunks[some], self.counts[some].astype(np.float64)
        idf = np.repeat(idf[np.searchsorted(terms, held)], np.diff(starts))
        scores = bm25.term_score(idf, tf, self.lengths[chunks - self.first], average).astype(np.float32)
        return Postings(held, starts[:-1] - some.start, starts[1:] - some.start, chunks, scores)


class Merger:
    """The blocks of a store with one vocabulary; postings stream through in the order of its terms."""

    def __init__(self, folder: Path, spec: dict[str, Any], num_rows: int):
        starts = range(0, num_rows, spec["block_rows"])
        self.blocks = [Block(folder / block_name(number), first) for number, first in enumerate(starts)]
        self.vocabulary = np.empty(0, np.uint64)
        for block in self.blocks:
            self.vocabulary = np.union1d(self.vocabulary, block.terms)
        self.frequencies = np.zeros(len(self.vocabulary), np.int64)
        for block in self.blocks:
            self.frequencies[np.searchsorted(self.vocabulary, block.terms)] += np.diff(block.starts)
        self.starts = np.concatenate(([0], np.cumsum(self.frequencies)))
        self.average = sum(int(block.lengths.sum()) for block in self.blocks) / max(1, num_rows)
        self.idf = bm25.idf(self.frequencies, num_rows)

    def postings(self) -> Iterator[Postings]:
        """All postings with their scores, some terms at a time."""
        term = 0
        while term < len(self.vocabulary):
            end = int(np.searchsorted(self.starts, self.starts[term] + MERGE_POSTINGS, "right")) - 1
            some = slice(term, max(end, term + 1))
            scored = [block.scored(self.vocabulary[some], self.idf[some], self.average) for block in self.blocks]
            yield joined(scored, [np.empty(0, np.int32)] * len(scored))  # chunks are the store's in every block
            term = some.stop


@lru_cache(1)
def _open_merger(folder: Path, spec: str, num_rows: int) -> Merger:
    return Merger(folder, json.loads(spec), num_rows)


def merge_blocks(stage: Stage, shard: int) -> Sequence[Piece] | Stream:
    """One file of the index from all blocks."""
    merger = _open_merger(stage.folder, stage.spec, Store(stage.paths[0]).num_rows)
    name = stage.outputs[shard]
    if name == "terms.npy":
        return [_npy_header("<u8", len(merger.vocabulary)), merger.vocabulary.astype("<u8").tobytes()]
    if name in ("starts.npy", "frequencies.npy"):
        values = merger.starts if name == "starts.npy" else merger.frequencies
        return [_npy_header("<i8", len(values)), values.astype("<i8").tobytes()]
    count, is_chunks = int(merger.starts[-1]), name == "chunks.npy"
    header = _npy_header("<i4" if is_chunks else "<f4", count)
    pieces = ((some.chunks if is_chunks else some.values).tobytes() for some in merger.postings())
    return Stream(len(header) + 4 * count, itertools.chain([header], pieces))


def _npy_header(descr: str, count: int) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": (count,)})
    return buffer.getvalue()
