"""BM25 over the chunks of a store: blocks of 65,536 chunks are counted apart, merged term by term, searched by numba.

`analyzer` reads the terms, those of a document's title with each of its chunks. bm25s' own index needs the whole corpus
in memory and its search cannot leave out the query's own document while it scores (asking for more and filtering
afterwards would need hundreds), nor weigh terms by the document frequencies of several stores together. Reads and writes
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
from retro_engine.errors import MissingInputError, StoreError, UsageError
from retro_engine.jit import numba
from retro_engine.progress import Reporter
from retro_engine.retrieval import analyzer_loops
from retro_engine.retrieval.analyzer import FIRST, Analyzer, Terms, code_points, from_json, titled
from retro_engine.retrieval.executor import Executor, Part, Stage, Stream, is_finished, remove_shards, run_stage
from retro_engine.retrieval.left_out import LeftOut

ARRAYS = {"scores": "<f4", "chunks": "<i4", "starts": "<i8", "frequencies": "<i8"}
OUTPUTS = ("terms.npy", *(f"{name}.npy" for name in ARRAYS))
K1, B = 1.5, 0.75
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
        if self.manifest["store"] != store.fingerprint:
            raise StoreError(
                f"{folder} indexes store {self.manifest['store'][:12]}",
                f"{store.folder} is {store.fingerprint[:12]}",
                f"retro index {store.folder}",
            )
        terms_file = "terms.npy" if "analyzer" in self.manifest else "vocabulary.json"
        needed = (terms_file, *(f"{name}.npy" for name in ARRAYS))
        files.verify_files(folder, self.manifest["files"], needed=needed)
        try:
            load = {name: files.map_npy(folder / f"{name}.npy", ARRAYS[name], 1) for name in ARRAYS}
            terms, self._numbers = self._read_terms()
        except (OSError, ValueError) as error:
            raise StoreError(f"{folder} cannot be read", str(error), f"retro index {store.folder}") from error
        self.terms = terms  # [terms] u8 hashes, ascending
        self.scores, self.chunks = load["scores"], load["chunks"]
        self.starts, self.frequencies = np.array(load["starts"]), np.array(load["frequencies"])
        self.num_chunks: int = store.num_rows
        self._check()

    def _read_terms(self) -> tuple[np.ndarray, np.ndarray]:
        """The hashes of the terms, ascending, and the number of each in the arrays."""
        self.analyzer = from_json(self.manifest.get("analyzer"), str(self.folder))
        if self.analyzer != FIRST:
            terms = np.array(files.map_npy(self.folder / "terms.npy", "<u8", 1))
            return terms, np.arange(len(terms))
        path = self.folder / "vocabulary.json"
        vocabulary = files.read_json(path, 1 << 33)
        if not isinstance(vocabulary, dict) or list(vocabulary.values()) != list(range(len(vocabulary))):
            raise StoreError(f"{path} is damaged", "it does not number its words", f"retro index {self.store.folder}")
        words = list(vocabulary)
        nothing = np.empty(0, np.uint8), np.empty(0, np.uint32)
        hashes = analyzer_loops.hash_words(*code_points(words), *nothing)
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order

    def _check(self) -> None:
        """Everything that the search loop takes for granted: numba checks no bounds."""
        terms = len(self.terms)
        holds = (
            self.manifest["chunks"] == self.num_chunks
            and len(self.scores) == len(self.chunks)
            and (len(self.starts), len(self.frequencies)) == (terms + 1, terms)
            and self.starts[0] == 0
            and self.starts[-1] == len(self.scores)
            and np.array_equal(np.diff(self.starts), self.frequencies)
            and bool((self.frequencies >= 0).all())
            and 0 <= float(self.scores.min(initial=0)) <= float(self.scores.max(initial=0)) < math.inf
            and (not len(self.chunks) or (int(self.chunks.min()) >= 0 and int(self.chunks.max()) < self.num_chunks))
            and bool((self.terms[1:] > self.terms[:-1]).all())
        )
        if not holds:
            raise StoreError(
                f"{self.folder} contradicts itself", "its arrays do not fit", f"retro index {self.store.folder}"
            )

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
        described = {"store": store.fingerprint, "k1": K1, "b": B, "analyzer": analyzer.to_json()}
        spec = {**described, "block_rows": BLOCK_ROWS}
        text, here = json.dumps(spec, sort_keys=True), folder.resolve()
        paths = (str(store.folder.resolve()),)
        count = Stage("bm25 terms", count_block, text, here, tuple(block_name(n) for n in range(blocks)), paths)
        join = Stage("bm25 merge", merge_blocks, text, here, OUTPUTS, paths)
        with files.locked(folder):
            if not is_finished(join):
                run_stage(count, executor, reporter)
            hashes = run_stage(join, executor, reporter)
            content = {"retriever": "bm25", "chunks": store.num_rows, **described, "files": hashes}
            if not _is_published(folder, content):
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
        frequencies: dict[int, int] | None = None,
        num_chunks: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best chunks of each text: ids [Q, k] (-1 = fewer were found) and scores [Q, k], best first.

        `exclude`: rows that a query must not find. `frequencies`, by a term's hash, and `num_chunks`: document
        frequencies and size of a larger collection that scores shall be comparable across.
        """
        if k < 1:
            raise UsageError(f"k={k} cannot be used", "at least one neighbor is searched for")
        terms = self.analyzer.terms(texts, is_query=True)
        numbers, is_known = self._numbers_of(terms.hashes)
        flat = numbers[is_known]
        offsets = np.concatenate(([0], np.concatenate(([0], np.cumsum(is_known)))[terms.ends])).astype(np.int64)
        weights = np.ones(len(flat), np.float32)
        if frequencies is not None and num_chunks is not None:
            for place, (term, mark) in enumerate(zip(flat, terms.hashes[is_known].tolist())):
                here = _idf(int(self.frequencies[term]), self.num_chunks)
                weights[place] = _idf(frequencies[mark], num_chunks) / here
        contents, own = np.empty(0, np.int32), np.empty(0, np.int32)
        if exclude is not None:
            contents, own = exclude.contents_N, exclude.own_Q
        workers = min(numba.get_num_threads(), max(1, len(texts)))
        return _search(
            flat,
            offsets,
            weights,
            contents,
            own,
            self.scores,
            self.chunks,
            self.starts,
            self.num_chunks,
            k,
            workers,
        )

    def _numbers_of(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The number of each term in the arrays, and whether the index has it."""
        places = np.searchsorted(self.terms, hashes)
        is_known = places < len(self.terms)
        places[~is_known] = 0
        if len(self.terms):
            is_known &= self.terms[places] == hashes
        return (self._numbers[places] if len(self.terms) else places), is_known

    def frequencies_of(self, texts: Sequence[str]) -> dict[int, int]:
        """Chunks that hold each term of `texts`, by its hash."""
        hashes = np.unique(self.analyzer.terms(texts, is_query=True).hashes)
        numbers, is_known = self._numbers_of(hashes)
        counts = np.zeros(len(hashes), np.int64)
        counts[is_known] = self.frequencies[numbers[is_known]]
        return dict(zip(hashes.tolist(), counts.tolist()))

    def verify(self) -> None:
        """Compare every file with the manifest (opening has done so too)."""
        files.verify_files(self.folder, self.manifest["files"])

    def summary(self) -> dict[str, Any]:
        shown = {key: self.manifest[key] for key in ("kind", "retriever", "chunks", "store", "fingerprint")}
        read = {"words": self.analyzer.describe(), "terms": len(self.terms), "postings": len(self.scores)}
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


def _is_published(folder: Path, content: dict[str, Any]) -> bool:
    try:
        known = files.read_manifest(folder, "index")
    except MissingInputError:
        return False
    return all(known.get(key) == value for key, value in content.items())


def block_name(number: int) -> str:
    return f"block-{number:05d}.bin"


def count_block(stage: Stage, shard: int) -> Sequence[Part]:
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
    hashes, counts, sizes, lengths = _joined(parts)
    order = np.argsort(hashes, kind="stable")
    terms, starts = np.unique(hashes[order], return_index=True)
    return [
        np.array([len(terms), len(hashes), last - first], "<i8").tobytes(),
        np.append(starts, len(hashes)).astype("<i8").tobytes(),
        terms.astype("<u8").tobytes(),
        np.repeat(np.arange(first, last), sizes)[order].astype("<i4").tobytes(),
        counts[order].astype("<i4").tobytes(),
        lengths.astype("<i4").tobytes(),
    ]


def _joined(parts: Sequence[Terms]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Hashes and counts of all chunks, and of each chunk how many there are, and its length."""
    sizes = [np.diff(part.ends, prepend=0) for part in parts]
    columns = [part.hashes for part in parts], [part.counts for part in parts], sizes, [part.lengths for part in parts]
    return tuple(np.concatenate(column) for column in columns)  # type: ignore[return-value]


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
    """A counted block, memory-mapped; `numbers` gives each of its terms the number in the whole vocabulary."""

    def __init__(self, path: Path, first: int):
        raw = np.memmap(path, np.uint8, "r")
        num_terms, postings, rows = raw[: 8 * BLOCK_HEADER].view("<i8").tolist()
        ends = np.cumsum([8 * BLOCK_HEADER, 8 * (num_terms + 1), 8 * num_terms, 4 * postings, 4 * postings, 4 * rows])
        parts = [raw[start:end] for start, end in zip(ends, ends[1:])]
        self.first, self.starts, self.terms = first, parts[0].view("<i8"), parts[1].view("<u8")
        self.chunks, self.counts, self.lengths = (part.view("<i4") for part in parts[2:])
        self.numbers = np.zeros(0, np.int64)


class Merger:
    """The blocks of a store with one vocabulary; postings stream through in the order of its terms."""

    def __init__(self, folder: Path, spec: dict[str, Any], num_rows: int):
        starts = range(0, num_rows, spec["block_rows"])
        self.k1, self.b, self.num_rows = spec["k1"], spec["b"], num_rows
        self.blocks = [Block(folder / block_name(number), first) for number, first in enumerate(starts)]
        self.vocabulary = np.empty(0, np.uint64)
        for block in self.blocks:
            self.vocabulary = np.union1d(self.vocabulary, block.terms)
        self.frequencies = np.zeros(len(self.vocabulary), np.int64)
        total = 0
        for block in self.blocks:
            block.numbers = np.searchsorted(self.vocabulary, block.terms)
            self.frequencies[block.numbers] += np.diff(block.starts)
            total += int(block.lengths.sum())
        self.starts = np.concatenate(([0], np.cumsum(self.frequencies)))
        self.mean_length = total / max(1, num_rows)

    def postings(self, column: str) -> Iterator[Part]:
        """The `chunks` or `scores` of all postings, some terms at a time."""
        term = 0
        while term < len(self.vocabulary):
            end = int(np.searchsorted(self.starts, self.starts[term] + MERGE_POSTINGS, "right")) - 1
            end = max(end, term + 1)
            chunks, terms, counts, lengths = [], [], [], []
            for block in self.blocks:
                low, high = np.searchsorted(block.numbers, (term, end))
                some = slice(int(block.starts[low]), int(block.starts[high]))
                chunks.append(block.chunks[some])
                terms.append(np.repeat(block.numbers[low:high], np.diff(block.starts[low : high + 1])))
                counts.append(block.counts[some])
                lengths.append(block.lengths[chunks[-1] - block.first])
            number = np.concatenate(terms)
            order = np.argsort(number, kind="stable")  # blocks come in order, so chunks do within a term
            if column == "chunks":
                yield np.concatenate(chunks)[order].astype("<i4").tobytes()
            else:
                tf, length = np.concatenate(counts)[order].astype(np.float64), np.concatenate(lengths)[order]
                df = self.frequencies[number[order]]
                idf = np.log(1 + (self.num_rows - df + 0.5) / (df + 0.5))
                scores = idf * tf / (tf + self.k1 * (1 - self.b + self.b * length / self.mean_length))
                yield scores.astype("<f4").tobytes()
            term = end


@lru_cache(1)
def _open_merger(folder: Path, spec: str, num_rows: int) -> Merger:
    return Merger(folder, json.loads(spec), num_rows)


def merge_blocks(stage: Stage, shard: int) -> Sequence[Part] | Stream:
    """One file of the index from all blocks."""
    merger = _open_merger(stage.folder, stage.spec, Store(stage.paths[0]).num_rows)
    name = stage.outputs[shard]
    if name == "terms.npy":
        return [_npy_header("<u8", len(merger.vocabulary)), merger.vocabulary.astype("<u8").tobytes()]
    if name in ("starts.npy", "frequencies.npy"):
        values = merger.starts if name == "starts.npy" else merger.frequencies
        return [_npy_header("<i8", len(values)), values.astype("<i8").tobytes()]
    column = name.removesuffix(".npy")
    count = int(merger.starts[-1])
    header = _npy_header("<i4" if column == "chunks" else "<f4", count)
    return Stream(len(header) + 4 * count, itertools.chain([header], merger.postings(column)))


def _npy_header(descr: str, count: int) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": (count,)})
    return buffer.getvalue()


def _idf(frequency: int, num_chunks: int) -> float:
    """Lucene's BM25 idf."""
    return math.log(1 + (num_chunks - frequency + 0.5) / (frequency + 0.5))


@numba.njit(parallel=True, cache=True)
def _search(terms, offsets, weights, contents, own, scores, chunks, starts, num_chunks, k, workers):  # type: ignore[no-untyped-def]
    num_queries = len(offsets) - 1
    ids = np.full((num_queries, k), -1, np.int64)
    best = np.zeros((num_queries, k), np.float32)
    for worker in numba.prange(workers):
        total = np.zeros(num_chunks, np.float32)
        for query in range(worker, num_queries, workers):
            for place in range(offsets[query], offsets[query + 1]):
                weight = weights[place]
                for entry in range(starts[terms[place]], starts[terms[place] + 1]):
                    total[chunks[entry]] += weight * scores[entry]
            found = 0
            floor = np.float32(0)  # the worst score kept, once k are kept
            for chunk in range(num_chunks):
                score = total[chunk]
                if score > floor:  # ties keep the lower id: the result does not depend on the order of search
                    if len(contents) and (contents[chunk] < 0 or contents[chunk] == own[query]):
                        continue
                    slot = found if found < k else k - 1
                    while slot > 0 and best[query, slot - 1] < score:
                        best[query, slot] = best[query, slot - 1]
                        ids[query, slot] = ids[query, slot - 1]
                        slot -= 1
                    best[query, slot] = score
                    ids[query, slot] = chunk
                    found = min(found + 1, k)
                    if found == k:
                        floor = best[query, k - 1]
            total[:] = 0
    return ids, best
