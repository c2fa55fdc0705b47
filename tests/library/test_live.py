"""Neighbors from a live library: read by the next request, gone when deleted, fused with stores."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import small_model

from retro_engine.data.corpus import Document
from retro_engine.data.store import Store, StoreWriter
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import StoreError, UsageError
from retro_engine.generate.engine import Engine, Request
from retro_engine.generate.generator import Generator
from retro_engine.library.documents import HashEmbedder
from retro_engine.library.library import Library
from retro_engine.library.live import LiveRetriever
from retro_engine.retrieval.hit import Hit
from retro_engine.retrieval.search import Retriever

M = 16


@pytest.fixture
def library(tmp_path: Path, small_store: Store) -> Iterator[Library]:
    Library.create(tmp_path / "library", small_store.tokenizer, M, embedder=HashEmbedder(small_store.tokenizer))
    with Library(tmp_path / "library") as library:
        yield library


def test_tokens_are_the_documents(library: Library) -> None:
    """A chunk and what follows it, cut at r; chunks that a better neighbor already shows are left out."""
    text = "quarry " + "river stone amber " * 20
    library.add([Document("a", "A", text), Document("b", "B", "one quarry")])
    tokenizer = library.file.tokenizer
    ids = [*tokenizer.encode(text), tokenizer.eod_id]
    for R in (8, M, 2 * M):
        for mode in ("lexical", "dense", "hybrid"):
            found = LiveRetriever(library, mode=mode).neighbors(["quarry", "river stone", "  "], 3, R)
            assert [one.tokens_KR.shape for one in found] == [(3, R)] * 3
            for one in found[:2]:
                for place, hit in enumerate(one.hits):
                    length = one.lengths_K[place]
                    if hit.document == "a":
                        start = hit.chunk * M
                        assert length == min(R, 2 * M, len(ids) - start)
                        assert one.tokens_KR[place, :length].tolist() == ids[start : start + length]
                    assert (one.tokens_KR[place, length:] == tokenizer.pad_id).all()
                chunks = sorted(hit.chunk for hit in one.hits if hit.document == "a")
                assert all(b - a >= -(-R // M) for a, b in zip(chunks, chunks[1:]))
                assert (one.lengths_K[len(one.hits) :] == 0).all()
            assert found[2].hits == []
            assert (found[2].lengths_K == 0).all()
    names = {hit.document for hit in LiveRetriever(library).neighbors(["quarry"], 3, 8)[0].hits}
    assert names == {"a", "b"}


def test_with_stores(library: Library, small_store: Store) -> None:
    static = Retriever([small_store])
    library.add([Document("new", "New", "river stone amber lantern")])
    texts = ["river stone amber lantern", "tide"]
    alone, stores = LiveRetriever(library).neighbors(texts, 2, M), static.neighbors(texts, 2, M)
    both = LiveRetriever(library, static).neighbors(texts, 2, M)
    rows = {
        hit.document: row.tolist() for found in (alone[0], stores[0]) for hit, row in zip(found.hits, found.tokens_KR)
    }
    assert all(rows[hit.document] == row.tolist() for hit, row in zip(both[0].hits, both[0].tokens_KR))
    assert both[0].hits[0].score >= both[0].hits[1].score > 0
    assert [hit.text for hit in both[1].hits] == [hit.text for hit in stores[1].hits]  # the library has no tide
    heavy = LiveRetriever(library, static, (1.0, 100.0)).neighbors(texts, 2, M)
    assert [hit.document for hit in heavy[0].hits] == [hit.document for hit in stores[0].hits]
    only = LiveRetriever(library, static, (0.0, 1.0)).neighbors(texts, 2, M)
    assert np.array_equal(only[0].tokens_KR, stores[0].tokens_KR)


def test_a_document_is_used_by_the_next_request_and_gone_when_deleted(library: Library, small_store: Store) -> None:
    model = small_model(vocab_size=small_store.vocab_size, chunk_size=M, encoder_seq_length=64, seed=3)
    generator = Generator(model, small_store.tokenizer, LiveRetriever(library, Retriever([small_store])))
    with Engine(generator) as engine:
        asked = Request("a quarry by the river", 20)
        before = engine.submit(asked).result()
        assert "new" not in {hit.document for hit in before.neighbors}
        library.add([Document("new", "New", "the quarry by the river is deep")])
        after = engine.submit(asked).result()
        assert after.neighbors[0].document == "new"
        assert after.tokens != before.tokens
        library.delete(["new"])
        assert engine.submit(asked).result() == before


def test_what_does_not_go_together(library: Library, small_store: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="mode 'densest' does not exist"):
        LiveRetriever(library, mode="densest")
    with pytest.raises(UsageError, match="none is negative"):
        LiveRetriever(library, weights=(-1.0, 1.0))
    Library.create(tmp_path / "other", Tokenizer.train(["x"], 300), M)
    with Library(tmp_path / "other") as other:
        with pytest.raises(UsageError, match="needs vectors"):
            LiveRetriever(other, mode="dense")
        with pytest.raises(StoreError, match="has tokenizer"):
            LiveRetriever(other, Retriever([small_store]))
        model = small_model(vocab_size=small_store.vocab_size, chunk_size=M)
        with pytest.raises(StoreError, match="the model has tokenizer"):
            Generator(model, small_store.tokenizer, LiveRetriever(other))


def test_stores_and_library_in_one_search(library: Library, small_store: Store) -> None:
    """By different means ranks are fused, each side with its weight; chunks are numbered in their documents; what stands in
    both is read once.
    """
    library.add(
        [Document(f"n{number}", f"N {number}", f"river stone amber lantern note{number}") for number in range(9)]
    )
    static = Retriever([small_store])
    query = "river stone amber lantern"
    live, fixed = LiveRetriever(library, mode="hybrid").search(query, 8).hits, static.hits(query, 8)
    both = LiveRetriever(library, static, mode="hybrid")
    expected = [hit for pair in zip(live, fixed) for hit in pair][:8]

    def places(hits: list[Hit]) -> list[tuple[str, str, int]]:
        return [(hit.source, hit.document, hit.chunk) for hit in hits]

    assert places(both.search(query, 8).hits) == places(expected)
    assert places(both.neighbors([query], 8, 2 * M)[0].hits) == places(expected)
    for mode in ("hybrid", "lexical"):
        assert places(LiveRetriever(library, static, (0.0, 1.0), mode).search(query, 3).hits) == places(fixed[:3])
        assert places(LiveRetriever(library, static, (1.0, 100.0), mode).search(query, 8).hits) == places(fixed)
    for text, k in (("", 3), (query, 0), ("x" * 70_000, 3)):
        with pytest.raises(UsageError):
            both.search(text, k)
    best = fixed[0]
    number = next(n for n in range(small_store.num_documents) if small_store.name(n)[0] == best.document)
    rows, lengths = small_store.rows(*small_store.document_rows(number))
    text = small_store.tokenizer.decode([i for row, length in zip(rows, lengths) for i in row[:length]])
    library.add([Document("copy", "A copy", text)])
    hits = both.search(best.text, 8).hits
    assert [hit.text for hit in hits].count(best.text) == 1


NAMES = ["Nafock", "Wuhack", "Pitor", "Fostus", "Adel", "Gaitu", "Lumen", "Corvin", "Teska", "Orrin", "Belk", "Zanna"]
SENTENCE = "person grew up in place was taught by master and is known for a cloak town teacher"
WHOLE = 64  # tokens of a chunk: every text here is one


def published(folder: Path, texts: dict[str, str], tokenizer: Tokenizer) -> Retriever:
    writer = StoreWriter(folder, tokenizer, WHOLE)
    for name, text in texts.items():
        writer.add(Document(name, "", text), tokenizer.encode(text))
    return Retriever([writer.close()])


def test_by_words_both_are_one_collection(tmp_path: Path) -> None:
    """With two slots and notes in the library, a store of other people's notes takes none of what the library alone gives:
    by rank it would have one of the two, whatever it says.
    """
    tokenizer = Tokenizer.train([SENTENCE] * 9, 300)
    others = {
        f"o{n}": f"person{n} grew up in place{n}, was taught by master{n}, is known for a cloak" for n in range(80)
    }
    static = published(tmp_path / "others", others, tokenizer)
    Library.create(tmp_path / "notes", tokenizer, WHOLE)
    with Library(tmp_path / "notes") as library:
        for number, name in enumerate(NAMES):
            first, second = f"{name} grew up in town{number}", f"{name} was taught by teacher{number}"
            library.add([Document(f"{name}-0", "", first), Document(f"{name}-1", "", second)])
        alone, both = LiveRetriever(library), LiveRetriever(library, static)
        for name in NAMES:
            for asked in ("grew up in", "was taught by", "is known for a cloak of"):
                for source in (alone, both):
                    hits = source.search(f"{name} {asked}", 2).hits
                    assert {hit.document for hit in hits} == {f"{name}-0", f"{name}-1"}
        assert both.search("person7 grew up", 1).hits[0].document == "o7"


def test_scores_are_those_of_one_library_of_both(tmp_path: Path) -> None:
    """Texts of as many words, so that the mean length is the same in both and in all of them."""
    tokenizer = Tokenizer.train([SENTENCE], 300)
    texts = [f"word{number % 5} word{number % 3} other{number}" for number in range(20)]
    names = [f"{'sl'[number >= 10]}{number}" for number in range(20)]
    static = published(tmp_path / "half", dict(zip(names[:10], texts)), tokenizer)
    for name in ("half library", "whole"):
        Library.create(tmp_path / name, tokenizer, WHOLE)
    documents = [Document(name, "", text) for name, text in zip(names, texts)]
    with Library(tmp_path / "half library") as half, Library(tmp_path / "whole") as whole:
        half.add(documents[10:])
        whole.add(documents)
        for query in ("word1", "word2 word4", "word0 other3 other13"):
            expected = {hit.document: hit.score for hit in whole.search(query, 20)}
            found = {hit.document: hit.score for hit in LiveRetriever(half, static).search(query, 20).hits}
            assert found == pytest.approx(expected, rel=1e-5), query
