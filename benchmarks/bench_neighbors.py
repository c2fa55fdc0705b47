"""Searching a store for every chunk's neighbors: this project's BM25 loop against bm25s' own, same index, same threads."""

from pathlib import Path

import numba
import pytest

from retro_engine.data.builtin import write_facts
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.retrieval.lexical import K1, B, Bm25Index

QUERIES, K = 2000, 20


def words_of(texts: list[str]) -> list[list[str]]:
    """What bm25s asks with."""
    import bm25s

    return bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[str]]:
    folder = tmp_path_factory.mktemp("neighbors")
    paths = write_facts(folder, 8000, 100)
    store = prepare([paths["train"], paths["notes"]], folder / "store", chunk_size=64)
    texts = [text for batch in store.texts() for text in batch]
    return store, texts


@pytest.mark.benchmark(group="BM25 search")
@pytest.mark.parametrize("kind", ["bm25s", "ours"])
def test_search(benchmark, parts: tuple[Store, list[str]], tmp_path: Path, kind: str) -> None:
    import bm25s

    store, texts = parts
    queries = texts[:QUERIES]
    if kind == "ours":
        index = Bm25Index.build(store, tmp_path / "index")
        index.search(queries[:10], K)
        benchmark.pedantic(lambda: index.search(queries, K), rounds=5)
    else:
        other = bm25s.BM25(k1=K1, b=B, backend="numba")
        other.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
        other.retrieve(words_of(queries[:10]), k=K, show_progress=False, n_threads=numba.get_num_threads())

        def search() -> None:
            other.retrieve(words_of(queries), k=K, show_progress=False, n_threads=numba.get_num_threads())

        benchmark.pedantic(search, rounds=5)
    benchmark.extra_info["ms_per_query"] = benchmark.stats.stats.median / QUERIES * 1e3
