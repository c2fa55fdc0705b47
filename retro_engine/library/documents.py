"""A document of the live library: what is allowed, and its chunks as tokens, vectors and terms.

A document is its token ids and one end-of-document token; chunk i is tokens i * stride ... i * stride + M - 1. With
stride = M the chunks are the rows of a store made from the same text. Letters: U chunks, M tokens per chunk,
Z embedding width.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from retro_engine.data.corpus import Document
from retro_engine.data.identity import CONTROL, MAX_ID_BYTES, is_unseen
from retro_engine.data.tokenizer import Tokenizer
from retro_engine.errors import StoreError, UsageError
from retro_engine.library.filters import check_metadata
from retro_engine.retrieval.analyzer import Analyzer, Terms, titled, word_edges
from retro_engine.retrieval.embed import embed

MAX_DOCUMENT_BYTES = 8 << 20
MAX_TITLE_BYTES = 4096
MAX_QUERY_CHARACTERS = 1 << 16
NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
EDGE = 16  # tokens after a chunk in which the end of its last word is looked for at first
MAX_EDGE = 256  # and at most: a character may be four tokens
MAX_WORD = 64  # characters of it before the cut
HALF = "\ufffd"


class Embedder(Protocol):
    """Anything that turns texts into vectors; `name` is what a library remembers."""

    name: str

    def encode(self, texts: list[str]) -> np.ndarray:
        """[len(texts), Z] f32."""
        ...


class HashEmbedder:
    """The hashed projections of `embed`, for texts."""

    name = "hash"

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def encode(self, texts: list[str]) -> np.ndarray:
        rows = self.tokenizer.encode_batch(texts)
        lengths = np.array([len(row) for row in rows])
        tokens_UM = np.zeros((len(rows), max(1, int(lengths.max(initial=0)))), np.int64)
        for number, row in enumerate(rows):
            tokens_UM[number, : len(row)] = row
        return embed(tokens_UM, lengths)


@dataclass(frozen=True)
class Prepared:
    """Documents ready to be written: nothing about them can fail any more but the disk."""

    documents: list[Document]
    tokens: list[np.ndarray]  # of each document, of the tokenizer's type
    num_chunks: list[int]  # of each document, U together
    terms: Terms  # of the U chunks
    vectors: np.ndarray | None  # [U, Z] f32, unit length


@dataclass(frozen=True)
class Chunker:
    """Cuts documents as one library does."""

    tokenizer: Tokenizer
    chunk_size: int  # M
    stride: int  # tokens from the start of one chunk to the next, at most M
    embedder: Embedder | None
    width: int | None  # Z; None = the library has no vectors
    analyzer: Analyzer = field(default_factory=Analyzer)

    def prepare(self, documents: Sequence[Document]) -> Prepared:
        """Check, cut and embed. Raises UsageError for a document or an embedder that cannot be used."""
        for document in documents:
            check_document(document)
        rows = self.tokenizer.encode_batch([d.text for d in documents])
        tokens = [np.array([*row, self.tokenizer.eod_id], self.tokenizer.dtype) for row in rows]
        texts, words = self.texts(tokens)
        vectors = None if self.width is None else self.embed(texts)
        counts = [num_chunks(len(t), self.chunk_size, self.stride) for t in tokens]
        return Prepared(
            list(documents), tokens, counts, self.terms([d.title for d in documents], counts, words), vectors
        )

    def terms(self, titles: Sequence[str], counts: Sequence[int], words: Sequence[str]) -> Terms:
        """The terms of documents' chunks, the title's with those of each."""
        if self.analyzer.has_titles:
            words = titled([title for title, count in zip(titles, counts) for _ in range(count)], words)
        return self.analyzer.terms(words)

    def texts(self, documents: Sequence[np.ndarray]) -> tuple[list[str], list[str]]:
        """The text of every chunk of documents of tokens, and what its terms are taken from.

        That has, once more and whole, the word that the chunk's end cuts: every word can be found.
        """
        rows, longer, chunks, places = [], [], [], []
        for tokens in documents:
            ids = tokens.tolist()
            for start in range(0, self.stride * num_chunks(len(ids), self.chunk_size, self.stride), self.stride):
                end = start + self.chunk_size
                rows.append(ids[start:end])
                if end < len(ids):
                    chunks.append(len(rows) - 1)
                    longer.append(ids[start : end + EDGE])
                    places.append((ids, start, end))
        decoded = self.tokenizer.decode_batch(rows + longer)
        texts, words = decoded[: len(rows)], decoded[: len(rows)]
        for chunk, more, place in zip(chunks, decoded[len(rows) :], places):
            words[chunk] += self._whole_word(texts[chunk], more, *place)
        return texts, words

    def _whole_word(self, text: str, more: str, ids: list[int], start: int, end: int) -> str:
        """`cut_word` with as many more tokens as the word has: in a script that the tokenizer does not know, each byte
        is one.
        """
        word, edge = cut_word(text, more), EDGE
        while word and more.rstrip(HALF).endswith(word[1:]) and edge < MAX_EDGE and end + edge < len(ids):
            edge *= 4
            more = self.tokenizer.decode(ids[start : end + edge])
            word = cut_word(text, more)
        return word

    def embed(self, texts: list[str], is_query: bool = False) -> np.ndarray:
        """Unit vectors [U, Z] f32; some embedders read questions in another way. Raises StoreError for NaN, infinity or another width."""
        if self.embedder is None:
            raise UsageError("this library has vectors", "it was opened without its embedder", "open it with one")
        encode = getattr(self.embedder, "encode_queries", self.embedder.encode) if is_query else self.embedder.encode
        vectors = np.asarray(encode(texts), np.float32)
        if vectors.shape != (len(texts), self.width):
            raise StoreError(
                f"embedder {self.embedder.name} returned {vectors.shape}", f"expected {(len(texts), self.width)}"
            )
        if not np.isfinite(vectors).all():
            raise StoreError(f"embedder {self.embedder.name} returned NaN or infinity", "nothing was added")
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


def num_chunks(num_tokens: int, chunk_size: int, stride: int) -> int:
    """Chunks that cover `num_tokens` tokens."""
    return 1 + max(0, -(-(num_tokens - chunk_size) // stride))


def cut_word(text: str, more: str) -> str:
    """With a space before it, the word that the end of `text` cuts; `more` is the same text and what follows it.

    In a script without spaces that is the character before the cut and the one after it, which make a term.
    """
    known = text.rstrip(HALF)  # half of a character's bytes decode to this
    if not more.startswith(known) or known == more:
        return ""
    rest, back = more[len(known) :], known[: -MAX_WORD - 1 : -1]  # what follows, and backwards what is before
    if not known:
        rest = rest.lstrip(HALF)  # of the character that the chunk's start cuts
    edges = word_edges()
    is_mark = edges.mark.match(rest) is not None
    is_within = is_mark or known != text  # a character is cut, and whole in neither chunk
    left = edges.characters_before[is_mark].match(back)
    if left is not None or (is_within and edges.character.match(rest)):
        right = edges.characters_after[is_within].match(rest)
        if right is not None and right[0]:
            return f" {left[0][::-1] if left is not None else ''}{right[0]}"
    before, following = edges.before.match(back), edges.after.match(rest)
    if following is None or before is None or (known == text and not before[0]):
        return ""
    return f" {before[0][::-1]}{following[0]}"


def check_document(document: Document) -> None:
    """Raises UsageError for an id, a title or a text that cannot be kept."""
    check_id(document.id)
    check_seen(document.id)
    name = f"document {document.id!r}"
    if not isinstance(document.title, str) or _utf8_length(document.title) not in range(MAX_TITLE_BYTES + 1):
        raise UsageError(f"{name} has a title that cannot be used", f"a title is text of {MAX_TITLE_BYTES} bytes")
    if not isinstance(document.text, str):
        raise UsageError(f"{name} has no text", f"its text is {type(document.text).__name__}")
    length = _utf8_length(document.text)
    if length < 0 or "\0" in document.text:
        raise UsageError(f"{name} is not text", "it holds half of a surrogate pair or a NUL character")
    if length > MAX_DOCUMENT_BYTES:
        raise UsageError(
            f"{name} has {length:,} bytes", f"at most {MAX_DOCUMENT_BYTES:,} are kept", "split it into several"
        )
    if not document.text.strip():
        raise UsageError(f"{name} is empty", "there is nothing to find in it")
    try:
        check_metadata(document.metadata)
    except UsageError as error:
        raise UsageError(f"{name}: {error.what}", error.why) from None


def check_id(identifier: str) -> None:
    """Raises UsageError unless it is 1 to 512 bytes of printable text without space around it."""
    is_allowed = (
        isinstance(identifier, str)
        and 1 <= _utf8_length(identifier) <= MAX_ID_BYTES
        and identifier == identifier.strip()
        and not any(unicodedata.category(character) in CONTROL for character in identifier)
    )
    if not is_allowed:
        shown = repr(identifier)[:80]
        raise UsageError(
            f"id {shown} is not allowed",
            f"an id is 1 to {MAX_ID_BYTES} bytes of printable text without space around it",
            "give the document another id",
        )


def check_seen(identifier: str) -> None:
    """Raises UsageError for an id with characters that nobody sees, or that show the others in another order: it would
    look like another document's. A document that has one already can be read and deleted.
    """
    for character in identifier:
        if is_unseen(character):
            raise UsageError(
                f"id {ascii(identifier)[:80]} is not allowed",
                f"it holds U+{ord(character):04X}, which is not seen or changes how the rest is",
                "give the document another id",
            )


def check_namespace(namespace: str) -> None:
    if not isinstance(namespace, str) or NAMESPACE.fullmatch(namespace) is None:
        raise UsageError(
            f"namespace {str(namespace)[:80]!r} is not allowed",
            "it is 1 to 64 letters, digits, _ . and -",
            "name another",
        )


def check_query(text: str, k: int) -> None:
    """Raises UsageError for an empty or huge query, or a k below 1."""
    if not isinstance(k, int) or k < 1:
        raise UsageError(f"k={k} cannot be used", "at least one chunk is searched for", "k from 1 up")
    if not isinstance(text, str) or not text.strip() or _utf8_length(text) < 0:
        raise UsageError("the query is empty", "it holds no text", "ask for something")
    if len(text) > MAX_QUERY_CHARACTERS:
        raise UsageError(
            f"the query has {len(text):,} characters",
            f"at most {MAX_QUERY_CHARACTERS:,} are read",
            "ask with less text",
        )


def _utf8_length(text: str) -> int:
    """Bytes of the text in UTF-8, -1 where it holds half of a surrogate pair."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return -1
