"""An index of 10^6 vectors of width 384 on this machine: building time, ms a query, recall, bytes a vector.

The vectors are synthetic: 20,000 topics on a 32-dimensional surface, with noise. Alone on two cores it takes about
six minutes. RETRO_VECTORS sets their number.
"""

import os
import tempfile
import time
from pathlib import Path
from unittest import mock

import faiss
import numpy as np

from retro_engine.bench.frame import Measured, Options, Row, compared, time_in_turns
from retro_engine.bench.machine import forget_peak, resident_mib
from retro_engine.data.corpus import Document
from retro_engine.data.store import Store, StoreWriter
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.progress import Reporter
from retro_engine.retrieval import index_build
from retro_engine.retrieval import vectors as vectors_module
from retro_engine.retrieval.embed import Embedding
from retro_engine.retrieval.index_build import build_index
from retro_engine.retrieval.vectors import ExactSearch

VECTORS = int(os.environ.get("RETRO_VECTORS", 10**6))
WIDTH = 384


def make_store(folder: Path, chunks: int) -> Store:
    writer = StoreWriter(folder, Tokenizer.train(["x"], 300), 4)
    for number in range(chunks // 1000):
        writer.add(Document(str(number), "", "x", "f"), [5] * 3999)
    return writer.close()


class Synthetic:
    """Stands for an embedder: the vectors of a stretch of chunks, the same whenever they are asked for."""

    embedding = Embedding("synthetic", width=WIDTH)

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.topics = rng.standard_normal((20_000, 32)).astype(np.float32)
        self.surface = rng.standard_normal((32, WIDTH)).astype(np.float32)

    def rows(self, store: Store, first: int, last: int) -> np.ndarray:
        rng = np.random.default_rng(first)
        flat = self.topics[rng.integers(0, len(self.topics), last - first)]
        flat = flat + 0.5 * rng.standard_normal(flat.shape).astype(np.float32)
        values = flat @ self.surface + 0.5 * rng.standard_normal((last - first, WIDTH)).astype(np.float32)
        return values / np.linalg.norm(values, axis=1, keepdims=True)


def run(options: Options) -> Measured:
    forget_peak()
    synthetic = Synthetic()
    times: dict[str, float] = {}
    real = index_build.run_stage

    def timed(stage, executor, reporter):  # type: ignore[no-untyped-def]
        start = time.perf_counter()
        found = real(stage, executor, reporter)
        times[stage.name.split()[0]] = round(time.perf_counter() - start, 1)
        return found

    with (
        tempfile.TemporaryDirectory() as temporary,
        mock.patch.object(vectors_module, "open_embedder", return_value=synthetic),
        mock.patch.object(vectors_module, "choose_embedding", return_value=(synthetic.embedding, "")),
    ):
        store = make_store(Path(temporary) / "s", VECTORS)
        reporter = Reporter("text")
        vectors = vectors_module.build_vectors(store, "synthetic", reporter=reporter)
        start = time.perf_counter()
        with mock.patch.object(index_build, "run_stage", timed):
            index = build_index(store, "synthetic", store.folder / "index" / "synthetic", reporter=reporter)
        built_s = time.perf_counter() - start
        rows = [Row(case=f"building, {VECTORS:,} vectors", implementation="ours", median_s=built_s, low_s=built_s,
                    high_s=built_s, peak_mib=resident_mib(is_peak=True), note=f"stages {times}")]  # fmt: skip
        queries, exact = vectors.rows(0, 500), ExactSearch(vectors, "ip")
        works = {
            "all at once": lambda: index.search_vectors(queries, 10),
            "one by one": lambda: [index.search_vectors(query[None], 10) for query in queries],
            "exact": lambda: exact.search(queries, 10),
        }
        rows += compared(f"{len(queries)} queries", time_in_turns(works, rounds=3), ours=["all at once"])
        for row in rows[1:]:
            row.note = f"{1e3 * row.median_s / len(queries):.3f} ms a query"
        facts = {"vectors": VECTORS, "width": WIDTH, "threads": faiss.omp_get_max_threads(), **index.summary()}
    print(facts)
    return Measured(rows, facts={"index": facts})
