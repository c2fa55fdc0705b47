"""One thread a worker, nothing of the user's own cache, and the store that many tests read."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ.setdefault("RAYON_NUM_THREADS", "1")

import gc
from collections.abc import Iterator

import pytest
import torch
from helpers import write_corpus
from retro_kernels import products

from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store

torch.set_num_threads(1)
products.use("blas")  # also for what lasts longer than a test


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what is imported stays: collectors, of which tests ask for some, need not look through it


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else libraries that look for leaks at the end tell of it


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What would be kept in the user's cache (readers/places.py) is kept here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETRO_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True)
def one_library() -> None:
    """Products of every test are those of one library: which one is faster is timed, and a busy machine may say either."""
    products.use("blas")


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """40 documents in chunks of 16 tokens, with BM25 neighbors from the store itself."""
    from retro_engine.retrieval.neighbors import build_neighbors

    folder = tmp_path_factory.mktemp("store")
    source = write_corpus(folder / "corpus.jsonl", 40)
    store = prepare([source], folder / "store", vocab_size=300, chunk_size=16)
    build_neighbors(store, [store], "bm25", num_neighbors=6)
    return store
