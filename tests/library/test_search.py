"""Searching a library: BM25 as bm25s computes it, dense as brute force, fusion by hand, stores and library together."""

from pathlib import Path

import bm25s
import numpy as np
import pytest
from helpers import WORDS

from retro_engine.data.corpus import Document
from retro_engine.data.store import Store
from retro_engine.library.documents import HashEmbedder
from retro_engine.library.library import Library
from retro_engine.retrieval.analyzer import Analyzer
from retro_engine.retrieval.bm25 import K1, B


def texts_of(count: int) -> dict[str, str]:
    rng = np.random.default_rng(0)
    return {f"d{i}": " ".join(rng.choice(WORDS, int(rng.integers(2, 12)))) for i in range(count)}


@pytest.fixture
def library(tmp_path: Path, small_store: Store) -> Library:
    """80 one-chunk documents over a segment with deletions and a delta."""
    Library.create(tmp_path / "library", small_store.tokenizer, 64, embedder=HashEmbedder(small_store.tokenizer))
    library = Library(tmp_path / "library")
    documents = [Document(name, "", text) for name, text in texts_of(80).items()]
    library.add([*documents[:60], Document("x", "", "river stone")])
    library.merge()
    library.add(documents[50:])
    library.delete(["x", *[f"d{i}" for i in range(0, 80, 7)]])
    return library


@pytest.fixture
def alive() -> dict[str, str]:
    return {name: text for name, text in texts_of(80).items() if int(name[1:]) % 7}


def test_lexical_scores_are_those_of_bm25s(library: Library, alive: dict[str, str]) -> None:
    names = list(alive)
    index = bm25s.BM25(k1=K1, b=B)
    index.index(bm25s.tokenize(list(alive.values()), stopwords="en", show_progress=False), show_progress=False)
    for query in ("river", "river stone amber", " ".join(WORDS), "tide cedar unknown"):
        expected = index.get_scores(
            [term for term in dict.fromkeys(Analyzer().words(query)) if term in index.vocab_dict]
        )
        hits = library.search(query, 1000)
        assert {hit.document for hit in hits} == {names[i] for i in np.flatnonzero(expected > 0)}
        for hit in hits:
            assert hit.score == pytest.approx(expected[names.index(hit.document)], rel=1e-4)
        assert library.search(query, 7) == hits[:7]


def test_dense_is_exact(library: Library, alive: dict[str, str]) -> None:
    embedder = HashEmbedder(library.file.tokenizer)
    vectors = embedder.encode(list(alive.values()))
    hits = library.search("river stone amber", 1000, "dense")
    expected = dict(zip(alive, vectors @ embedder.encode(["river stone amber"])[0]))
    assert {hit.document for hit in hits} == alive.keys()
    for hit in hits:
        assert hit.score == pytest.approx(expected[hit.document], abs=0.02)  # the end of the document is a token


def test_hybrid_fuses_the_ranks(library: Library) -> None:
    query = "river stone amber"
    ranked = {mode: [h.document for h in library.search(query, 100, mode)] for mode in ("lexical", "dense")}
    for weights in ((1.0, 1.0), (3.0, 0.5), (1.0, 0.0), (0.0, 1.0)):
        scores: dict[str, float] = {}
        for weight, names in zip(weights, ranked.values()):
            for place, name in enumerate(names, 1):
                scores[name] = scores.get(name, 0) + weight / (60 + place)
        hits = library.search(query, 10, "hybrid", weights=weights)
        best = sorted((score for score in scores.values() if score), reverse=True)[: len(hits)]
        assert [hit.score for hit in hits] == pytest.approx(best)
        assert all(hit.score == pytest.approx(scores[hit.document]) for hit in hits)
