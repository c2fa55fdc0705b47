"""Vectors of a store's chunks -> a Faiss index of a kind that fits their number, built in stages that go on where they ended.

Reads EMBEDDINGS (vectors.py); writes INDEX/manifest.json and, but for Flat, whose vectors are the index,
trained.faiss (centroids and codebooks, no vectors) and for every 10^8 chunks one lists-NNNNN.bin (inverted_lists.py).
Parts of 65,536 chunks are made first, each by itself, and then merged list by list; neither holds more than a part.
Factories without inverted lists (HNSW32, PQ16 ...) give one whole-NNNNN.faiss for every 10^8 chunks, built in memory.
Letters: Z embedding width.
"""

import json
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.data import files
from retro_engine.data.store import Store
from retro_engine.errors import StoreError, UsageError
from retro_engine.progress import Reporter
from retro_engine.retrieval import vectors as vectors_module
from retro_engine.retrieval.embed import short_name
from retro_engine.retrieval.executor import Executor, Piece, Stage, Stream, is_finished, remove_shards, run_stage
from retro_engine.retrieval.faiss_factory import (
    METRICS,
    cannot_build,
    clamp_lists,
    factory_for,
    make_faiss,
    num_lists,
    refuse_unreadable,
)
from retro_engine.retrieval.index import VectorIndex
from retro_engine.retrieval.inverted_lists import LISTS_BYTES, ListsFile, read_faiss
from retro_engine.retrieval.vectors import ExactSearch, Vectors, build_vectors

INDEX_ROWS = 10**8  # chunks in one index file
TRAIN_PER_LIST = 40  # training vectors for each list
TRAIN_FLAT = 1 << 16  # training vectors where there are no lists
TWO_LEVELS = 1 << 13  # lists from which on they are found in two levels, sqrt(lists) x sqrt(lists)
TRAIN_SEED = 1234
RECALL_K, RECALL_QUERIES, RECALL_TARGET = 10, 500, 0.95


def build_index(
    store: Store,
    model: str,
    folder: Path,
    factory: str = "auto",
    metric: str = "auto",
    executor: Executor | None = None,
    reporter: Reporter | None = None,
    index_rows: int = INDEX_ROWS,
    **choices: Any,
) -> VectorIndex:
    """The index of a store for an embedder, built where it is missing, unfinished or damaged.

    `factory`: auto, or a Faiss factory string; `metric`: ip, l2, or auto (ip); auto takes an index as it is.
    `choices` are those of `choose_embedding`. Peak memory: the training sample (40 vectors a list) or a part of
    65,536 chunks, whichever is more. Raises StoreError when an index with another factory, metric or embedder lies
    there, UsageError for a factory that cannot be built.
    """
    if metric not in ("auto", *METRICS):
        raise UsageError(f"--metric {metric} cannot be used", f"auto or one of {', '.join(METRICS)}")
    refuse_unreadable(factory)
    reporter, executor = reporter or Reporter("quiet"), executor or Executor()
    vectors = build_vectors(store, model, executor, reporter, **choices)
    known = files.known_manifest(folder, "index")
    metric = known.get("metric", "ip") if metric == "auto" else metric
    by_size = known.get("factory") or factory_for(vectors.num_rows, vectors.width)
    wanted = by_size if factory == "auto" else factory
    chosen = clamp_lists(wanted, vectors.num_rows)
    if chosen != wanted:
        reporter.say(f"{wanted}: {vectors.num_rows:,} chunks are enough for {num_lists(chosen):,} lists only")
    make_faiss(chosen, vectors.width, metric)  # refuses what Faiss does not know
    with files.locked(folder):
        _refuse_other(folder, chosen, metric, vectors, store)
        by: dict[str, Any] = {"executor": executor, "reporter": reporter}
        builder = _Build(store, vectors, folder, factory=chosen, metric=metric, index_rows=index_rows, **by)
        content = {
            "retriever": short_name(model),
            "factory": chosen,
            "metric": metric,
            "store": store.fingerprint,
            "chunks": vectors.num_rows,
            "index_rows": index_rows,
            "embeddings": vectors.fingerprint,
            "embedding": vectors.embedding.to_json(),
            "files": builder.files(),
        }
        if any(known.get(key) != value for key, value in content.items()):
            draft = VectorIndex.__new__(VectorIndex)
            draft._open(folder, store, vectors, {**content, "nprobe": 1, "recall": 1.0})
            nprobe, recall = measure(draft, vectors, metric)
            measured = {"nprobe": nprobe, "recall": recall, "recall_k": RECALL_K, "recall_queries": RECALL_QUERIES}
            files.write_manifest(folder, "index", {**content, **measured})
            reporter.say(f"{chosen}: recall@{RECALL_K} {recall:.3f} with {nprobe} lists a query")
        builder.remove_parts()
    return VectorIndex(folder, store, model)


