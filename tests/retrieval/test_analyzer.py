"""One reading of words for every script: what is found, what is dropped, how it is recorded, and version 1 as it was."""

import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_engine.errors import MissingExtraError, StoreError, UsageError
from retro_engine.retrieval.analyzer import ENGLISH, FIRST, Analyzer, from_json, make_analyzer

ODD = "The café's naïve_x İSTANBUL ǅ ß ﬁn x2 a_b — 北京市 ½½ ⅣⅣ ١٢٣ e\u0301e\u0301 \U0001d7d8\U0001d7d8 is not"


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("黄山位于安徽省南部，是中国著名的山岳风景区。", "黄山"),
        ("黄山位于安徽省南部，是中国著名的山岳风景区。", "山"),
        ("東京は日本の首都です。コンピューター", "首都"),
        ("コンピューターを買う", "コンピュータ"),
        ("ﾊﾝｶｸの文字", "ハンカク"),
        ("서울은 대한민국의 수도이다.", "서울"),
        ("새 책을 샀다", "책"),
        (unicodedata.normalize("NFD", "서울은 수도이다"), "서울"),
        ("กรุงเทพเป็นเมืองหลวงของประเทศไทย", "ประเทศ"),
        ("ພາສາລາວແມ່ນພາສາ", "ພາສາ"),
        ("ភ្នំពេញជារាជធានី", "ភ្នំពេញ"),
        ("ရန်ကုန်မြို့", "ရန်ကုန်"),
        ("बनारस गंगा के किनारे", "गंगा"),
        ("مُحَمَّد أحمد", "محمد"),
        ("أحمد", "احمد"),
        ("שָׁלוֹם", "שלום"),
        (unicodedata.normalize("NFD", "Das Café in Zürich"), "Café"),
        ("Das Café in Zürich", "zurich"),
        ("STRASSE", "Straße"),
        ("ΑΘΗΝΑ", "Αθήνα"),
        ("ёлка", "елка"),
        ("İSTANBUL Işık", "istanbul"),
        ("l’œuvre", "OEUVRE"),
        ("Größe: 12㎏ ﬁn", "fin"),
        ("soft\u00adhyphen zero\u200djoined", "softhyphen"),
        ("x plus y", "x"),
        ("vitamin C helps", "c"),
        ("written in C++.", "C++"),
        ("C++17 is out", "c++"),
        ("the F# language", "F#"),
        ("a .NET program", ".net"),
        ("ASP.NET", "asp"),
        ("run Node.js now", "node.js"),
        ("run Node.js now", "node"),
        ("write to john.doe@example.com!", "john.doe@example.com"),
        ("AT&T called", "at&t"),
        ("in the U.S. and", "US"),
        ("a total of 1,234,567 items", "1234567"),
        ("pi is 3.14", "3.14"),
        ("version 1.2.3 of 2024-05-17", "2024"),
        ("call snake_case here", "snake"),
        ("call snake_case here", "snake_case"),
        ("١٢٣ items", "123"),
        ("iPhone手机", "手机"),
    ],
)
def test_what_is_found(text: str, query: str) -> None:
    found, asked = set(Analyzer().terms([text]).hashes.tolist()), Analyzer().query(query).tolist()
    assert asked
    assert found & set(asked), (Analyzer().words(text), Analyzer().words(query, True))


def test_what_a_question_tells_apart() -> None:
    """The whole beside its parts: who asks for C++ finds it before C, and C# not as C++."""
    cpp, csharp, c = (set(Analyzer().query(text).tolist()) for text in ("C++", "C#", "C"))
    assert c < cpp and c < csharp and len(cpp & csharp) == 1
    assert Analyzer().words("The castle isn't Adelheid's, it's ours: 10:30!") == [
        *("castle", "isn", "adelheid", "ours", "10", "30"),
    ]


def test_runs_without_spaces() -> None:
    assert Analyzer().words("黄山市 山 です") == ["黄", "黄山", "山", "山市", "市", "山", "です"]
    assert Analyzer().words("黄山市 山", is_query=True) == ["黄山", "山市", "山"]
    assert Analyzer().words("서울은 책", is_query=True) == ["서울", "울은", "서울은", "책"]


def check(texts: list[str], analyzer: Analyzer) -> None:
    """Counted terms are the words, each hashed as it is when it stands alone among many texts."""
    terms = analyzer.terms(texts)
    first = 0
    for text, end, length in zip(texts, terms.ends.tolist(), terms.lengths.tolist()):
        alone = analyzer.terms([text])
        assert terms.hashes[first:end].tolist() == alone.hashes.tolist(), text
        assert terms.counts[first:end].tolist() == alone.counts.tolist(), text
        assert (np.diff(terms.hashes[first:end].astype(object)) > 0).all()
        assert length == len(analyzer.words(text)) == int(terms.counts[first:end].sum())
        assert set(analyzer.query(text).tolist()) <= set(terms.hashes[first:end].tolist()) | alone_characters(text)
        first = end
    assert first == len(terms.hashes) == len(terms.counts)


