"""What a library keeps: ids, texts and queries that are allowed; chunks as a store's; embedders that misbehave."""

from pathlib import Path

import numpy as np
import pytest
from helpers import write_corpus

from retro_engine.data.corpus import Document, Reader
from retro_engine.data.store import Store
from retro_engine.errors import StoreError, UsageError
from retro_engine.retrieval.analyzer import Analyzer
from retro_engine.retrieval.library_documents import (
    MAX_DOCUMENT_BYTES,
    MAX_QUERY_CHARACTERS,
    Chunker,
    HashEmbedder,
    check_document,
    check_id,
    check_namespace,
    check_query,
    cut_word,
    num_chunks,
)

BAD_IDS = ["", " ", " a", "a ", "a\nb", "a\0b", "\x7f", "a\u2028b", "\ud800", "x" * 513, "é" * 257, 7, None]


@pytest.mark.parametrize("identifier", BAD_IDS, ids=repr)
def test_ids_that_are_not_allowed(identifier: str) -> None:
    with pytest.raises(UsageError, match="is not allowed"):
        check_id(identifier)


@pytest.mark.parametrize("identifier", ["a", "docs/a.md:3", "Ünïcode 文書", "a b", "..", "x" * 512, "%00"])
def test_ids_that_are_allowed(identifier: str) -> None:
    check_id(identifier)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is empty"),
        (" \n\t", "is empty"),
        ("a\0b", "is not text"),
        ("\ud800", "is not text"),
        ("x" * (MAX_DOCUMENT_BYTES + 1), "bytes"),
        ("é" * (MAX_DOCUMENT_BYTES // 2 + 1), "bytes"),
        (None, "has no text"),
        (b"bytes", "has no text"),
    ],
    ids=["empty", "space", "NUL", "surrogate", "large", "large in UTF-8", "None", "bytes"],
)
def test_texts_that_are_not_allowed(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        check_document(Document("a", "", text))


@pytest.mark.parametrize("title", ["t" * 4097, "\ud800", None], ids=["long", "surrogate", "None"])
def test_titles_that_are_not_allowed(title: str) -> None:
    with pytest.raises(UsageError, match="title"):
        check_document(Document("a", title, "text"))


@pytest.mark.parametrize("namespace", ["", ".hidden", "a/b", "a b", "x" * 65, "é", None, "-a"])
def test_namespaces_that_are_not_allowed(namespace: str) -> None:
    with pytest.raises(UsageError, match="namespace"):
        check_namespace(namespace)


def test_queries_that_are_not_allowed() -> None:
    check_query("a" * MAX_QUERY_CHARACTERS, 10**9)
    for text in ("", "  ", "\ud800"):
        with pytest.raises(UsageError, match="empty"):
            check_query(text, 1)
    with pytest.raises(UsageError, match="1,000,000 characters"):
        check_query("a" * 1_000_000, 1)
    for k in (0, -1, 1.5):
        with pytest.raises(UsageError, match="cannot be used"):
            check_query("a", k)  # type: ignore[arg-type]


@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 100])
def test_chunks_cover_every_token(length: int, stride: int) -> None:
    count = num_chunks(length, 8, stride)
    covered = {token for chunk in range(count) for token in range(chunk * stride, min(length, chunk * stride + 8))}
    assert covered == set(range(length))
    assert count == 1 or (count - 2) * stride + 8 < length, "one chunk fewer would do"


def test_without_overlap_chunks_are_the_rows_of_a_store(small_store: Store, tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "corpus.jsonl", 40)
    chunker = Chunker(small_store.tokenizer, 16, 16, None, None)
    documents = [row for row in Reader().read([path]) if isinstance(row, Document)]
    texts, _ = chunker.texts(chunker.prepare(documents).tokens)
    assert texts == [text for batch in small_store.texts() for text in batch]


def test_every_word_is_whole_in_some_chunk(small_store: Store) -> None:
    text = " ".join(f"lighthouse{i} ünïcödé{i} snow-covered_{i}, x{i}" for i in range(30))
    for size, stride in ((5, 5), (8, 3), (16, 16)):
        chunker = Chunker(small_store.tokenizer, size, stride, None, None)
        batch = chunker.prepare([Document("a", "", text)])
        assert set(batch.terms.hashes) >= set(Analyzer().query(text))
        texts, words = chunker.texts(batch.tokens)
        assert all(word.startswith(own) for own, word in zip(texts, words))


def test_cut_words() -> None:
    for text, more, word in (
        ("a riv", "a river bank", " river"),
        ("a river", "a river bank", ""),
        ("a river ", "a river bank", ""),
        ("a \ufffd", "a über", " über"),
        ("a f\ufffd", "a für", " für"),
        ("a", "b", ""),  # a decoder that does not give the same text again
        ("", "river", ""),
        ("a river", "a river", ""),
    ):
        assert cut_word(text, more) == word, (text, more)


class Broken:
    name = "broken"

    def __init__(self, value: float, width: int):
        self.value, self.width = value, width

    def encode(self, texts: list[str]) -> np.ndarray:
        return np.full((len(texts), self.width), self.value, np.float32)


def test_embedders_that_misbehave(small_store: Store) -> None:
    documents = [Document("a", "", "some text")]
    for embedder, why in ((Broken(np.nan, 4), "NaN"), (Broken(np.inf, 4), "infinity"), (Broken(1, 5), r"\(1, 5\)")):
        with pytest.raises(StoreError, match=why):
            Chunker(small_store.tokenizer, 16, 16, embedder, 4).prepare(documents)
    with pytest.raises(UsageError, match="without its embedder"):
        Chunker(small_store.tokenizer, 16, 16, None, 4).prepare(documents)
    zero = Chunker(small_store.tokenizer, 16, 16, Broken(0, 4), 4).prepare(documents)
    assert zero.vectors is not None
    assert not zero.vectors.any(), "a vector of zeros stays one"


def test_the_hash_embedder_gives_what_a_store_gives(small_store: Store) -> None:
    from retro_engine.retrieval.embed import embed

    text = small_store.text(0)
    ids = np.array([small_store.tokenizer.encode(text)])
    expected = embed(ids, np.array([ids.shape[1]]))
    np.testing.assert_array_equal(HashEmbedder(small_store.tokenizer).encode(["", text])[1:], expected)