def _refuse_other(folder: Path, factory: str, metric: str, vectors: Vectors, store: Store) -> None:
    """Raise StoreError when a published index differs from what is asked for, naming both sides."""
    known = files.known_manifest(folder, "index")
    for key, wanted in (
        ("store", store.fingerprint),
        ("embeddings", vectors.fingerprint),
        ("metric", metric),
        ("factory", factory),
    ):
        if known and known.get(key) != wanted:
            raise StoreError(
                f"{folder} is an index with {key} {str(known.get(key))[:24]}",
                f"{wanted[:24]} is asked for",
                f"rm -r {folder}, then retro index {store.folder}",
            )


class _Build:
    """The stages of one index."""

    def __init__(
        self,
        store: Store,
        vectors: Vectors,
        folder: Path,
        factory: str,
        metric: str,
        index_rows: int,
        executor: Executor,
        reporter: Reporter,
    ):
        self.folder, self.factory, self.executor, self.reporter = folder.resolve(), factory, executor, reporter
        spec = {
            "vectors": vectors.fingerprint,
            "rows": vectors.num_rows,
            "factory": factory,
            "metric": metric,
            "seed": TRAIN_SEED,
            "part_rows": vectors_module.SHARD_ROWS,
            "index_rows": index_rows,
        }
        self._spec = json.dumps(spec, sort_keys=True)
        self._paths = (str(vectors.folder.resolve()), str(self.folder))
        groups = range(-(-vectors.num_rows // index_rows))
        self._train = self._stage("train", train_index, ("trained.faiss",))
        self._whole = self._stage("index", whole_index, tuple(f"whole-{g:05d}.faiss" for g in groups))
        self._parts = self._stage("add", part_lists, tuple(part_name(p) for p in range(len(_parts_of(spec)))))
        self._merge = self._stage("merge", merge_lists, tuple(f"lists-{g:05d}.bin" for g in groups))

    def _stage(self, name: str, work: Any, outputs: tuple[str, ...]) -> Stage:
        return Stage(f"{name} {self.factory}", work, self._spec, folder=self.folder, outputs=outputs, paths=self._paths)

    def files(self) -> dict[str, str]:
        """Run what is not finished; the SHA-256 of every file of the index."""
        if self.factory == "Flat":
            return {}
        if not num_lists(self.factory):
            return run_stage(self._whole, self.executor, self.reporter)
        hashes = run_stage(self._train, Executor(), self.reporter)
        if not is_finished(self._merge):
            run_stage(self._parts, self.executor, self.reporter)
        return hashes | run_stage(self._merge, self.executor, self.reporter)

    def remove_parts(self) -> None:
        remove_shards(self._parts)


def _parts_of(spec: dict[str, Any]) -> list[tuple[int, int]]:
    """First and last row of every part; no part reaches into two index files."""
    parts = []
    for start in range(0, spec["rows"], spec["index_rows"]):
        end = min(start + spec["index_rows"], spec["rows"])
        parts += [(first, min(first + spec["part_rows"], end)) for first in range(start, end, spec["part_rows"])]
    return parts


def part_name(part: int) -> str:
    return f"part-{part:05d}.bin"


@lru_cache(2)
def _open_vectors(folder: str) -> Vectors:
    return Vectors(Path(folder))


@lru_cache(2)
def _read_trained(path: str, mark: str) -> Any:
    return read_faiss(Path(path))


def train_index(stage: Stage, shard: int) -> Sequence[Piece]:
    """Centroids and codebooks from a random sample of the vectors."""
    import faiss

    spec = json.loads(stage.spec)
    vectors = _open_vectors(stage.paths[0])
    index = make_faiss(spec["factory"], vectors.width, spec["metric"])
    lists = num_lists(spec["factory"])
    count = min(vectors.num_rows, max(TRAIN_PER_LIST * lists, TRAIN_FLAT))
    rng = np.random.default_rng(spec["seed"])
    sample = vectors.take(np.sort(rng.choice(vectors.num_rows, count, replace=False)))
    is_large = lists >= TWO_LEVELS and not isinstance(index, faiss.IndexPreTransform)
    if lists and not is_large and getattr(faiss, "get_num_gpus", lambda: 0)():
        ivf = faiss.extract_index_ivf(index)
        ivf.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(ivf.d))
    try:
        if is_large:
            _train_two_levels(faiss.extract_index_ivf(index), sample, lists, spec["metric"])
        index.train(sample)
    except RuntimeError as error:
        raise cannot_build(spec["factory"], spec["rows"], error) from error
    return [faiss.serialize_index(index).tobytes()]


def _train_two_levels(ivf: Any, sample: np.ndarray, lists: int, metric: str) -> None:
    """The centroids of many lists: first sqrt(lists) clusters, then each of those divided; 1/50 of the work."""
    from faiss.contrib.clustering import two_level_clustering

    first = round(math.sqrt(lists))
    centroids = two_level_clustering(sample, first, lists, clustering_niter=15, min_points_per_centroid=1)[0]
    if metric == "ip":
        centroids /= np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-20)
    ivf.quantizer.train(centroids)
    ivf.quantizer.add(np.ascontiguousarray(centroids[:lists], np.float32))