def alone_characters(text: str) -> set[int]:
    """What only a question can have: nothing, but for the whole of it."""
    return set(Analyzer().terms([text], is_query=True).hashes.tolist()) - set(Analyzer().terms([text]).hashes.tolist())


def test_words_are_counted() -> None:
    texts = [
        ODD,
        "",
        "a b c",
        "the of and",
        "river River RIVER stone",
        "x" * 1000,
        "word " * 700,
        "山" * 300,
        "a." * 90,
    ]
    check(texts, Analyzer())
    assert alone_characters(" ".join(texts)) == set()


@settings(max_examples=10_000 if os.environ.get("RETRO_CAMPAIGN") else 200, deadline=None)
@given(st.lists(st.text(st.characters() | st.sampled_from("a1.,@&_+#'山カ서ก็ा\u0301 \u200d"), max_size=40), max_size=4))
def test_any_text(texts: list[str]) -> None:
    check(texts, Analyzer())
    assert alone_characters(" ".join(texts)) == set()


def first_words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w\w+", text.lower()) if word not in ENGLISH]


@settings(max_examples=10_000 if os.environ.get("RETRO_CAMPAIGN") else 40, deadline=None)
@given(st.lists(st.text(max_size=60), max_size=4))
def test_version_1_reads_as_it_did(texts: list[str]) -> None:
    terms = FIRST.terms([ODD, *texts])
    first = 0
    for text, end in zip([ODD, *texts], terms.ends.tolist()):
        words = first_words(text)
        expected = Counter(int(FIRST.query(word)[0]) for word in words)
        assert dict(zip(terms.hashes[first:end].tolist(), terms.counts[first:end].tolist())) == expected, text
        assert FIRST.words(text) == words
        first = end


def test_hashes_do_not_change() -> None:
    """They are in files."""
    for analyzer, accented in ((FIRST, "été"), (Analyzer(), "ete")):
        assert analyzer.query("retro").tolist() == [10661994062934669438]
        assert analyzer.query(accented).tolist() == FIRST.query(accented).tolist()
    assert FIRST.query("été").tolist() == [7497643197324195883]
    assert Analyzer().query("été").tolist() == Analyzer().query("ete").tolist()
    wholes = [int(set(Analyzer().query(text).tolist()).difference(Analyzer().query("c net").tolist()).pop())
              for text in ("C++", ".NET", "黄山")]  # fmt: skip
    assert wholes == [725558044049671760, 11587519681347236427, 4511730298255695505]


def test_counts_end_at_65535() -> None:
    terms = Analyzer().terms(["river " * 70_000])
    assert (terms.counts.tolist(), terms.lengths.tolist()) == ([65535], [70_000])


def test_why_a_question_finds_nothing() -> None:
    assert "stop words (to, be, or, not)" in Analyzer().why_nothing("to be or not to be")
    assert "stop words (it)" in Analyzer().why_nothing("IT")
    assert "no word" in Analyzer().why_nothing("?! 🙂")
    assert Analyzer().why_nothing("the river") == ""
    assert make_analyzer(stop_words="none").why_nothing("to be") == ""
    assert "stop words" in FIRST.why_nothing("to be")


def test_stop_words(tmp_path: Path) -> None:
    german = make_analyzer(stop_words="de")
    assert german.words("der Fluss und the river") == ["fluss", "the", "river"]
    assert make_analyzer(stop_words="german") == german
    assert make_analyzer(stop_words="zh").words("他们的山", is_query=True) == ["们的", "的山"]
    path = tmp_path / "stops.txt"
    path.write_text("\ufeffCafé\nriver\n\n", encoding="utf-8")
    own = make_analyzer(stop_words=str(path))
    assert own.stop_words == ("Café", "river")
    assert own.words("the CAFE river") == ["the"]
    assert from_json(own.to_json(), "x") == own
    for name, content in (("none.txt", b""), ("latin.txt", b"caf\xe9\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError):
            make_analyzer(stop_words=str(tmp_path / name))
    with pytest.raises(UsageError, match="englisch"):
        make_analyzer(stop_words="englisch")


def test_stemmer() -> None:
    pytest.importorskip("Stemmer")
    english = make_analyzer("english")
    assert set(english.query("running castles").tolist()) == set(english.query("runs castle").tolist())
    assert set(english.query("castles 山水 C++").tolist()) >= set(Analyzer().query("castl 山水 C++").tolist())
    french = make_analyzer("fr", "fr")
    assert french.query("nationalité").tolist() == french.query("nationalités").tolist()
    assert from_json(french.to_json(), "x") == french
    assert english.why_nothing("to be") and not english.why_nothing("beings")
    with pytest.raises(UsageError, match="englsh"):
        make_analyzer("englsh")


def test_a_stemmer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "Stemmer", None)
    with pytest.raises(MissingExtraError, match="PyStemmer"):
        make_analyzer("english")


def test_records_that_are_not_known() -> None:
    assert from_json(None, "x") == FIRST
    good = Analyzer().to_json()
    for bad in ({}, {**good, "version": 3}, {**good, "stop_words": [1]}, {**good, "stemmer": 1}, [], "x"):
        with pytest.raises(StoreError):
            from_json(bad, "x")
