"""What a library's vectors are made by: hashed words, or a SentenceTransformers model, which the library remembers.

A model is known by its files' fingerprint, and loaded when a vector is needed for the first time: a library of vectors is
searched by words without it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import UsageError
from retro_engine.library.documents import Embedder, HashEmbedder
from retro_engine.retrieval.embed import Embedding, StoreEmbedder, choose_embedding, open_embedder, short_name

HASH, NONE = HashEmbedder.name, "none"
SAMPLE = ["A text to see how wide vectors are.", "Another one."]


class SentenceEmbedder:
    """A SentenceTransformers model, in fp32 so that every machine makes the same vectors."""

    def __init__(self, embedding: Embedding, model: str):
        """`model`: minilm, a folder, or a hub id."""
        self.embedding, self.model, self.name = embedding, model, embedding.name

    @property
    def settings(self) -> dict[str, Any]:
        """What a library keeps to open it again."""
        return {"model": self.model, "fingerprint": self.embedding.fingerprint}

    def encode(self, texts: list[str]) -> np.ndarray:
        """Vectors [texts, Z] f32 of documents. Raises StoreError where the model is another one by now."""
        return self._opened().documents(texts)

    def encode_queries(self, texts: list[str]) -> np.ndarray:
        """Of questions, for which some models have a prompt of its own."""
        return self._opened().queries(texts)

    def _opened(self) -> StoreEmbedder:
        return open_embedder(self.embedding, self.model)


def new_embedder(name: str | None, tokenizer: Tokenizer) -> Embedder | None:
    """By a name of the command line: none, hash, minilm, a model's folder or hub id.

    Raises MissingExtraError, MissingInputError or StoreError for a model that cannot be loaded.
    """
    if name in (None, NONE):
        return None
    if name == HASH:
        return HashEmbedder(tokenizer)
    assert name is not None
    model = str(Path(name).resolve()) if Path(name).is_dir() else name
    return SentenceEmbedder(choose_embedding(model, SAMPLE, "fp32")[0], model)


def own_embedder(settings: Mapping[str, Any], tokenizer: Tokenizer) -> Embedder | None:
    """The one that a library was made with; None where it has none, or one that only its maker can open."""
    if settings["embedder"] == HASH:
        return HashEmbedder(tokenizer)
    known = settings.get("embedder_model")
    if known is None:
        return None
    return SentenceEmbedder(Embedding(settings["embedder"], known["fingerprint"], settings["width"]), known["model"])


def check_named(settings: Mapping[str, Any], name: str, where: str) -> None:
    """Raises UsageError where a library was made with another embedder than the one that is named."""
    made = settings["embedder"] or NONE
    if made != (name if name in (NONE, HASH) else short_name(name)):
        raise UsageError(
            f"--embedder {name} cannot be used",
            f"{where} was made with {made}",
            "leave it out, or make another library",
        )
