"""Indexes of every kind and size against exact search, merged from parts, damaged, foreign, interrupted."""

import itertools
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from forks import Fork
from helpers import write_corpus

from retro_engine.data import files
from retro_engine.data.corpus import Document
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store, StoreWriter
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import RetroError, StoreError, UsageError
from retro_engine.progress import Reporter
from retro_engine.retrieval import index_build
from retro_engine.retrieval import vectors as vectors_module
from retro_engine.retrieval.embed import Embedding
from retro_engine.retrieval.executor import Executor
from retro_engine.retrieval.index import VectorIndex
from retro_engine.retrieval.index_build import build_index
from retro_engine.retrieval.inverted_lists import ListsFile, read_faiss
from retro_engine.retrieval.left_out import LeftOut
from retro_engine.retrieval.vectors import ExactSearch

CAMPAIGN = bool(os.environ.get("RETRO_CAMPAIGN"))
TOKENIZER = Tokenizer.train(["x"], 300)


def store_of(folder: Path, chunks: int, rows: int = 1) -> Store:
    """A store of `chunks` chunks, in documents of `rows`."""
    writer = StoreWriter(folder, TOKENIZER, 4)
    for number in range(chunks // rows):
        ids = [5 + number % 90, 5 + number // 90 % 90] * (2 * rows)
        writer.add(Document(str(number), "", "x", "f"), ids[:-1])
    return writer.close()


def with_vectors(store: Store, width: int = 32, name: str = "hash", seed: int = 0) -> np.ndarray:
    """Publish clustered random vectors as the store's, as if they had been embedded; returns them."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((40, width))
    values = centers[rng.integers(0, 40, store.num_rows)] + 0.3 * rng.standard_normal((store.num_rows, width))
    values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    folder = vectors_module.vectors_folder(store, name)
    folder.mkdir(parents=True, exist_ok=True)
    embedding = Embedding(name, width=width)
    text = json.dumps({"store": store.fingerprint, "embedding": embedding.to_json()})
    (folder / vectors_module.EMBEDDING_FILE).write_text(text)
    spec = {"store": store.fingerprint, "embedding": embedding.to_json(), "shard_rows": vectors_module.SHARD_ROWS}
    mark = files.fingerprint([f"embed {name}", json.dumps(spec, sort_keys=True)])
    for number in range(-(-store.num_rows // vectors_module.SHARD_ROWS)):
        path = folder / f"vectors-{number:05d}.npy"
        np.save(path, values[number * vectors_module.SHARD_ROWS : (number + 1) * vectors_module.SHARD_ROWS])
        marker = {"stage": mark, "sha256": files.sha256_file(path), "bytes": path.stat().st_size}
        path.with_name(path.name + ".ok").write_text(json.dumps(marker))
    return values


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """3,000 chunks with vectors in 6 shards."""
    monkeypatch.setattr(vectors_module, "SHARD_ROWS", 500)
    found = store_of(tmp_path / "s", 3000)
    with_vectors(found)
    return found


@pytest.mark.parametrize("size", [1, 2, 10, 100, 1000])
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_small_sizes_need_no_flag(tmp_path: Path, size: int, metric: str) -> None:
    store = store_of(tmp_path / "s", size)
    index = build_index(store, "hash", tmp_path / "i", metric=metric)
    assert index.factory == "Flat"
    ids, scores = index.search_vectors(index.vectors.rows(0, min(size, 5)), 12)
    assert ids.shape == (min(size, 5), 12)
    assert (ids[:, 0] >= 0).all()
    assert (np.diff(np.where(ids >= 0, scores, -1), axis=1) <= 0).all()
    assert ids.max() < size


def test_fifty_thousand_chunks_need_no_flag(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", 50_000, 500)
    values = with_vectors(store, 16)
    index = build_index(store, "hash", tmp_path / "i")
    assert index.factory == "IVF1024,Flat"
    assert index.manifest["recall"] >= 0.95
    _, exact = ExactSearch(index.vectors).search(values[:200], 10)
    found, _ = index.search_vectors(values[:200], 10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), exact.tolist())]) > 0.9
    assert index.summary()["bytes_per_vector"] < 16 * 4 + 8 + 2


KINDS = ("Flat", "IVF40,Flat", "IVF30,SQ8", "RR32,IVF30,Flat", "HNSW16", "SQ8")
PRODUCT = "IVF30_HNSW8,PQ16x4"  # takes seconds to train: each metric and each number of files once


@pytest.mark.parametrize(
    ("factory", "metric", "index_rows"),
    [*itertools.product(KINDS, ("ip", "l2"), (1200, 10**8)), (PRODUCT, "ip", 1200), (PRODUCT, "l2", 10**8)],
)
def test_every_factory_finds_what_exact_search_finds(
    store: Store, tmp_path: Path, metric: str, factory: str, index_rows: int
) -> None:
    """Inner product and distance; one index file and several searched together."""
    index = build_index(store, "hash", tmp_path / "i", factory, metric, index_rows=index_rows)
    queries = index.vectors.rows(0, 300)
    value, exact = ExactSearch(index.vectors, metric).search(queries, 10)
    ids, scores = index.search_vectors(queries, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids.tolist(), exact.tolist())])
    assert recall > 0.8, f"{factory}: {recall}"
    if factory in ("Flat", "IVF40,Flat"):
        expected = value if metric == "ip" else 1 / (1 + np.maximum(value, 0))
        same = ids == exact
        np.testing.assert_allclose(scores[same], expected[same], atol=2e-5)
    assert index.manifest["recall_k"] == 10
    reopened = VectorIndex(index.folder, store)
    again, _ = reopened.search_vectors(queries, 10)
    np.testing.assert_array_equal(again, ids)
    assert not list(index.folder.glob("part-*")), "parts are removed"


@pytest.mark.parametrize("factory", ["Flat", "IVF20,Flat", "HNSW8"])
def test_rows_left_out_are_not_found_and_nothing_is_missed(store: Store, tmp_path: Path, factory: str) -> None:
    """Also where the best 1,000 are all left out."""
    index = build_index(store, "hash", tmp_path / "i", factory)
    index.nprobe = 20
    queries = index.vectors.rows(0, 20)
    contents = np.maximum(np.arange(3000, dtype=np.int32) - 2989, 0)  # 2,990 rows say one thing
    contents[::9] = -1
    own = np.resize([0, 4, -1], 20)  # that thing, another, nothing
    ids, _ = index.search_vectors(queries, 5, LeftOut.of(contents).for_queries(own))
    similarity = queries @ index.vectors.rows(0, 3000).T
    for q in range(20):
        is_out = (contents < 0) | (contents == own[q])
        similarity[q, is_out] = -9
        found = ids[q][ids[q] >= 0]
        assert not is_out[found].any()
        if factory != "HNSW8":
            positive = [i for i in np.argsort(-similarity[q], kind="stable")[:5] if similarity[q, i] > 0]
            assert found.tolist() == positive


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("factory", ["IVF64,SQ8", "IVF64_HNSW8,Flat"])
def test_many_lists_are_trained_in_two_levels(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, factory: str
) -> None:
    monkeypatch.setattr(index_build, "TWO_LEVELS", 64)
    index = build_index(store, "hash", tmp_path / "i", factory, metric)
    assert index.manifest["recall"] >= 0.95
    assert index.nprobe < 64
    lists = ListsFile(index.folder / "lists-00000.bin", 64, 32 if "SQ8" in factory else 128)
    assert (lists.sizes > 0).mean() > 0.9, "the centroids are spread over the vectors"


def test_parts_merge_to_what_one_addition_gives(store: Store, tmp_path: Path) -> None:
    """Lists of the merged file hold exactly the vectors that Faiss puts there at once."""
    import faiss

    index = build_index(store, "hash", tmp_path / "i", "IVF25,SQ8")
    whole = read_faiss(index.folder / "trained.faiss")
    whole.add_with_ids(index.vectors.rows(0, 3000), np.arange(3000))
    lists = ListsFile(index.folder / "lists-00000.bin", 25, whole.code_size)
    for number in range(25):
        size = whole.invlists.list_size(number)
        assert lists.sizes[number] == size
        ids = faiss.rev_swig_ptr(whole.invlists.get_ids(number), size)
        np.testing.assert_array_equal(lists.ids(number).view("<i8"), ids)
        codes = faiss.rev_swig_ptr(whole.invlists.get_codes(number), size * whole.code_size)
        np.testing.assert_array_equal(lists.codes(number), codes)


def test_executors_write_the_same_bytes_and_resume_each_other(store: Store, tmp_path: Path) -> None:
    one = build_index(store, "hash", tmp_path / "a", "IVF25,SQ8")
    two = build_index(store, "hash", tmp_path / "b", "IVF25,SQ8", executor=Executor("processes", 2))
    assert content(one.folder) == content(two.folder)


def build_in_parts(store: Path, out: Path) -> None:
    vectors_module.SHARD_ROWS = 500
    build_index(Store(store), "hash", out, "IVF25,SQ8")


def test_kill_9_and_again_gives_the_same_bytes(store: Store, tmp_path: Path) -> None:
    """Killed at any time of training, adding, merging, measuring; finished files are not built again."""
    whole = content(build_index(store, "hash", tmp_path / "whole", "IVF25,SQ8").folder)
    rng = np.random.default_rng(0)
    for number in range(1000 if CAMPAIGN else 3):
        out = tmp_path / "killed"
        with Fork(build_in_parts, store.folder, out) as process:
            target = int(rng.integers(0, 9))
            while process.is_running() and len(list(out.glob("*.ok"))) < target:
                time.sleep(0.001)
            time.sleep(float(rng.random()) * 0.03)
        build_index(store, "hash", out, "IVF25,SQ8")
        assert content(out) == whole, f"kill {number} at {target}"
        shutil.rmtree(out)


def test_damage_is_found_at_opening_and_built_again(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = build_index(store, "hash", tmp_path / "i", "IVF25,SQ8")
    whole = content(index.folder)
    rng = np.random.default_rng(0)
    for name in ("trained.faiss", "lists-00000.bin", "manifest.json"):
        for _ in range(2000 if CAMPAIGN else 25):
            raw = bytearray(whole[name])
            raw[int(rng.integers(len(raw)))] ^= 1 << int(rng.integers(8))
            (index.folder / name).unlink()
            (index.folder / name).write_bytes(raw)
            try:
                again = VectorIndex(index.folder, store)
            except RetroError:
                continue
            assert again.manifest == index.manifest, "white space of the manifest"
        (index.folder / name).unlink()
        (index.folder / name).write_bytes(whole[name])
    (index.folder / "lists-00000.bin").unlink()
    (index.folder / "lists-00000.bin").write_bytes(whole["lists-00000.bin"][:-9])
    with pytest.raises(StoreError, match="damaged"):
        VectorIndex(index.folder, store)
    build_index(store, "hash", index.folder, "IVF25,SQ8", reporter=Reporter("text"))
    assert "lists-00000.bin is damaged: it is built again" in capsys.readouterr().err
    assert content(index.folder) == whole


def test_a_foreign_or_hostile_faiss_file(store: Store, tmp_path: Path) -> None:
    """A Faiss index that is not ours is refused, with or without the hash put right."""
    import faiss

    index = build_index(store, "hash", tmp_path / "i", "IVF25,SQ8")
    manifest = json.loads((index.folder / "manifest.json").read_text())
    other = faiss.index_factory(16, "Flat")
    other.add(np.zeros((5, 16), np.float32))
    for raw in (bytes(faiss.serialize_index(other)), b"IxFI" + b"\xff" * 200, b"", b"PK\3\4" * 50):
        (index.folder / "trained.faiss").unlink()
        (index.folder / "trained.faiss").write_bytes(raw)
        with pytest.raises(StoreError, match="damaged"):
            VectorIndex(index.folder, store)
        body = {key: value for key, value in manifest.items() if key not in ("fingerprint", "kind", "version")}
        body["files"] = {**body["files"], "trained.faiss": files.sha256_file(index.folder / "trained.faiss")}
        (index.folder / "manifest.json").unlink()
        files.write_manifest(index.folder, "index", body)
        with pytest.raises(StoreError, match="not a Faiss index|has a Faiss index of width"):
            VectorIndex(index.folder, store)


def test_another_store_embedder_metric_dimension_or_factory(store: Store, tmp_path: Path) -> None:
    index = build_index(store, "hash", tmp_path / "i", "IVF25,SQ8")
    other = prepare([write_corpus(tmp_path / "c.jsonl", 4)], tmp_path / "o", vocab_size=300)
    with pytest.raises(StoreError, match="indexes store"):
        VectorIndex(index.folder, other)
    for change, match in (({"metric": "l2"}, "metric ip"), ({"factory": "IVF25,Flat"}, "factory IVF25,SQ8")):
        with pytest.raises(StoreError, match=match):
            build_index(store, "hash", index.folder, **{"factory": "IVF25,SQ8", **change})
    assert build_index(store, "hash", index.folder).factory == "IVF25,SQ8", "auto takes it as it is"
    with pytest.raises(UsageError, match="width 32"):
        index.search_vectors(np.zeros((2, 31), np.float32), 3)
    shutil.rmtree(store.folder / "embeddings" / "hash")
    with_vectors(store, 48, seed=1)
    with pytest.raises(StoreError, match="embeddings"):
        build_index(store, "hash", index.folder, "IVF25,SQ8")
    with pytest.raises(RetroError):
        VectorIndex(index.folder, store)


@pytest.mark.parametrize("factory", ["IFV25,Flat", "IVF25,PQ7x4", "", "IVF25;Flat"])
def test_factories_that_cannot_be_used(store: Store, tmp_path: Path, factory: str) -> None:
    with pytest.raises(UsageError, match="cannot be (used|built)"):
        build_index(store, "hash", tmp_path / "i", factory)


def test_too_few_chunks_for_a_factory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = store_of(tmp_path / "s", 60)
    with pytest.raises(UsageError, match="cannot be built from 60 chunks"):
        build_index(store, "hash", tmp_path / "i", "PQ8")
    build_index(store, "hash", tmp_path / "j", "IVF1024,Flat", reporter=Reporter("text"))
    assert "60 chunks are enough for 1 lists only" in capsys.readouterr().err


def test_k_that_cannot_be_used_and_k_above_the_store(tmp_path: Path) -> None:
    index = build_index(store_of(tmp_path / "s", 7), "hash", tmp_path / "i")
    for k in (0, -1):
        with pytest.raises(UsageError, match=f"k={k}"):
            index.search_vectors(index.vectors.rows(0, 1), k)
    ids, _ = index.search_vectors(index.vectors.rows(0, 1), 100)
    assert ids.shape == (1, 100)
    assert sorted(ids[0][ids[0] >= 0]) == sorted(set(ids[0][ids[0] >= 0]))


def test_queries_of_no_and_of_a_million_characters(tmp_path: Path) -> None:
    index = build_index(store_of(tmp_path / "s", 7), "hash", tmp_path / "i")
    ids, _ = index.search_vectors(index.embed_texts(["", "x" * 10**6]), 3)
    assert (ids[0] == -1).all()


def test_the_lock_of_a_second_builder(store: Store, tmp_path: Path) -> None:
    """Two builders in one folder: the second is refused while the first works, and goes on after it."""
    with files.locked(tmp_path / "i"), pytest.raises(UsageError, match="is in use"):
        build_index(store, "hash", tmp_path / "i")
    build_index(store, "hash", tmp_path / "i")


def test_vectors_must_be_those_that_were_indexed(store: Store, tmp_path: Path) -> None:
    build_index(store, "hash", tmp_path / "i")
    path = store.folder / "embeddings" / "hash" / "vectors-00002.npy"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(StoreError, match="damaged"):
        VectorIndex(tmp_path / "i", store)
