"""Chunk ids -> tokens, lengths, missing neighbors, document ends: the C++ loader against vectorised NumPy, one thread."""

import numpy as np
import pytest

from retro_engine.data.corpus import Document
from retro_engine.data.loader import NeighborLoader, has_native_loader
from retro_engine.data.store import Store, StoreWriter
from retro_engine.data.tokenizer import Tokenizer

ROWS, M, R, IDS = 200_000, 64, 128, 20_000


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    tokenizer = Tokenizer.train(["x"], 300)
    writer = StoreWriter(tmp_path_factory.mktemp("loader") / "store", tokenizer, M)
    rng = np.random.default_rng(0)
    while writer.counts["rows"] < ROWS:
        writer.add(Document("d", "", "x", "f"), rng.integers(2, 250, int(rng.integers(100, 6000))).tolist())
    return writer.close()


@pytest.mark.benchmark(group="ids to tokens and lengths")
@pytest.mark.parametrize("kind", ["numpy", "native"])
def test_gather(benchmark, store: Store, kind: str) -> None:
    if kind == "native" and not has_native_loader():
        pytest.skip("the C++ loader is not built")
    loader = NeighborLoader([store], kind == "native")
    rng = np.random.default_rng(1)
    batches = [rng.integers(-1, store.num_rows, IDS) for _ in range(8)]  # rotated, so that caches do not lie
    loader.gather(np.arange(store.num_rows), R)  # touches and checks every block
    state = {"next": 0}

    def gather() -> None:
        state["next"] = (state["next"] + 1) % len(batches)
        loader.gather(batches[state["next"]], R)

    benchmark(gather)
    benchmark.extra_info["ns_per_id"] = benchmark.stats.stats.median / IDS * 1e9
