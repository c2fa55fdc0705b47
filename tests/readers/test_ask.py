"""Questions to documents: what is read, what is answered, where it stands, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from forks import Fork
from reader_helpers import ask_alone

import retro_engine
from retro_engine.errors import MissingInputError, UsageError
from retro_engine.generate.generator import Generator
from retro_engine.readers.ask import (
    NOT_FOUND,
    Asker,
    answer_of,
    checked_question,
    marked,
    passages_of,
    request_of,
    terminal_marks,
)
from retro_engine.readers.reader_file import Reader, read_reader
from retro_engine.readers.spans import Span
from retro_engine.retrieval.hit import Hit


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RETRO_HOME", str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "castle.md").write_text("# A castle\n\nThe castle was built in 1302 by Adelheid.")
    (tmp_path / "in" / "river.txt").write_text("The river Adda is long. " * 6)
    (tmp_path / "in" / "東京.txt").write_text("東京は日本の首都です。川は荒川です。")
    return tmp_path / "in"


def says(monkeypatch: pytest.MonkeyPatch, text: str) -> list[Any]:
    """Let every model say this; the requests that it got."""
    asked: list[Any] = []
    generate_all = Generator.generate_all

    def generated(self: Generator, requests: list[Any], deterministic: bool = False) -> list[Any]:
        asked.extend(requests)
        out = generate_all(self, requests, deterministic)
        for one in out:
            one.text = text
        return out

    monkeypatch.setattr(Generator, "generate_all", generated)
    return asked


def test_an_answer_and_where_it_stands(
    reader_folder: Path, base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asker = Asker([folder], reader_folder, base)
    asked = says(monkeypatch, " 1302\n")
    answer = asker.ask("When was  the castle\nbuilt?")
    assert (answer.question, answer.answer, answer.found) == ("When was the castle built?", "1302", True)
    assert answer.span is not None
    source = answer.sources[answer.span.passage]
    assert source.document == str(folder / "castle.md")
    assert source.title == "A castle"
    assert source.text[answer.span.start : answer.span.end] == "1302"
    assert len(answer.sources) <= 3
    assert answer.seconds > 0
    (request,) = asked
    assert request.prompt == "question: When was the castle built?\nanswer:"
    assert request.max_new_tokens == 6
    assert request.neighbors == [answer.sources[0].text], "of several passages one is read"
    shown = answer.to_json()
    assert shown["span"] == {
        "source": answer.span.passage,
        "start": answer.span.start,
        "end": answer.span.end,
        "text": "1302",
    }
    assert len({one["score"] for one in shown["sources"]}) == len(shown["sources"])
    assert asker.generator.encodings is not None
    before = asker.generator.encodings.stats.misses
    asker.ask("When was the castle built?")
    assert before == len(answer.sources) == asker.generator.encodings.stats.misses, "what was encoded is kept"


def test_passages_are_as_long_as_the_reader_reads(reader_folder: Path, base: Path, folder: Path) -> None:
    asker = Asker(folder, reader_folder, base, k=2, max_new_tokens=2)
    answer = asker.ask("river")
    assert len(answer.sources) == 2, "of one document, not overlapping"
    assert {len(asker.tokenizer.encode(source.text)) for source in answer.sources} == {24}
    assert len(asker.generator.generate(asker.reader.prompt("x"), asker.reader.max_new_tokens).tokens) <= 2


@pytest.mark.parametrize(
    "text",
    [
        "not in the documents",
        "It is not in the documents.",
        " Not in the documents. \nmore",
        "",
        "\n",
        ' "not in the documents"',
    ],
)
def test_the_documents_do_not_hold_it(reader_folder: Path, text: str) -> None:
    hit = Hit("a.txt", "A", 0, 1.5, "The river", "", "library")
    answer = answer_of(read_reader(reader_folder), "Who?", [(hit, "The river")], text)
    assert (answer.answer, answer.found, answer.span) == (NOT_FOUND, False, None)
    assert [source.text for source in answer.sources] == ["The river"]


def test_what_no_passage_matches_asks_no_model(
    reader_folder: Path, base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asker = Asker([folder], reader_folder, base)
    asked = says(monkeypatch, "x")
    answer = asker.ask("Zanzibar?")
    assert (answer.found, answer.answer, answer.sources) == (False, NOT_FOUND, [])
    assert answer.why == "none of its words is in a document"
    assert asker.ask("???").why
    assert not asked


def test_other_languages(reader_folder: Path, base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asker = Asker([folder], reader_folder, base)
    says(monkeypatch, "荒川")
    answer = asker.ask("東京の川は?")
    assert answer.span is not None
    assert answer.sources[answer.span.passage].document == str(folder / "東京.txt")
    assert asker.ask("Как называется река?").why == "none of its words is in a document"


def test_documents_are_followed(reader_folder: Path, base: Path, folder: Path) -> None:
    asker = Asker([folder], reader_folder, base)
    assert asker.ask("Zanzibar?").sources == []
    (folder / "new.html").write_text("<title>News</title><p>Zanzibar is an island.</p>")
    (source,) = asker.ask("Zanzibar?").sources
    assert (source.title, source.document) == ("News", str(folder / "new.html"))
    assert asker.synced is not None
    assert asker.synced.num_read == 1


def test_questions_that_are_refused(reader_folder: Path, base: Path, folder: Path) -> None:
    for question, why in (("", "empty"), (" \n\t", "empty"), ("x" * 10_000, "10,000 characters"), ("a\0b", "not text"), ("\ud800", "not text")):  # fmt: skip
        with pytest.raises(UsageError, match=why):
            checked_question(question)
        with pytest.raises(UsageError, match=why):
            retro_engine.ask([folder], question, reader_folder, base)
    assert checked_question("x" * 2000) == "x" * 2000
    for more in ({"k": 0}, {"k": 65}, {"max_new_tokens": 0}, {"dtype": "fp8"}):
        with pytest.raises(UsageError, match="cannot be used|does not exist"):
            Asker([folder], reader_folder, base, **more)
    with pytest.raises(UsageError, match="there are no documents"):
        Asker([], reader_folder, base)
    with pytest.raises(MissingInputError, match="does not exist"):
        retro_engine.ask(folder / "gone", "Who?", reader_folder, base)


def test_in_python(reader_folder: Path, base: Path, folder: Path) -> None:
    answer = retro_engine.ask(folder, "Who built the castle?", reader=reader_folder, base=base, k=1)
    assert len(answer.sources) == 1
    assert answer.found == (answer.answer != NOT_FOUND)


def test_two_processes_over_one_library(reader_folder: Path, base: Path, folder: Path, tmp_path: Path) -> None:
    said = [tmp_path / f"said by {number}" for number in range(2)]
    both = [Fork(ask_alone, folder, reader_folder, base, out=out, errors=tmp_path / "errors") for out in said]
    assert [one.wait(300) for one in both] == [0, 0], (tmp_path / "errors").read_text()
    assert [out.read_text().strip() for out in said] == [str(folder / "castle.md")] * 2


def test_the_parts(reader_folder: Path) -> None:
    """Of what a server answers too."""
    reader: Reader = read_reader(reader_folder)
    hit = Hit("a.txt", "A title", 2, 1.5, "The river", "", "library")
    request = request_of(reader, "Who?", [(hit, "The river")])
    assert (request.neighbors, request.stop) == (["The river"], ("\n",))
    assert callable(passages_of)


def test_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "A  river\nin \x1b[31mItaly, long\tand wide."
    start = text.index("Italy")
    assert marked(text, Span(0, start, start + 5, "Italy"), "[[", "]]") == "A river in [31m[[Italy]], long and wide."
    assert marked(text, None, "[[", "]]") == "A river in [31mItaly, long and wide."
    assert marked("Adda", Span(0, 0, 4, "Adda"), "<", ">") == "<Adda>"
    long = "many words " * 100
    shown = marked(f"{long}Adda {long}", Span(0, len(long), len(long) + 4, "Adda"), "<", ">")
    assert shown.startswith("... many words") or shown.startswith("... words many")
    assert "words <Adda> many words" in shown
    assert shown.endswith(" ...")
    assert len(shown) < 520
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert terminal_marks(is_terminal=True)[0] == "\x1b[7m"
    assert terminal_marks(is_terminal=False) == ("[[", "]]")
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal_marks(is_terminal=True) == ("[[", "]]")
