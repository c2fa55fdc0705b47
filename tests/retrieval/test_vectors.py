"""Vectors of a store: shard by shard, resumed, damaged, of another store; and exact search against NumPy."""

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import write_corpus

from retro_engine.data import files
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.errors import RetroError, StoreError, UsageError
from retro_engine.progress import Reporter
from retro_engine.retrieval import vectors as vectors_module
from retro_engine.retrieval.embed import embed
from retro_engine.retrieval.executor import Executor
from retro_engine.retrieval.vectors import ExactSearch, Vectors, build_vectors


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(vectors_module, "SHARD_ROWS", 64)
    return prepare([write_corpus(tmp_path / "c.jsonl", 40)], tmp_path / "s", vocab_size=300, chunk_size=16)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_hold_what_the_embedder_gives(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    vectors = build_vectors(store, "hash", reporter=Reporter("text"))
    assert "embedding" in capsys.readouterr().err, "the cost is said first"
    expected = embed(*store.rows(0, store.num_rows))
    assert len(vectors.manifest["files"]) == -(-store.num_rows // 64) > 2
    np.testing.assert_array_equal(vectors.rows(0, store.num_rows), expected)
    np.testing.assert_array_equal(vectors.rows(60, 70), expected[60:70])
    rows = np.array([[70, 3], [store.num_rows - 1, 3]])
    np.testing.assert_array_equal(vectors.take(rows), expected[rows])
    vectors.verify()


def test_processes_write_the_same_bytes_and_a_lost_shard_is_built_again(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build_vectors(store, "hash").folder
    whole = content(folder)
    for path in folder.glob("*.npy*"):
        path.unlink()
    build_vectors(store, "hash", Executor("processes", 2))
    assert content(folder) == whole
    path = folder / "vectors-00001.npy"
    raw = bytearray(path.read_bytes())
    raw[200] ^= 1
    path.unlink()
    path.write_bytes(raw)
    vectors = Vectors(folder, store)
    assert len(vectors.rows(0, 64)) == 64, "each file is compared when it is read"
    for read in (lambda: vectors.rows(60, 70), lambda: vectors.take(np.array([3, 70])), vectors.verify):
        with pytest.raises(StoreError, match=r"vectors-00001.npy is damaged"):
            read()
    build_vectors(store, "hash", reporter=Reporter("text"))
    assert "vectors-00001.npy is damaged: it is built again" in capsys.readouterr().err
    assert content(folder) == whole


def test_vectors_of_another_store_or_width(store: Store, tmp_path: Path) -> None:
    folder = build_vectors(store, "hash").folder
    other = prepare([write_corpus(tmp_path / "d.jsonl", 5, seed=2)], tmp_path / "o", vocab_size=300)
    with pytest.raises(StoreError, match="has vectors of store"):
        Vectors(folder, other)
    manifest = files.read_manifest(folder, "embeddings")
    body = {key: manifest[key] for key in ("embedding", "store", "files")}
    (folder / "manifest.json").unlink()
    files.write_manifest(folder, "embeddings", {**body, "embedding": {**body["embedding"], "width": 99}})
    with pytest.raises(StoreError, match="width 99 was expected"):
        Vectors(folder, store)


def test_choices_of_an_earlier_run_stay(store: Store) -> None:
    """What decides the bytes is settled once: a damaged or other choice is refused, not mixed."""
    folder = build_vectors(store, "hash").folder
    path = folder / vectors_module.EMBEDDING_FILE
    known = json.loads(path.read_text())
    for change in ({"width": "x"}, {"precision": "fp8"}, {"name": "../x"}, {"width": True}, {"pooling": None}):
        path.unlink()
        path.write_text(json.dumps({**known, "embedding": {**known["embedding"], **change}}))
        with pytest.raises(StoreError, match="is damaged"):
            build_vectors(store, "hash")
    path.unlink()
    path.write_text("{")
    with pytest.raises(StoreError, match="is damaged"):
        build_vectors(store, "hash")
    path.write_text(json.dumps({**known, "store": "0" * 64}))
    with pytest.raises(StoreError, match="has vectors of store 000000000000"):
        build_vectors(store, "hash")
    path.write_text(json.dumps({**known, "embedding": {**known["embedding"], "name": "minilm"}}))
    with pytest.raises(StoreError, match="was made with precision 'fp32'"):
        build_vectors(store, "hash", precision="bf16")


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("k", [1, 7, 10_000])
def test_exact_search_equals_numpy(store: Store, metric: str, k: int) -> None:
    vectors = build_vectors(store, "hash")
    everything, queries = vectors.rows(0, vectors.num_rows), vectors.rows(5, 25)
    scores, ids = ExactSearch(vectors, metric).search(queries, k)
    value = queries @ everything.T
    if metric == "l2":
        value = np.square(queries[:, None] - everything).sum(2)
    best = np.sort(value if metric == "l2" else -value, axis=1)[:, :k]
    found = scores if metric == "l2" else -scores
    assert scores.shape == ids.shape == (20, k)
    np.testing.assert_allclose(found[:, : best.shape[1]], best, atol=1e-5)
    assert (ids[:, best.shape[1] :] == -1).all()
    there = ids[:, : best.shape[1]]
    np.testing.assert_allclose(np.take_along_axis(value, there, 1), scores[:, : best.shape[1]], atol=1e-5)


def test_two_builders_in_one_folder(store: Store) -> None:
    """Of two that start together one may be refused; what there is in the end is always whole."""
    whole = content(build_vectors(store, "hash").folder)
    refused = 0
    for _ in range(200 if os.environ.get("RETRO_CAMPAIGN") else 15):
        shutil.rmtree(store.folder / "embeddings")
        results: list[object] = []
        start = threading.Barrier(2)

        def build(results: list[object] = results, start: threading.Barrier = start) -> None:
            start.wait()
            try:
                results.append(build_vectors(store, "hash"))
            except RetroError as error:
                results.append(error)

        builders = [threading.Thread(target=build) for _ in range(2)]
        for builder in builders:
            builder.start()
        for builder in builders:
            builder.join()
        errors = [result for result in results if isinstance(result, RetroError)]
        assert len(results) == 2
        assert len(errors) <= 1
        assert all(isinstance(error, UsageError) and "is in use" in str(error) for error in errors)
        refused += len(errors)
        assert content(store.folder / "embeddings" / "hash") == whole
    assert refused > 0
