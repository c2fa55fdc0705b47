"""Vectors of a store's chunks -> a Faiss index of a kind that fits their number, opened memory-mapped.

Reads EMBEDDINGS (vectors.py); writes INDEX/manifest.json and, but for Flat, whose vectors are the index,
trained.faiss (centroids and codebooks, no vectors) and for every 10^8 chunks one lists-NNNNN.bin: list by list the
codes and i8 chunk ids of its vectors, then the i8 size of every list. Parts of 65,536 chunks are made first,
each by itself, and then merged list by list; neither holds more than a part. Factories without inverted lists
(HNSW32, PQ16 ...) give one whole-NNNNN.faiss for every 10^8 chunks, built in memory.
Letters: U chunks, Q queries, Z embedding width, K neighbors.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.data import files
from retro_engine.data.store import Store
from retro_engine.errors import MissingInputError, StoreError, UsageError
from retro_engine.progress import Reporter
from retro_engine.retrieval import vectors as vectors_module
from retro_engine.retrieval.embed import open_embedder, short_name
from retro_engine.retrieval.executor import Executor, Part, Stage, Stream, is_finished, remove_shards, run_stage
from retro_engine.retrieval.left_out import LeftOut
from retro_engine.retrieval.vectors import ExactSearch, Vectors, build_vectors

MOST_FILES = 1 << 12
INDEX_ROWS = 10**8  # chunks in one index file
TRAIN_PER_LIST = 40  # training vectors for each list: Faiss warns below 39
MIN_PER_LIST = 39
TRAIN_FLAT = 1 << 16  # training vectors where there are no lists
TWO_LEVELS = 1 << 13  # lists from which on they are found in two levels, sqrt(lists) x sqrt(lists)
TRAIN_SEED = 1234
RECALL_K, RECALL_QUERIES, RECALL_TARGET = 10, 500, 0.95
REFINE = 4  # times k results of a product quantizer are compared again, by their vectors
METRICS = ("ip", "l2")
LISTS_BYTES = 8  # of an id, and of a list's size
EXTRA = 128  # results asked for beyond k before rows that are left out make a second search necessary


def factory_for(num_vectors: int, width: int) -> str:
    """The kind of index for a number of vectors."""
    if num_vectors < 50_000:
        return "Flat"
    if num_vectors < 10**6:
        return f"IVF{2 ** round(math.log2(4 * math.sqrt(num_vectors)))},Flat"
    if num_vectors < 10**7:
        return "IVF16384,SQ8"
    subquantizers = max(m for m in range(1, max(1, width // 8) + 1) if width % m == 0)
    lists = 1 << 16 if num_vectors < 3 * 10**8 else 1 << 17 if num_vectors < 10**9 else 1 << 18
    return f"IVF{lists}_HNSW32,PQ{subquantizers}"


def clamp_lists(factory: str, num_vectors: int) -> str:
    """The factory with no more lists than can be trained: n / 39, at least one."""
    most = max(1, num_vectors // MIN_PER_LIST)
    return re.sub(r"IVF(\d+)", lambda found: f"IVF{min(int(found[1]), most)}", factory)


def num_lists(factory: str) -> int:
    found = re.search(r"IVF(\d+)", factory)
    return int(found[1]) if found else 0


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
) -> "VectorIndex":
    """The index of a store for an embedder, built where it is missing, unfinished or damaged.

    `factory`: auto, or a Faiss factory string; `metric`: ip, l2, or auto (ip); auto takes an index as it is.
    `choices` are those of `choose_embedding`. Peak memory: the training sample (40 vectors a list) or a part of
    65,536 chunks, whichever is more. Raises StoreError when an index with another factory, metric or embedder lies
    there, UsageError for a factory that cannot be built.
    """
    if metric not in ("auto", *METRICS):
        raise UsageError(f"--metric {metric} cannot be used", f"auto or one of {', '.join(METRICS)}")
    _refuse_unreadable(factory)
    reporter, executor = reporter or Reporter("quiet"), executor or Executor()
    vectors = build_vectors(store, model, executor, reporter, **choices)
    known = _known(folder) or {}
    metric = known.get("metric", "ip") if metric == "auto" else metric
    by_size = known.get("factory") or factory_for(vectors.num_rows, vectors.width)
    wanted = by_size if factory == "auto" else factory
    chosen = clamp_lists(wanted, vectors.num_rows)
    if chosen != wanted:
        reporter.say(f"{wanted}: {vectors.num_rows:,} chunks are enough for {num_lists(chosen):,} lists only")
    make_faiss(chosen, vectors.width, metric)  # refuses what Faiss does not know
    with files.locked(folder):
        _refuse_other(folder, chosen, metric, vectors, store)
        builder = _Build(store, vectors, folder, chosen, metric, index_rows, executor, reporter)
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
        return Stage(f"{name} {self.factory}", work, self._spec, self.folder, outputs, self._paths)

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


def read_faiss(path: Path) -> Any:
    """A Faiss index from a file whose hash was checked; with limits. Raises StoreError for what Faiss cannot read."""
    import faiss

    raw = np.frombuffer(files.read_bytes(path, 1 << 40), np.uint8)
    faiss.set_deserialization_vector_byte_limit(max(1 << 20, 64 * len(raw)))
    try:
        return faiss.deserialize_index(raw)
    except RuntimeError as error:
        raise StoreError(
            f"{path} is not a Faiss index", str(error).strip().splitlines()[-1], "build it again"
        ) from error


def train_index(stage: Stage, shard: int) -> Sequence[Part]:
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
        raise _cannot_build(spec, error) from error
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


def make_faiss(factory: str, width: int, metric: str) -> Any:
    """An empty index. Raises UsageError for a factory string that Faiss does not know."""
    import faiss

    try:
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT if metric == "ip" else faiss.METRIC_L2)
    except RuntimeError as error:
        raise UsageError(f"--faiss {factory} cannot be used", _reason(error), "--faiss auto chooses by size") from error
    if num_lists(factory):
        faiss.extract_index_ivf(index).cp.min_points_per_centroid = 1
    return index


def _reason(error: Exception) -> str:
    """What Faiss says, without its source line."""
    return re.sub(r"^Error in .*?\.(cpp|h):\d+: ", "", str(error).strip().splitlines()[-1])


def _refuse_unreadable(factory: str) -> None:
    """Raise UsageError, before anything is embedded, for a string that Faiss reads at no width."""
    if factory == "auto":
        return
    try:
        make_faiss(factory, 3360, "ip")  # divisible by most numbers of subquantizers
    except UsageError as error:
        if "could not parse" in error.why:
            raise


def _cannot_build(spec: dict[str, Any], error: Exception) -> UsageError:
    return UsageError(
        f"--faiss {spec['factory']} cannot be built from {spec['rows']:,} chunks",
        _reason(error),
        "--faiss auto chooses by size",
    )


def whole_index(stage: Stage, shard: int) -> Sequence[Part]:
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
        raise _cannot_build(spec, error) from error
    return [faiss.serialize_index(index).tobytes()]


def part_lists(stage: Stage, shard: int) -> Sequence[Part]:
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


class ListsFile:
    """A file of inverted lists, memory-mapped."""

    def __init__(self, path: Path, num_lists: int, code_size: int):
        """Raises StoreError when its sizes contradict its length."""
        self.path, self.code_size = path, code_size
        raw = np.memmap(path, np.uint8, "r")
        entry = code_size + LISTS_BYTES
        ends = len(raw) - LISTS_BYTES * num_lists
        self.sizes = raw[max(ends, 0) :].view("<i8").astype(np.int64) if ends >= 0 else np.zeros(0, np.int64)
        if ends < 0 or (self.sizes < 0).any() or self.sizes.max(initial=0) > ends or self.sizes.sum() * entry != ends:
            raise StoreError(
                f"{path} contradicts itself", f"{len(raw):,} bytes, {num_lists} lists", "retro index again"
            )
        self._raw = raw
        self.offsets = np.concatenate(([0], np.cumsum(self.sizes * entry)))

    def codes(self, number: int) -> np.ndarray:
        start = self.offsets[number]
        return self._raw[start : start + self.sizes[number] * self.code_size]

    def ids(self, number: int) -> np.ndarray:
        return self._raw[self.offsets[number] + self.sizes[number] * self.code_size : self.offsets[number + 1]]


def merge_lists(stage: Stage, shard: int) -> Stream:
    """One index file from its parts, list by list."""
    import faiss

    spec = json.loads(stage.spec)
    ivf = faiss.extract_index_ivf(_read_trained(str(Path(stage.paths[1]) / "trained.faiss"), stage.mark))
    start = shard * spec["index_rows"]
    chosen = [n for n, (first, _) in enumerate(_parts_of(spec)) if start <= first < start + spec["index_rows"]]
    parts = [ListsFile(stage.folder / part_name(number), ivf.nlist, ivf.code_size) for number in chosen]
    sizes = np.sum([part.sizes for part in parts], axis=0)

    def pieces() -> Iterator[Part]:
        for number in range(ivf.nlist):
            held = [part for part in parts if part.sizes[number]]
            if held:
                yield np.concatenate([part.codes(number) for part in held]).tobytes()
                yield np.concatenate([part.ids(number) for part in held]).tobytes()
        yield sizes.astype("<i8").tobytes()

    return Stream(int(sizes.sum()) * (ivf.code_size + LISTS_BYTES) + LISTS_BYTES * ivf.nlist, pieces())


def measure(index: "VectorIndex", vectors: Vectors, metric: str) -> tuple[int, float]:
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


class VectorIndex:
    """A published index over the vectors of a store."""

    def __init__(self, folder: Path, store: Store, model: str | None = None):
        """`model` is needed where queries are texts and the index is not hash's or minilm's.

        Raises MissingInputError, or StoreError for an index of another store, embedder or version, or a damaged one.
        """
        manifest = files.read_manifest(folder, "index")
        for key in (
            "factory",
            "metric",
            "store",
            "chunks",
            "embeddings",
            "embedding",
            "nprobe",
            "recall",
            "recall_k",
            "index_rows",
            "files",
        ):
            if key not in manifest:
                raise StoreError(
                    f"{folder} was made by another version", f"no {key!r}", f"rm -r {folder}, then retro index"
                )
        if manifest["store"] != store.fingerprint:
            raise StoreError(
                f"{folder} indexes store {manifest['store'][:12]}",
                f"{store.folder} has {store.fingerprint[:12]}",
                f"retro index {store.folder}",
            )
        vectors = Vectors(files.child(store.folder / "embeddings", manifest["retriever"]), store)
        if manifest["embeddings"] != vectors.fingerprint:
            raise StoreError(
                f"{folder} indexes vectors {manifest['embeddings'][:12]} of {manifest['embedding']['name']}",
                f"{vectors.folder} has {vectors.fingerprint[:12]}",
                f"rm -r {folder}, then retro index {store.folder}",
            )
        files.verify_files(folder, manifest["files"])
        self._open(folder, store, vectors, manifest)
        self.model = model or ("hash" if vectors.embedding.name == "hash" else "minilm")

    def _open(self, folder: Path, store: Store, vectors: Vectors, manifest: dict[str, Any]) -> None:
        self.folder, self.store, self.vectors, self.manifest = folder, store, vectors, manifest
        self.factory, self.metric, self.nprobe = manifest["factory"], manifest["metric"], int(manifest["nprobe"])
        self.num_chunks = store.num_rows
        if -(-self.num_chunks // manifest["index_rows"]) > MOST_FILES:
            raise StoreError(f"{folder} is in more than {MOST_FILES} files", "index_rows", f"rm -r {folder}")
        self._mapped: list[Any] = []  # Faiss does not keep the lists that it is given
        self._indexes = [(start, self._read(start)) for start in range(0, self.num_chunks, manifest["index_rows"])]

    def _read(self, start: int) -> Any:
        """One index file as a Faiss index, its lists memory-mapped; an exact one where the index is Flat."""
        import faiss

        number, rows = start // self.manifest["index_rows"], self.manifest["index_rows"]
        last = min(start + rows, self.num_chunks)
        if self.factory == "Flat":
            if start == 0 and last == self.num_chunks and _has_gpu():
                return ExactSearch(self.vectors, self.metric)
            index = (
                faiss.IndexFlatIP(self.vectors.width) if self.metric == "ip" else faiss.IndexFlatL2(self.vectors.width)
            )
            for first in range(start, last, vectors_module.SHARD_ROWS):
                index.add(self.vectors.rows(first, min(first + vectors_module.SHARD_ROWS, last)))
            return index
        if not num_lists(self.factory):
            index = read_faiss(self._named(f"whole-{number:05d}.faiss"))
            self._check_faiss(index, last - start)
            return index
        index = read_faiss(self._named("trained.faiss"))
        self._check_faiss(index, 0)
        ivf = faiss.extract_index_ivf(index)
        lists = ListsFile(self._named(f"lists-{number:05d}.bin"), ivf.nlist, ivf.code_size)
        if int(lists.sizes.sum()) != last - start:
            raise StoreError(
                f"{lists.path} has {lists.sizes.sum()} vectors", f"expected {last - start}", "retro index again"
            )
        self._mapped.append(_map_lists(ivf, lists))
        ivf.ntotal = index.ntotal = last - start
        return index

    def _named(self, name: str) -> Path:
        """A file whose hash was checked, because the manifest names it. Raises StoreError for another."""
        if name not in self.manifest["files"]:
            raise StoreError(
                f"{self.folder} does not name {name}", f"an index {self.factory:.40} has it", f"rm -r {self.folder}"
            )
        return self.folder / name

    def _check_faiss(self, index: Any, total: int) -> None:
        import faiss

        metric = faiss.METRIC_INNER_PRODUCT if self.metric == "ip" else faiss.METRIC_L2
        if (index.d, index.ntotal, index.metric_type, index.is_trained) != (self.vectors.width, total, metric, True):
            raise StoreError(
                f"{self.folder} has a Faiss index of width {index.d}, {index.ntotal} vectors, metric {index.metric_type}",
                f"expected width {self.vectors.width}, {total} vectors, {self.metric}",
                f"rm -r {self.folder}, then retro index {self.store.folder}",
            )

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    def search_vectors(
        self, queries_QZ: np.ndarray, k: int, exclude: LeftOut | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best chunks of each vector: ids [Q, k] (-1 = fewer) and scores [Q, k], best first.

        `exclude`: rows that a query must not find. The score of l2 is 1 / (1 + d^2).
        """
        if k < 1:
            raise UsageError(f"k={k} cannot be used", "at least one neighbor is searched for")
        queries = np.ascontiguousarray(queries_QZ, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.vectors.width:
            raise UsageError(f"queries {queries.shape} cannot be searched", f"the index has width {self.vectors.width}")
        if exclude is None and k <= self.num_chunks:
            return self._nearest(queries, k)
        ids = np.full((len(queries), k), -1, np.int64)
        scores = np.zeros((len(queries), k), np.float32)
        left_out = np.zeros(len(queries), np.int64) if exclude is None else exclude.counts
        waiting = np.arange(len(queries))
        extra = min(EXTRA, int(left_out.max(initial=0)))
        while len(waiting):
            fetch = min(k + extra, max(1, self.num_chunks))
            found, value = self._nearest(queries[waiting], fetch)
            dropped = found < 0
            if exclude is not None:
                dropped |= exclude.holds(found, waiting)
            is_short = ((~dropped).sum(1) < k) & (found[:, -1] >= 0) & (fetch < k + left_out[waiting])
            is_short &= fetch < self.num_chunks
            order = np.argsort(dropped, axis=1, kind="stable")[:, :k]
            kept = np.take_along_axis(np.where(dropped, -1, found), order, 1)
            ids[waiting, : kept.shape[1]] = kept
            scores[waiting, : kept.shape[1]] = np.take_along_axis(np.where(dropped, 0, value), order, 1)
            waiting, extra = waiting[is_short], 8 * extra + 1
        return ids, scores

    def _nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Over all index files: ids and scores [Q, k], higher is better."""
        wide = min(k * REFINE, self.num_chunks) if ",PQ" in self.factory else k
        each = [self._search_file(start, index, queries, wide) for start, index in self._indexes]
        found, values = each[0] if len(each) == 1 else (np.concatenate(part, 1) for part in zip(*each))
        if found.size and (found.max() >= self.num_chunks or found.min() < -1):
            raise StoreError(
                f"{self.folder} holds chunk {found.max()}", f"the store has {self.num_chunks}", "retro index"
            )
        if wide != k:
            values = self._compare(queries, found)
        if self.metric == "l2":
            values = 1 / (1 + np.maximum(values, 0))
        elif self.vectors.embedding.name == "hash":
            found = np.where(values > 0, found, -1)  # nothing in common
        if len(each) > 1 or wide != k:  # else they are in order, what is missing last
            order = np.argsort(np.where(found >= 0, -values, np.inf), axis=1, kind="stable")[:, :k]
            found, values = np.take_along_axis(found, order, 1), np.take_along_axis(values, order, 1)
        return found, np.where(found >= 0, values, np.float32(0)).astype(np.float32, copy=False)

    def _search_file(self, start: int, index: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and Faiss' values of one index file; lists hold the store's own ids, other kinds count from 0."""
        values, found = index.search(queries, k, **self._parameters(index))
        if start and not num_lists(self.factory):
            found = np.where(found >= 0, found + start, -1)
        return found, values

    def _parameters(self, index: Any) -> dict[str, Any]:
        import faiss

        if not num_lists(self.factory):
            return {}
        library: Any = faiss  # its stubs do not know keyword arguments
        parameters = library.SearchParametersIVF(nprobe=self.nprobe)
        is_wrapped = isinstance(index, faiss.IndexPreTransform)
        return {"params": library.SearchParametersPreTransform(index_params=parameters) if is_wrapped else parameters}

    def _compare(self, queries: np.ndarray, found: np.ndarray) -> np.ndarray:
        """The exact values of results, from the stored vectors."""
        near = self.vectors.take(np.maximum(found, 0))
        if self.metric == "ip":
            return np.einsum("qz,qkz->qk", queries, near)
        return np.square(near - queries[:, None]).sum(2)

    def search(
        self, tokens_QM: np.ndarray, lengths_Q: np.ndarray, k: int, exclude: LeftOut | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`search_vectors` for rows of token ids."""
        if self.vectors.embedding.name == "hash":
            from retro_engine.retrieval.embed import embed

            return self.search_vectors(embed(tokens_QM, lengths_Q), k, exclude)
        rows = [row[:length] for row, length in zip(tokens_QM.tolist(), lengths_Q.tolist())]
        return self.search_vectors(self.embed_texts(self.store.tokenizer.decode_batch(rows)), k, exclude)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        text = json.dumps(self.vectors.embedding.to_json(), sort_keys=True)
        return open_embedder(text, self.model).texts(texts, self.store)

    def search_texts(self, texts: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """`search_vectors` for queries that are texts."""
        return self.search_vectors(self.embed_texts(texts), k)

    def verify(self) -> None:
        """Compare every file with the manifests (opening has done so too)."""
        files.verify_files(self.folder, self.manifest["files"])
        files.verify_files(self.vectors.folder, self.vectors.manifest["files"])

    def summary(self) -> dict[str, Any]:
        keys = (
            "kind",
            "retriever",
            "factory",
            "metric",
            "chunks",
            "nprobe",
            "recall",
            "recall_k",
            "store",
            "embeddings",
        )
        held = sum((self.folder / name).stat().st_size for name in self.manifest["files"])
        each = held / max(1, self.num_chunks) or self.vectors.width * self.vectors.embedding.dtype.itemsize
        shown = {key: self.manifest[key] for key in keys}
        return {**shown, "bytes_per_vector": round(each, 1), "fingerprint": self.fingerprint}


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _map_lists(ivf: Any, lists: ListsFile) -> Any:
    """Give a Faiss index its lists where they lie; Faiss maps the file read-only."""
    import faiss

    mapped: Any = faiss.OnDiskInvertedLists()
    mapped.nlist, mapped.code_size, mapped.read_only = ivf.nlist, ivf.code_size, True
    mapped.filename, mapped.totsize = str(lists.path), lists.path.stat().st_size
    mapped.lists.resize(ivf.nlist)
    sizes = lists.sizes.astype(np.uint64)  # named: a pointer does not keep its array
    mapped.set_all_lists_sizes(faiss.swig_ptr(sizes))
    mapped.prefetch_nthread = 0  # threads that are started for every query cost 1.2 ms
    mapped.do_mmap()
    ivf.replace_invlists(mapped, False)
    return mapped


def _known(folder: Path) -> dict[str, Any] | None:
    try:
        return files.read_manifest(folder, "index")
    except MissingInputError:
        return None


def _refuse_other(folder: Path, factory: str, metric: str, vectors: Vectors, store: Store) -> None:
    """Raise StoreError when a published index differs from what is asked for, naming both sides."""
    known = _known(folder)
    if known is None:
        return
    for key, wanted in (
        ("store", store.fingerprint),
        ("embeddings", vectors.fingerprint),
        ("metric", metric),
        ("factory", factory),
    ):
        if known.get(key) != wanted:
            raise StoreError(
                f"{folder} is an index with {key} {str(known.get(key))[:24]}",
                f"{wanted[:24]} is asked for",
                f"rm -r {folder}, then retro index {store.folder}",
            )