def whole_index(stage: Stage, shard: int) -> Sequence[Piece]:
    """An index without inverted lists, in memory."""
    import faiss

    spec = json.loads(stage.spec)
    vectors = _open_vectors(stage.paths[0])
    first = shard * spec["index_rows"]
    last = min(first + spec["index_rows"], spec["rows"])
    index = make_faiss(spec["factory"], vectors.width, spec["metric"])
    try:
        if not index.is_trained:
            rng = np.random.default_rng(spec["seed"])
            count = min(vectors.num_rows, TRAIN_FLAT)
            index.train(vectors.take(np.sort(rng.choice(vectors.num_rows, count, replace=False))))
        for start in range(first, last, spec["part_rows"]):
            index.add(vectors.rows(start, min(start + spec["part_rows"], last)))
    except RuntimeError as error:
        raise cannot_build(spec["factory"], spec["rows"], error) from error
    return [faiss.serialize_index(index).tobytes()]


def part_lists(stage: Stage, shard: int) -> Sequence[Piece]:
    """The inverted lists of one part of the vectors."""
    import faiss

    spec = json.loads(stage.spec)
    first, last = _parts_of(spec)[shard]
    vectors = _open_vectors(stage.paths[0])
    path = Path(stage.paths[1]) / "trained.faiss"
    index = _read_trained(str(path), stage.mark)
    ivf = faiss.extract_index_ivf(index)
    index.reset()
    index.add_with_ids(vectors.rows(first, last), np.arange(first, last))
    lists: Any = ivf.invlists
    sizes = np.array([lists.list_size(number) for number in range(ivf.nlist)], np.int64)
    pieces: list[bytes] = []
    for number in np.flatnonzero(sizes).tolist():
        size = int(sizes[number])
        pieces.append(faiss.rev_swig_ptr(lists.get_codes(number), size * ivf.code_size).tobytes())
        pieces.append(faiss.rev_swig_ptr(lists.get_ids(number), size).astype("<i8").tobytes())
    index.reset()
    return [b"".join(pieces), sizes.astype("<i8").tobytes()]


def merge_lists(stage: Stage, shard: int) -> Stream:
    """One index file from its parts, list by list."""
    import faiss

    spec = json.loads(stage.spec)
    ivf = faiss.extract_index_ivf(_read_trained(str(Path(stage.paths[1]) / "trained.faiss"), stage.mark))
    start = shard * spec["index_rows"]
    chosen = [n for n, (first, _) in enumerate(_parts_of(spec)) if start <= first < start + spec["index_rows"]]
    parts = [ListsFile(stage.folder / part_name(number), ivf.nlist, ivf.code_size) for number in chosen]
    sizes = np.sum([part.sizes for part in parts], axis=0)

    def pieces() -> Iterator[Piece]:
        for number in range(ivf.nlist):
            held = [part for part in parts if part.sizes[number]]
            if held:
                yield np.concatenate([part.codes(number) for part in held]).tobytes()
                yield np.concatenate([part.ids(number) for part in held]).tobytes()
        yield sizes.astype("<i8").tobytes()

    return Stream(int(sizes.sum()) * (ivf.code_size + LISTS_BYTES) + LISTS_BYTES * ivf.nlist, pieces())


def measure(index: VectorIndex, vectors: Vectors, metric: str) -> tuple[int, float]:
    """Lists a query must look at for a recall of .95, and the recall reached: up to 500 stored vectors against exact."""
    rng = np.random.default_rng(TRAIN_SEED + 1)
    rows = np.sort(rng.choice(vectors.num_rows, min(RECALL_QUERIES, vectors.num_rows), replace=False))
    queries, k = vectors.take(rows), min(RECALL_K + 1, vectors.num_rows)
    if index.factory == "Flat":
        return 1, 1.0
    _, exact = ExactSearch(vectors, metric).search(queries, k)
    truth = [set(found.tolist()) - {int(row), -1} for found, row in zip(exact, rows)]
    nprobe, most = 1, max(1, num_lists(index.factory))
    while True:
        index.nprobe = nprobe
        found = index.search_vectors(queries, k)[0]
        hits = sum(len(set(row.tolist()) & wanted) for row, wanted in zip(found, truth))
        recall = hits / max(1, sum(map(len, truth)))
        if recall >= RECALL_TARGET or nprobe >= most:
            return nprobe, round(recall, 4)
        nprobe = min(2 * nprobe, most)
