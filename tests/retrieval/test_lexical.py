"""BM25: the search loop against bm25s itself, and against the definition."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from helpers import write_corpus

from retro_engine.data import files
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.errors import StoreError, UsageError
from retro_engine.retrieval import lexical
from retro_engine.retrieval.analyzer import ENGLISH, FIRST, Analyzer, make_analyzer, titled
from retro_engine.retrieval.bm25 import K1, B
from retro_engine.retrieval.executor import Executor
from retro_engine.retrieval.left_out import LeftOut
from retro_engine.retrieval.lexical import Bm25Index, row_titles


@pytest.fixture(scope="module")
def index(small_store: Store) -> Bm25Index:
    return Bm25Index(small_store.folder / "index" / "bm25", small_store)


@pytest.fixture(scope="module")
def texts(small_store: Store) -> list[str]:
    """What is read of every chunk: its document's title and its text."""
    texts = [text for batch in small_store.texts() for text in batch]
    return titled(row_titles(small_store, 0, small_store.num_rows), texts)


words = Analyzer().words


def test_scores_are_bm25(index: Bm25Index, texts: list[str]) -> None:
    """idf(t) tf (k1 + 1) / (tf + k1 (1 - b + b len / mean)), without the constant factor k1 + 1 (Lucene's form)."""
    rows = [words(text) for text in texts]
    lengths = np.array([len(row) for row in rows])
    query = texts[17]
    terms = set(words(query))
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
    other.index([words(text) for text in texts], show_progress=False)
    queries = texts[::7]
    tokens = [sorted(set(words(query))) for query in queries]
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
    (tmp_path / "c.jsonl").write_text('{"text": "! ? ."}\n{"text": "a the"}\n')
    store = prepare([tmp_path / "c.jsonl"], tmp_path / "s", vocab_size=300)
    index = Bm25Index.build(store, tmp_path / "i")
    ids, _ = index.search(["anything"], 3)
    assert (ids == -1).all()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_blocks_give_what_one_block_gives(small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in blocks of 37 chunks and merged 500 postings at a time, here and in processes: the same arrays."""
    whole = Bm25Index.build(small_store, tmp_path / "whole")
    monkeypatch.setattr(lexical, "BLOCK_ROWS", 37)
    monkeypatch.setattr(lexical, "MERGE_POSTINGS", 500)
    here = Bm25Index.build(small_store, tmp_path / "here")
    monkeypatch.setattr(lexical, "MERGE_POSTINGS", 1 << 22)
    apart = Bm25Index.build(small_store, tmp_path / "apart", Executor("processes", 1))
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


CITIES = ("城堡", "河流", "磨坊", "小镇", "桥梁", "塔楼", "港口", "花园", "市场", "森林")


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_text_without_spaces_has_neighbors(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = [{"id": f"d{i}", "text": "".join(rng.choice(CITIES, 40)) + "。"} for i in range(12)]
    store = prepare([write_rows(tmp_path / "c.jsonl", rows)], tmp_path / "s", vocab_size=300, chunk_size=32)
    index = Bm25Index.build(store, tmp_path / "i")
    texts = [text for batch in store.texts() for text in batch]
    own = store.row_documents().astype(np.int32)
    ids, _ = index.search(texts, 1, LeftOut.of(own).for_queries(own))
    assert (ids >= 0).mean() > 0.9
    assert (index.search(["港口"], 1)[0] >= 0).all()


def test_titles_are_searched_with_every_chunk(tmp_path: Path) -> None:
    rows = [
        {"title": "Harbour cranes", "text": "They lift containers from ships all day long. " * 30},
        {"title": "Silos", "text": "Grain is stored beside the quay."},
        {"text": "Nothing of it here."},
    ]
    store = prepare([write_rows(tmp_path / "c.jsonl", rows)], tmp_path / "s", vocab_size=300, chunk_size=32)
    first, last = store.document_rows(0)
    assert last > 2
    index = Bm25Index.build(store, tmp_path / "i")
    ids, _ = index.search(["harbour cranes", "silos"], store.num_rows)
    assert sorted(ids[0][ids[0] >= 0]) == list(range(first, last))
    assert ids[1][ids[1] >= 0].tolist() == [store.document_rows(1)[0]]
    assert row_titles(store, 1, store.num_rows)[-2:] == ["Silos", ""]


def test_the_reading_is_recorded_kept_and_not_mixed(small_store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "i"
    plain = Bm25Index.build(small_store, tmp_path / "plain")
    own = Bm25Index.build(small_store, folder, analyzer=Analyzer(stop_words=("river",)))
    assert (own.search(["river"], 1)[0] == -1).all()
    assert (plain.search(["river"], 1)[0] >= 0).all()
    assert Bm25Index.build(small_store, folder).fingerprint == own.fingerprint, "what is there keeps its reading"
    assert Bm25Index.build(small_store, folder, analyzer=Analyzer()).fingerprint == plain.fingerprint
    other = Bm25Index.build(small_store, tmp_path / "other", analyzer=make_analyzer(stop_words="de"))
    with pytest.raises(StoreError, match="reads words with"):
        lexical.check_analyzers([plain, other])
    lexical.check_analyzers([plain, plain])
    assert "English stop words" in plain.summary()["words"]


def write_first_version(store: Store, folder: Path) -> None:
    """An index as version 1 was: no analyzer, no titles, the words in vocabulary.json in their order."""
    rows = [FIRST.words(text) for batch in store.texts() for text in batch]
    vocabulary = sorted({word for row in rows for word in row})
    lengths = np.array([len(row) for row in rows])
    scores, chunks = [], []
    for word in vocabulary:
        counts = np.array([row.count(word) for row in rows], float)
        having = np.flatnonzero(counts)
        idf = math.log(1 + (len(rows) - len(having) + 0.5) / (len(having) + 0.5))
        tf = counts[having]
        scores.append(idf * tf / (tf + K1 * (1 - B + B * lengths[having] / lengths.mean())))
        chunks.append(having)
    frequencies = np.array([len(having) for having in chunks], "<i8")
    arrays = {
        "scores": np.concatenate(scores).astype("<f4"),
        "chunks": np.concatenate(chunks).astype("<i4"),
        "starts": np.concatenate(([0], np.cumsum(frequencies))).astype("<i8"),
        "frequencies": frequencies,
    }
    folder.mkdir()
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    (folder / "vocabulary.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    hashes = {name: files.sha256_file(folder / name) for name in ("vocabulary.json", *(f"{a}.npy" for a in arrays))}
    content = {"retriever": "bm25", "store": store.fingerprint, "chunks": len(rows), "k1": K1, "b": B}
    files.write_manifest(folder, "index", {**content, "stopwords": "en", "files": hashes})


def test_an_index_of_version_1_is_read_as_it_was_written(small_store: Store, tmp_path: Path) -> None:
    write_first_version(small_store, tmp_path / "i")
    index = Bm25Index(tmp_path / "i", small_store)
    texts = [text for batch in small_store.texts() for text in batch]
    assert index.analyzer == FIRST
    rows = [set(FIRST.words(text)) for text in texts]
    for query in (texts[17], "River stone", "c++"):
        ids, _ = index.search([query], len(texts))
        expected = {number for number, row in enumerate(rows) if row & set(FIRST.words(query))}
        assert set(ids[0][ids[0] >= 0].tolist()) == expected
    word = FIRST.words(texts[0])[0]
    assert index.frequencies(FIRST.query(word)).tolist() == [sum(word in row for row in rows)]
    again = Bm25Index.build(small_store, tmp_path / "i")
    assert again.analyzer == Analyzer() and again.analyzer.stop_words == ENGLISH
    assert again.fingerprint == Bm25Index.build(small_store, tmp_path / "new").fingerprint
    assert not (tmp_path / "i" / "vocabulary.json").exists()


def test_what_is_said_of_an_index_of_version_1_helps(small_store: Store, tmp_path: Path) -> None:
    write_first_version(small_store, tmp_path / "i")
    old, new = Bm25Index(tmp_path / "i", small_store), Bm25Index.build(small_store, tmp_path / "new")
    for pair in ([old, new], [new, old]):
        with pytest.raises(StoreError, match=f"retro index {small_store.folder}$"):
            lexical.check_analyzers(pair)
    lexical.check_analyzers([Bm25Index.build(small_store, tmp_path / "i"), new])


def test_a_vocabulary_that_does_not_fit(small_store: Store, tmp_path: Path) -> None:
    write_first_version(small_store, tmp_path / "i")
    manifest = files.read_manifest(tmp_path / "i", "index")
    for content in ("[]", '{"a": 0, "b": 0}', '{"a": 1}', "1", '{"a": "0"}'):
        (tmp_path / "i" / "vocabulary.json").write_text(content)
        changed = {**manifest["files"], "vocabulary.json": files.sha256_file(tmp_path / "i" / "vocabulary.json")}
        kept = {key: value for key, value in manifest.items() if key not in ("kind", "version", "fingerprint", "files")}
        (tmp_path / "i" / files.MANIFEST).unlink()
        files.write_manifest(tmp_path / "i", "index", {**kept, "files": changed})
        with pytest.raises(StoreError):
            Bm25Index(tmp_path / "i", small_store)
