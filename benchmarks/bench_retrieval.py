"""Searching through this project against calling the library directly, in turn, in one run; memory on 1x and 4x data.

Ratios are this project's time over the library's, median over rounds in which both are timed one after the other.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import pytest

from retro_engine.data.builtin import write_facts
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.retrieval.index import build_index
from retro_engine.retrieval.lexical import K1, B, Bm25Index

QUERIES, K, ROUNDS = 1000, 20, 7


def ratio(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float]:
    """Median of ours / theirs, and the median seconds of ours."""
    ours(), theirs()
    times = []
    for number in range(ROUNDS):
        each = {}
        for call in (ours, theirs) if number % 2 else (theirs, ours):
            start = time.perf_counter()
            call()
            each[call] = time.perf_counter() - start
        times.append((each[ours] / each[theirs], each[ours]))
    return sorted(r for r, _ in times)[ROUNDS // 2], sorted(s for _, s in times)[ROUNDS // 2]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("retrieval")
    paths = write_facts(folder, 8000, 100)
    return prepare([paths["train"], paths["notes"]], folder / "store", chunk_size=64)


def test_bm25_against_bm25s(benchmark, store: Store, tmp_path: Path) -> None:
    import bm25s

    texts = [text for batch in store.texts() for text in batch]
    index = Bm25Index.build(store, tmp_path / "index")
    other = bm25s.BM25(k1=K1, b=B, backend="numba")
    other.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    queries, threads = texts[:QUERIES], numba.get_num_threads()

    def search_other() -> None:
        terms = bm25s.tokenize(queries, stopwords="en", return_ids=False, show_progress=False)
        other.retrieve(terms, k=K, show_progress=False, n_threads=threads)

    found, seconds = ratio(
        lambda: index.search(queries, K),
        search_other,
    )
    benchmark.extra_info |= {"ratio": found, "ms_per_query": seconds / QUERIES * 1e3, "chunks": store.num_rows}
    benchmark.pedantic(lambda: index.search(queries[:10], K), rounds=1)
    print(
        f"\nBM25, {store.num_rows:,} chunks: {found:.2f} of bm25s' time (target 1.1), {seconds / QUERIES * 1e3:.2f} ms"
    )


@pytest.mark.parametrize("factory", ["Flat", "IVF512,Flat", "IVF512,SQ8"])
@pytest.mark.parametrize("batch", [1, QUERIES])
def test_index_against_faiss(benchmark, store: Store, tmp_path: Path, factory: str, batch: int) -> None:
    """The same vectors, lists and nprobe in an index in memory, built and called directly."""
    import faiss

    index = build_index(store, "hash", tmp_path / "index", factory)
    everything = index.vectors.rows(0, store.num_rows)
    direct = faiss.index_factory(everything.shape[1], "Flat", faiss.METRIC_INNER_PRODUCT)
    if factory != "Flat":
        direct = faiss.read_index(str(index.folder / "trained.faiss"))
        direct.nprobe = index.nprobe
    direct.add(everything)
    queries = everything[:QUERIES]

    def run(search: Callable[[np.ndarray], object]) -> None:
        for first in range(0, QUERIES if batch > 1 else 200, batch):
            search(queries[first : first + batch])

    found, seconds = ratio(
        lambda: run(lambda some: index.search_vectors(some, K)), lambda: run(lambda some: direct.search(some, K))
    )
    benchmark.extra_info |= {"ratio": found, "nprobe": index.nprobe}
    benchmark.pedantic(lambda: index.search_vectors(queries[:10], K), rounds=1)
    each_ms = seconds / (QUERIES if batch > 1 else 200) * 1e3
    print(f"\n{factory}, {batch} at once: {found:.2f} of Faiss' time (target 1.1), {each_ms:.3f} ms a query")


@pytest.mark.parametrize("stage", ["embed", "index bm25", "index hash", "neighbors"])
def test_memory_is_flat(benchmark, tmp_path: Path, stage: str) -> None:
    """Peak memory of each stage over 1x and 4x the chunks: resident without file pages, looked at every 2 ms."""
    peaks = []
    command, *kind = stage.split()
    for copies in (1, 4):
        folder = tmp_path / str(copies)
        folder.mkdir()
        paths = write_facts(folder, 6000 * copies, 10)
        prepare([paths["train"]], folder / "store", vocab_size=2000, chunk_size=16)
        flags = {"embed": ["--retriever", "hash"], "neighbors": ["--k", "4"]}.get(command, ["--retriever", *kind])
        if kind == ["hash"]:
            flags += ["--faiss", "IVF256,SQ8"]
        if command == "neighbors":
            from retro_engine.cli import main

            main(["index", str(folder / "store"), "--quiet"])
        code = (
            "import threading, time\n"
            "from retro_engine.retrieval import lexical, neighbors, vectors; from retro_engine.cli import main\n"
            "lexical.BLOCK_ROWS = vectors.SHARD_ROWS = neighbors.SHARD_ROWS = 8192; lexical.MERGE_POSTINGS = 1 << 18\n"
            "from retro_engine.retrieval import index; index.TRAIN_FLAT = 10240\n"
            "peak = 0\n"
            "def watch():\n"
            "    global peak\n"
            "    while True:\n"
            "        now = next(x for x in open('/proc/self/status') if x.startswith('RssAnon'))\n"
            "        peak = max(peak, int(now.split()[1])); time.sleep(0.002)\n"
            "threading.Thread(target=watch, daemon=True).start()\n"
            f"main([{command!r}, {str(folder / 'store')!r}, *{flags!r}, '--quiet']); print(peak)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        peaks.append((Store(folder / "store").num_rows, int(done.stdout.split()[-1]) / 1024))
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info["peaks"] = peaks
    for rows, peak in peaks:
        print(f"\n{stage}: {rows:,} chunks, peak {peak:.0f} MiB")


def test_overhead_of_the_executor(benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of a minute: 60 shards of 1 s of work and 1 MiB; inline, in processes, and on Ray where it is installed."""
    import json

    from retro_engine.progress import Reporter
    from retro_engine.retrieval.executor import Executor, Stage, run_stage

    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))  # where workers find this module
    shards = 60
    kinds = {"inline": 1, "processes": 2}
    try:
        import ray  # noqa: F401

        kinds["ray"] = 2
    except ImportError:
        pass
    for kind, workers in kinds.items():
        (tmp_path / kind).mkdir()
        names = tuple(f"{number}.bin" for number in range(shards * workers))
        stage = Stage("wait", wait_a_second, json.dumps({"bytes": 1 << 20}), tmp_path / kind, names)
        start = time.perf_counter()
        run_stage(stage, Executor(kind, workers), Reporter("quiet"))
        overhead = (time.perf_counter() - start) / shards - 1
        benchmark.extra_info[kind] = overhead
        print(f"\n{kind}: {overhead:.1%} above {shards} s (targets 5 % inline, 30 % on Ray)")
    benchmark.pedantic(lambda: None, rounds=1)


def wait_a_second(stage, shard: int) -> list[bytes]:
    """A second that any core can give, however many share it, and a file."""
    time.sleep(1)
    return [bytes(1 << 20)]
