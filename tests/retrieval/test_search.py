"""One retriever over several stores, and neighbors that do not overlap."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import random_texts, write_corpus

from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.errors import StoreError, UsageError
from retro_engine.retrieval.analyzer import Analyzer
from retro_engine.retrieval.hit import fuse
from retro_engine.retrieval.search import Building, Retriever, check_retriever, fused, make_index


def test_two_stores_score_as_one(tmp_path: Path) -> None:
    """Splitting a collection over two stores changes neither the order nor (but for mean length) the scores."""
    source = write_corpus(tmp_path / "all.jsonl", 30, words=12)
    lines = source.read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:28]))
    (tmp_path / "b.jsonl").write_text("".join(lines[28:]))
    whole = prepare([source], tmp_path / "all", vocab_size=300)
    tokenizer = str(tmp_path / "all")
    parts = [prepare([tmp_path / f"{n}.jsonl"], tmp_path / n, tokenizer) for n in ("a", "b")]
    together, apart = Retriever([whole]), Retriever(parts)
    query = whole.text(whole.document_rows(29)[0])
    one, two = together.hits(query, 5), apart.hits(query, 5)
    assert one[0].document == two[0].document == "d29"
    assert {hit.document for hit in one[:3]} == {hit.document for hit in two[:3]}
    assert two[0].source == "b"
    assert two[0].score == pytest.approx(one[0].score, rel=0.1)


def test_hits_name_their_documents(small_store: Store) -> None:
    hits = Retriever([small_store]).hits("Document doc7.", 4)
    assert hits[0].document == "d7"
    assert hits[0].title == "Title 7"
    assert "Document doc7." in hits[0].text
    numbers = {small_store.name(number)[0]: number for number in range(small_store.num_documents)}
    for hit in hits:
        first, last = small_store.document_rows(numbers[hit.document])
        assert hit.text == small_store.text(first + hit.chunk)
        assert hit.continuation == (small_store.text(first + hit.chunk + 1) if first + hit.chunk + 1 < last else "")
        assert hit.source == small_store.folder.name
    assert any(hit.continuation for hit in hits)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


@pytest.mark.parametrize("kind", ["bm25", "hash"])
def test_no_two_neighbors_overlap(small_store: Store, kind: str) -> None:
    retriever = Retriever([small_store], kind)
    document = small_store.row_documents()
    texts = [text for batch in small_store.texts(0, 40) for text in batch]
    ids, _ = retriever.search(texts, 6)
    for row in ids:
        found = row[row >= 0].tolist()
        assert len(found) == len(set(found))
        for i in found:
            assert not (i + 1 in found and i + 1 < len(document) and document[i] == document[i + 1])


def test_an_unknown_retriever() -> None:
    with pytest.raises(UsageError, match="did you mean bm25"):
        check_retriever("bm52")


def test_hybrid_is_the_fusion_of_its_halves(small_store: Store) -> None:
    hybrid = Retriever([small_store], "hybrid", building=Building(embedder="hash"))
    ids, scores = hybrid.search(["Document doc7. river stone", ""], 5)
    assert ids.shape == (2, 5)
    assert (np.diff(scores[0][ids[0] >= 0]) <= 0).all()
    assert hybrid.hits("Document doc7.", 3)[0].document == "d7"
    only = Retriever([small_store], "hybrid", building=Building(embedder="hash", fusion=(1.0, 0.0)))
    lexical = Retriever([small_store], "bm25")
    assert only.hits("Document doc7.", 3)[0].chunk == lexical.hits("Document doc7.", 3)[0].chunk


def test_copies_are_found_once(tmp_path: Path) -> None:
    """A document that stands in two stores, and twice in one, takes one place: the first's."""
    texts = random_texts(6)
    sides = []
    for name, given in (("a", [*texts, texts[0]]), ("b", [texts[1] + "\n", "falcon " + texts[2]])):
        rows = (json.dumps({"id": f"{name}{number}", "text": text}) + "\n" for number, text in enumerate(given))
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
        tokenizer = str(sides[0].folder) if sides else "auto"
        sides.append(prepare([tmp_path / f"{name}.jsonl"], tmp_path / name, tokenizer, vocab_size=300, chunk_size=16))
    for retriever in ("bm25", "hash"):
        found = Retriever(sides, retriever).hits(texts[0][:80], 40)
        assert "a6" not in {hit.document for hit in found}
        assert found[0].document == "a0"
        assert "b0" not in {hit.document for hit in Retriever(sides, retriever).hits(texts[1][:80], 40)}
    assert Retriever(sides).hits("falcon", 4)[0].document == "b1"


def test_stores_whose_words_are_read_otherwise_are_not_searched_together(small_store: Store, tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "c.jsonl", 4, seed=9)
    other = prepare([path], tmp_path / "s", str(small_store.folder), chunk_size=16)
    make_index(other, "bm25", Building(analyzer=Analyzer(stop_words=("river",))))
    assert (Retriever([other]).search(["river"], 1)[0] == -1).all()
    with pytest.raises(StoreError, match="reads words with"):
        Retriever([small_store, other])
    make_index(other, "bm25", Building(analyzer=Analyzer()))
    assert (Retriever([small_store, other]).search(["river"], 1)[0] >= 0).all()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0), (0.0, 1.0)])
def test_many_queries_are_fused_as_each_alone(weights: tuple[float, float]) -> None:
    """To the bit, with results that only one has, and missing ones."""
    rng = np.random.default_rng(3)
    found = []
    for depth in (9, 14):
        ids = np.array([rng.permutation(20)[:depth] for _ in range(30)])
        ids[np.arange(depth) >= rng.integers(0, depth + 1, 30)[:, None]] = -1
        found.append((ids, np.zeros(ids.shape, np.float32)))
    ids, scores = fused(found, weights, 12)
    for query in range(30):
        expected = fuse([ranking[query][ranking[query] >= 0].tolist() for ranking, _ in found], weights)[:12]
        assert ids[query].tolist() == [i for i, _ in expected] + [-1] * (12 - len(expected))
        np.testing.assert_array_equal(scores[query, : len(expected)], np.array([s for _, s in expected], np.float32))
