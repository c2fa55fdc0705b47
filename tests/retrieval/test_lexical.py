"""BM25: the search loop against bm25s itself, and against the definition."""

import math
from pathlib import Path

import numpy as np
import pytest
from helpers import write_corpus

from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.errors import StoreError, UsageError
from retro_engine.retrieval import lexical
from retro_engine.retrieval.executor import Executor
from retro_engine.retrieval.left_out import LeftOut
from retro_engine.retrieval.lexical import K1, B, Bm25Index, terms_of


@pytest.fixture(scope="module")
def index(small_store: Store) -> Bm25Index:
    return Bm25Index(small_store.folder / "index" / "bm25", small_store)


@pytest.fixture(scope="module")
def texts(small_store: Store) -> list[str]:
    return [text for batch in small_store.texts() for text in batch]


def test_scores_are_bm25(index: Bm25Index, texts: list[str]) -> None:
    """idf(t) tf (k1 + 1) / (tf + k1 (1 - b + b len / mean)), without the constant factor k1 + 1 (Lucene's form)."""
    rows = terms_of(texts)
    lengths = np.array([len(row) for row in rows])
    query = texts[17]
    terms = set(terms_of([query])[0])
    expected = np.zeros(len(texts))
    for term in terms:
        tf = np.array([row.count(term) for row in rows])
        df = int((tf > 0).sum())
        if df:
            idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
            expected += idf * tf / (tf + K1 * (1 - B + B * lengths / lengths.mean()))
    ids, scores = index.search([query], 10)
    best = np.argsort(-expected, kind="stable")[:10]
    np.testing.assert_allclose(scores[0], expected[best], rtol=1e-4)
    np.testing.assert_allclose(expected[ids[0]], expected[best], rtol=1e-5)


def test_equals_bm25s(index: Bm25Index, texts: list[str]) -> None:
    import bm25s

    other = bm25s.BM25(k1=K1, b=B)
    other.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    queries = texts[::7]
    tokens = [sorted(set(row)) for row in terms_of(queries)]
    _, theirs = other.retrieve(tokens, k=5, show_progress=False)
    _, mine = index.search(queries, 5)
    np.testing.assert_allclose(mine, theirs, rtol=1e-4)


def test_excluded_rows_are_not_found_and_nothing_else_changes(index: Bm25Index, texts: list[str]) -> None:
    queries = texts[:20]
    everything, scores = index.search(queries, len(texts))
    contents = np.arange(len(texts), dtype=np.int32) // 7
    contents[::11] = -1
    own = np.where(np.arange(20) % 5, np.arange(20) // 7, -1)
    ids, _ = index.search(queries, len(texts), LeftOut.of(contents).for_queries(own))
    for q in range(20):
        kept = [i for i in everything[q] if i >= 0 and contents[i] >= 0 and contents[i] != own[q]]
        assert [i for i in ids[q] if i >= 0] == kept


def test_fewer_results_than_asked_for(index: Bm25Index) -> None:
    ids, scores = index.search(["zzzz unknown words", "", "river"], 500)
    assert (ids[:2] == -1).all()
    assert (scores[:2] == 0).all()
    found = ids[2][ids[2] >= 0]
    assert 0 < len(found) < 500
    assert (np.diff(scores[2]) <= 0).all()
    with pytest.raises(UsageError, match="k=0"):
        index.search(["x"], 0)


def test_two_builds_same_bytes_and_mixtures_are_refused(small_store: Store, tmp_path: Path) -> None:
    a, b = (Bm25Index.build(small_store, tmp_path / name) for name in ("a", "b"))
    assert a.fingerprint == b.fingerprint
    other = prepare([write_corpus(tmp_path / "c.jsonl", 4)], tmp_path / "s", vocab_size=300)
    with pytest.raises(StoreError, match="indexes store"):
        Bm25Index(tmp_path / "a", other)
    path = tmp_path / "a" / "scores.npy"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 4
    path.unlink()
    path.write_bytes(raw)
    with pytest.raises(StoreError, match="damaged"):
        Bm25Index(tmp_path / "a", small_store)


def test_a_store_without_words(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "! ? ."}\n{"text": "a I"}\n')
    store = prepare([tmp_path / "c.jsonl"], tmp_path / "s", vocab_size=300)
    index = Bm25Index.build(store, tmp_path / "i")
    ids, _ = index.search(["anything"], 3)
    assert (ids == -1).all()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_blocks_give_what_one_block_gives(small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in blocks of 37 chunks and merged 50 postings at a time, here and in processes: the same arrays."""
    whole = Bm25Index.build(small_store, tmp_path / "whole")
    monkeypatch.setattr(lexical, "BLOCK_ROWS", 37)
    monkeypatch.setattr(lexical, "MERGE_POSTINGS", 50)
    here = Bm25Index.build(small_store, tmp_path / "here")
    monkeypatch.setattr(lexical, "MERGE_POSTINGS", 1 << 22)
    apart = Bm25Index.build(small_store, tmp_path / "apart", Executor("processes", 2))
    assert content(here.folder) == content(apart.folder)
    for name in lexical.OUTPUTS:
        assert (here.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    assert not list(here.folder.glob("block-*")), "blocks are removed"


def test_an_interrupted_build_goes_on(small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lexical, "BLOCK_ROWS", 37)
    whole = content(Bm25Index.build(small_store, tmp_path / "whole").folder)
    for stage in ("count_block", "merge_blocks"):
        real, folder = getattr(lexical, stage), tmp_path / stage

        def stop(given: object, shard: int, real: object = real) -> object:
            if shard == 2:
                raise KeyboardInterrupt
            return real(given, shard)  # type: ignore[operator]

        with monkeypatch.context() as patch:
            patch.setattr(lexical, stage, stop)
            with pytest.raises(KeyboardInterrupt):
                Bm25Index.build(small_store, folder)
        before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.ok")}
        assert len(before) == (2 if stage == "count_block" else 2 + -(-small_store.num_rows // 37))
        Bm25Index.build(small_store, folder)
        assert content(folder) == whole
        kept = {name: time_ns for name, time_ns in before.items() if not name.startswith("block-")}
        assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in folder.glob("*.ok")}.items()


def test_queries_of_no_and_of_a_million_characters(index: Bm25Index) -> None:
    ids, _ = index.search(["", "river " * 170_000], 4)
    assert (ids[0] == -1).all()
    assert (ids[1] >= 0).all()
    assert index.search([], 4)[0].shape == (0, 4)
    for k in (0, -1):
        with pytest.raises(UsageError, match=f"k={k}"):
            index.search(["river"], k)
