"""An index of 10^6 vectors of width 384 on this machine: building time, ms a query, recall, bytes a vector.

The vectors are synthetic: 20,000 topics on a 32-dimensional surface, with noise. Alone on two cores it takes about
six minutes. `python benchmarks/bench_index.py [VECTORS]`.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np

from retro_engine.data.corpus import Document
from retro_engine.data.store import Store, StoreWriter
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.progress import Reporter
from retro_engine.retrieval import index as index_module
from retro_engine.retrieval import vectors as vectors_module
from retro_engine.retrieval.index import build_index
from retro_engine.retrieval.vectors import ExactSearch

WIDTH = 384


def make_store(folder: Path, chunks: int) -> Store:
    writer = StoreWriter(folder, Tokenizer.train(["x"], 300), 4)
    for number in range(chunks // 1000):
        writer.add(Document(str(number), "", "x", "f"), [5] * 3999)
    return writer.close()


class Synthetic:
    """Stands for an embedder: the vectors of a stretch of chunks, the same whenever they are asked for."""

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


def main() -> None:
    chunks = int(sys.argv[1]) if len(sys.argv) > 1 else 10**6
    from retro_engine.retrieval.embed import Embedding

    synthetic = Synthetic()
    synthetic.embedding = Embedding("synthetic", width=WIDTH)  # type: ignore[attr-defined]
    vectors_module.open_embedder = lambda text, model: synthetic  # type: ignore[assignment]
    vectors_module.choose_embedding = lambda *given, **named: (synthetic.embedding, "")  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as temporary:
        store = make_store(Path(temporary) / "s", chunks)
        reporter = Reporter("text")
        vectors = vectors_module.build_vectors(store, "synthetic", reporter=reporter)
        times: dict[str, float] = {}
        real = index_module.run_stage

        def timed(stage, executor, reporter):  # type: ignore[no-untyped-def]
            start = time.perf_counter()
            found = real(stage, executor, reporter)
            times[stage.name.split()[0]] = round(time.perf_counter() - start, 1)
            return found

        index_module.run_stage = timed  # type: ignore[assignment]
        start = time.perf_counter()
        index = build_index(store, "synthetic", store.folder / "index" / "synthetic", reporter=reporter)
        whole_s = time.perf_counter() - start
        queries = vectors.rows(0, 500)
        start = time.perf_counter()
        index.search_vectors(queries, 10)
        batch_ms = (time.perf_counter() - start) / 500 * 1e3
        start = time.perf_counter()
        for query in queries[:200]:
            index.search_vectors(query[None], 10)
        single_ms = (time.perf_counter() - start) / 200 * 1e3
        start = time.perf_counter()
        ExactSearch(vectors, "ip").search(queries, 10)
        exact_ms = (time.perf_counter() - start) / 500 * 1e3
        result = {
            "vectors": chunks,
            "width": WIDTH,
            **index.summary(),
            "threads": faiss.omp_get_max_threads(),
            "build_s": round(whole_s, 1),
            "stages_s": times,
            "ms_per_query_500_at_once": round(batch_ms, 3),
            "ms_per_query_single": round(single_ms, 3),
            "ms_per_query_exact": round(exact_ms, 3),
            "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
