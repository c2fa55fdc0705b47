"""What a library keeps: ids, texts and queries that are allowed; chunks as a store's; embedders that misbehave."""

import json
from pathlib import Path
from typing import Any

import apsw
import numpy as np
import pytest
from helpers import write_corpus

from retro_engine.data import files
from retro_engine.data.corpus import Document, Reader
from retro_engine.data.store import Store
from retro_engine.errors import StoreError, UsageError
from retro_engine.library import file as library_file
from retro_engine.library.documents import (
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
from retro_engine.library.library import Library
from retro_engine.retrieval.analyzer import Analyzer, make_analyzer

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


def test_words_of_a_script_that_the_tokenizer_does_not_know(small_store: Store) -> None:
    """Each byte may be a token: a word reaches far over a chunk's end, and a chunk may hold no whole character."""
    text = "　".join(["ｆｕｌｌｗｉｄｔｈ", "достопримечательностями", "Ｌａｔｉｎ", "ὑπερευχαριστηρίοις"] * 4)
    for size in (4, 5, 16):
        batch = Chunker(small_store.tokenizer, size, size, None, None).prepare([Document("a", "", text)])
        assert set(batch.terms.hashes) >= set(Analyzer().query(text)), size


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
        ("the end", "the end. Next", ""),
        ("x C", "x C++ and", " C++"),
        ("x C+", "x C++ and", " C++"),
        ("node.", "node.js is", " node.js"),
        ("a .", "a .NET", " .NET"),
        ("中国", "中国人民", " 国人"),
        ("中国", "中国, a", ""),
        ("中\ufffd", "中国人民", " 中国人"),
        ("手\ufffd", "手é x", " é"),
        ("iPhone", "iPhone手机", ""),
        ("गं", "गंगा के", " गंगा"),
        ("กรุง", "กรุงเทพ", " งเ"),
        ("เป", "เป็นเ", " เป็นเ"),
        ("ﾊ", "ﾊﾟﾝ", " ﾊﾟﾝ"),
        ("ﾊﾟ", "ﾊﾟﾝ", " ﾊﾟﾝ"),
        ("서", "서울은 대", " 서울은"),
        ("3", "3.14", " 3.14"),
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


SCRIPTS = {
    "zh": ("黄山位于安徽省南部，是中国著名的山岳风景区。", "黄山"),
    "ja": ("東京は日本の首都です。", "東京"),
    "ko": ("서울은 대한민국의 수도이다.", "서울"),
    "th": ("กรุงเทพเป็นเมืองหลวงของประเทศไทย", "ประเทศไทย"),
    "hi": ("बनारस गंगा के किनारे बसा एक प्राचीन शहर है।", "गंगा"),
    "nfd": ("Das Cafe\u0301 in Zu\u0308rich ist geschlossen.", "Zürich"),
    "cpp": ("It is written in C++ and C.", "C++"),
}


@pytest.mark.parametrize("chunk_size", [4, 64])
def test_words_of_every_script_are_found(tmp_path: Path, small_store: Store, chunk_size: int) -> None:
    """Also where chunks are so short that they cut words and characters; in the delta, a segment and opened again."""
    Library.create(tmp_path / "library", small_store.tokenizer, chunk_size)
    with Library(tmp_path / "library") as library:
        library.add([Document(name, "", text) for name, (text, _) in SCRIPTS.items()])
        for _ in range(2):
            for name, (_, query) in SCRIPTS.items():
                assert library.search(query, 1)[0].document == name
            library.merge()
    with Library(tmp_path / "library") as library:
        assert [library.search(query, 1)[0].document for _, query in SCRIPTS.values()] == list(SCRIPTS)


def test_titles_are_searched(tmp_path: Path, small_store: Store) -> None:
    Library.create(tmp_path / "library", small_store.tokenizer, 8)
    text = "They lift containers from ships all day long and by night they stand still."
    with Library(tmp_path / "library") as library:
        library.add([Document("c", "Harbour cranes", text), Document("d", "Silos", text), Document("e", "", text)])
        for _ in range(2):
            hits = library.search("harbour", 100)
            assert {hit.document for hit in hits} == {"c"}
            assert sorted(hit.chunk for hit in hits) == list(range(library.entries()[0].chunks)), "with every chunk"
            library.merge()
    library_file.set_analyzer(tmp_path / "library", Analyzer())
    with Library(tmp_path / "library") as library:
        assert {hit.document for hit in library.search("Silos", 100)} == {"d"}, "an index made from the documents again"


def make_first_version(folder: Path, store: Store) -> None:
    """A library as version 1 made it."""
    Library.create(folder, store.tokenizer, 16)
    connection = apsw.Connection(str(folder / "documents.sqlite"))
    rows: list[Any] = connection.execute("SELECT name, value FROM settings").fetchall()
    settings = {name: json.loads(value) for name, value in rows if name not in ("analyzer", "identity", "fingerprint")}
    connection.execute("DELETE FROM settings WHERE name IN ('analyzer', 'identity')")
    mark = json.dumps(files.fingerprint(settings))
    connection.execute("UPDATE settings SET value = ? WHERE name = 'fingerprint'", (mark,))
    connection.execute("PRAGMA user_version = 1")
    connection.close()


def test_a_library_of_version_1_reads_as_it_did_until_it_is_reread(tmp_path: Path, small_store: Store) -> None:
    folder = tmp_path / "library"
    make_first_version(folder, small_store)
    documents = [Document("a", "A title", "river stone"), Document("b", "", "黄山位于安徽省")]
    with Library(folder) as library:
        library.add(documents)
        library.merge()
        assert [hit.document for hit in library.search("River", 3)] == ["a"]
        assert not library.search("黄山", 3) and not library.search("title", 3)
        assert "reading 1" in library.statistics()["words"]
    library_file.set_analyzer(folder, make_analyzer(stop_words="none"))
    with Library(folder) as library:
        assert [hit.document for hit in library.search("黄山", 3)] == ["b"]
        assert [hit.document for hit in library.search("title", 3)] == ["a"]
        assert library.file.analyzer == make_analyzer(stop_words="none")
        library.verify()
    with Library(folder) as library:
        assert library.statistics()["notes"] == [], "made again once"


def test_why_there_is_no_hit(tmp_path: Path, small_store: Store) -> None:
    Library.create(tmp_path / "library", small_store.tokenizer, 16)
    with Library(tmp_path / "library") as library:
        assert "no document" in library.why_nothing("river")
        library.add([Document("a", "", "river stone")])
        assert "stop words" in library.why_nothing("to be or not to be")
        assert "no word" in library.why_nothing("?!")
        assert "none of its words" in library.why_nothing("falcon")
        assert "no document" in library.why_nothing("river", "other")
