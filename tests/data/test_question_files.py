"""Question files: every layout that people bring is read, and every row that lacks something is named with its line."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from retro_engine.data.question_files import Question, read_questions
from retro_engine.errors import MissingInputError, StoreError


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_the_forms_of_a_row(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl",
        {"question": "Who built it?", "answer": "Adelheid", "neighbors": ["Adelheid built it."]},
        {"id": "x", "question": "When? ", "answers": ["1302", "in 1302"], "documents": ["d1", "d2"]},
        "",
        {"question": "Where?", "answers": ["here"], "passage": "d3", "ctxs": ["a"]},
        {"messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "I."}, {"role": "user", "content": "Which tower?"},
            {"role": "assistant", "content": "The north one."}], "neighbors": ["It is the north tower."]},
    )  # fmt: skip
    one, two, three, four = read_questions(path)
    assert one == Question(
        "1", "question: Who built it?\nanswer:", "Who built it?", ("Adelheid",), ("Adelheid built it.",), (), 1
    )
    assert (two.id, two.prompt, two.answers) == ("x", "question: When?\nanswer:", ("1302", "in 1302"))
    assert two.documents == ("d1", "d2")
    assert (three.documents, three.neighbors, three.line) == (("d3",), ("a",), 4)
    assert four.prompt == "system: Be brief.\nuser: Who?\nassistant: I.\nuser: Which tower?\nassistant:"
    assert (four.query, four.answers) == ("Which tower?", ("The north one.",))
    assert read_questions(path, "Q {question} A")[0].prompt == "Q Who built it? A"


GOOD = {"question": "Who?", "answer": "I"}


@pytest.mark.parametrize(("row", "message"), [
    ({"answer": "I"}, "q.jsonl:2: no question"),
    ({"question": "Who?"}, "q.jsonl:2: no answer"),
    ({"question": "Who?", "answers": []}, "q.jsonl:2: no answer"),
    ({"question": "", "answer": "I"}, "q.jsonl:2: question is no text"),
    ({"question": 3, "answer": "I"}, "q.jsonl:2: question is no text"),
    ({"question": "Who?", "answer": None}, "q.jsonl:2: no answer"),
    ({"question": "Who?", "answers": ["", None, [" "]]}, "q.jsonl:2: no answer"),
    ({"question": "Who?", "answers": ["a", True]}, "q.jsonl:2: answers is no text"),
    (f'{{"question": "Who?", "answers": {"[" * 900}"a"{"]" * 900}}}', "q.jsonl:2: lists nested too deeply"),
    ({"question": "Who?", "answer": True}, "q.jsonl:2: answer is no text"),
    ({"question": "Who?", "answers": [], "is_impossible": True}, "q.jsonl:2: no answer .* it cannot be answered"),
    ({"question": "Who\ud800?", "answer": "I"}, "q.jsonl:2: question is not UTF-8"),
    (GOOD | {"neighbors": [3]}, "q.jsonl:2: neighbors is no text"),
    (GOOD | {"ctxs": [{"title": "no text"}]}, "q.jsonl:2: ctxs is no text"),
    (GOOD | {"documents": [None]}, "q.jsonl:2: documents is no text"),
    ({"data": [{"paragraphs": [{"qas": 3}]}]}, "q.jsonl:2: qas is no list of objects"),
    ("{", "q.jsonl:2: not JSON"),
    ([1], "q.jsonl:2: not a JSON object but list"),
    ({"messages": [{"role": "user", "content": "x"}]}, "q.jsonl:2: messages cannot be read"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}, "q.jsonl:2: the last message is the user's"),
    ({"messages": [{"role": "user"}, {"role": "assistant", "content": "y"}]}, "q.jsonl:2: content is no text"),
])  # fmt: skip
def test_rows_that_lack_something(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        read_questions(write(tmp_path / "q.jsonl", GOOD, row))


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="does not exist"):
        read_questions(tmp_path / "gone.jsonl")
    with pytest.raises(MissingInputError, match="has no questions"):
        read_questions(write(tmp_path / "q.jsonl", ""))
    (tmp_path / "q.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(StoreError, match="not UTF-8"):
        read_questions(tmp_path / "q.jsonl")


def test_bad_rows_are_set_aside_and_said(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", GOOD, "{", {"question": "?"}, GOOD)
    path.write_bytes(path.read_bytes() + b'{"question": "\xff", "answer": "x"}\n')
    said: list[str] = []
    assert [question.line for question in read_questions(path, say=said.append)] == [1, 4]
    assert [line.split(": ", 2)[1] for line in said[:3]] == [f"{path}:{number}" for number in (2, 3, 5)]
    assert said[3] == f"3 of 5 questions of {path} set aside"
    with pytest.raises(MissingInputError, match=r"has no questions\n  .*q.jsonl:1: no answer"):
        read_questions(write(path, {"question": "?"}), say=said.append)


def test_what_json_allows_in_a_line(tmp_path: Path) -> None:
    """Other signs than the line feed end no line; marks and encodings are read as in a corpus."""
    path = tmp_path / "q.jsonl"
    for text in ("Who built\u2028it?", "Who\u0085 built it?", "Who\x1c\x0b\x0cbuilt it?", "Wer baute 黄山?"):
        row = json.dumps({"question": text, "answer": "A\u2029B"}, ensure_ascii=False)
        for raw in (
            (row + "\r\n").encode(),
            b"\xef\xbb\xbf" + row.encode(),
            row.encode("utf-16"),
            row.encode("utf-32"),
        ):
            path.write_bytes(raw)
            (question,) = read_questions(path)
            assert (question.query, question.answers) == (text, ("A\u2029B",))
    path = tmp_path / "Q.JSONL.GZ"
    path.write_bytes(gzip.compress(row.encode()))
    assert len(read_questions(path)) == 1


def test_squad(tmp_path: Path) -> None:
    """The file as it is published, Hugging Face's flat rows, and an array of those under any name."""
    qas = [
        {
            "id": "a",
            "question": "Who?",
            "answers": [{"text": "Ada", "answer_start": 3}, {"text": "Ada", "answer_start": 3}],
        },
        {"id": "b", "question": "Why?", "answers": [], "is_impossible": True, "plausible_answers": [{"text": "x"}]},
        {"id": "c", "question": "When?", "answers": [{"text": "1302", "answer_start": 0}]},
    ]
    nested = {"version": "2.0", "data": [{"title": "T", "paragraphs": [{"context": "Ada built it.", "qas": qas}]}]}
    for indent in (None, 2):
        path = tmp_path / "dev.json"
        path.write_text(json.dumps(nested, indent=indent))
        said: list[str] = []
        a, c = read_questions(path, say=said.append)
        assert (a.id, a.query, a.answers, a.neighbors) == ("a", "Who?", ("Ada",), ("Ada built it.",))
        assert (c.id, c.line) == ("c", 3)
        assert f"{path}:1, question 2: no answer" in said[0]
    flat = [
        {**q, "context": "Ada built it.", "answers": {"text": [x["text"] for x in q["answers"]], "answer_start": []}}
        for q in qas
    ]
    for content in (json.dumps({"data": flat}), json.dumps(flat), "\n".join(map(json.dumps, flat))):
        (tmp_path / "questions").write_text(content)
        assert [q.answers for q in read_questions(tmp_path / "questions", say=said.append)] == [("Ada",), ("1302",)]


def test_dpr_fid_and_atlas(tmp_path: Path) -> None:
    passage = {"title": "Mill", "text": "It stands.", "score": 1.5, "passage_id": "7"}
    dpr = {"dataset": "nq", "question": "Who?", "answers": ["Ada"], "positive_ctxs": [passage], "negative_ctxs": [], "hard_negative_ctxs": [passage]}  # fmt: skip
    fid = {
        "id": 4,
        "question": "Who?",
        "target": "Bea",
        "answers": ["Ada", "Bea"],
        "ctxs": [passage, {"text": "Bare."}],
    }
    atlas = {"query": "Who?", "target": "Ada", "passages": [passage]}
    (tmp_path / "q.json").write_text(json.dumps([dpr, fid, atlas]))
    one, two, three = read_questions(tmp_path / "q.json")
    titled = "title: Mill, source: It stands."
    assert (one.answers, one.neighbors) == (("Ada",), (titled,))
    assert (two.id, two.answers, two.neighbors) == ("4", ("Bea", "Ada"), (titled, "Bare."))
    assert (three.query, three.answers, three.neighbors) == ("Who?", ("Ada",), (titled,))


def test_answers_passages_and_ids_of_other_types(tmp_path: Path) -> None:
    hotpot = {"title": ["A", "B"], "sentences": [["One.", "Two."], ["Three."]]}
    rows = [
        {"question": "?", "answer": 1302, "id": 7.0},
        {"question": "?", "answers": [3.5, "x"], "id": ""},
        {"question": "?", "answers": "alone", "neighbors": "one", "documents": 3},
        {"question": "?", "answer": {"value": "v", "aliases": ["w"], "normalized_aliases": ["w"]}, "passage": "d"},
        {"question": "?", "answer": "y", "context": hotpot, "neighbors": []},
        {"question": "?", "answer": "y", "context": [["A", ["One.", "Two."]], ["B", ["Three."]]]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Who?"}]},
                {"role": "assistant", "content": "I"},
            ]
        },
    ]
    found = read_questions(write(tmp_path / "q.jsonl", *rows))
    assert [q.answers for q in found[:4]] == [("1302",), ("3.5", "x"), ("alone",), ("v", "w")]
    assert [q.id for q in found[:3]] == ["7", "2", "3"]
    assert (found[2].neighbors, found[2].documents, found[3].documents) == (("one",), ("3",), ("d",))
    assert found[4].neighbors == found[5].neighbors == ("title: A, source: One. Two.", "title: B, source: Three.")
    assert found[6].query == "Who?"


def test_what_a_row_lacks(tmp_path: Path) -> None:
    """A table's null stands for no value, an empty one of several answers for none, and lists may lie in lists."""
    nulls = dict.fromkeys(("target", "answer", "answers", "messages", "ctxs", "documents", "id", "query"))
    rows = [
        {**nulls, "question": "?", "answers": ["a"]},
        {**nulls, "question": "?", "answer": "a"},
        {**nulls, "question": "?", "answers": ["", None, "a"], "_id": "own"},
        {"question": "?", "target": "", "answers": [["a", "b"], [], ["c"]]},
        {**nulls, "question": None, "query": "?", "answer": "a"},
    ]
    found = read_questions(write(tmp_path / "q.jsonl", *rows))
    assert [question.answers for question in found] == [("a",), ("a",), ("a",), ("a", "b", "c"), ("a",)]
    assert [question.id for question in found] == ["1", "2", "own", "4", "5"]
    cells = ("['Ada', \"O'Neill\"]", '["Ada"]', "[sic", "[1]", "['x'")
    (tmp_path / "q.tsv").write_text("question\tanswers\n" + "".join(f"Who?\t{cell}\n" for cell in cells))
    found = read_questions(tmp_path / "q.tsv")
    assert [question.answers for question in found] == [("Ada", "O'Neill"), ("Ada",), ("[sic",), ("[1]",), ("['x'",)]


def test_tables(tmp_path: Path) -> None:
    (tmp_path / "q.tsv").write_text("question\tanswer\nWho?\tAda\nWhen?\n")
    said: list[str] = []
    (question,) = read_questions(tmp_path / "q.tsv", say=said.append)
    assert (question.query, question.answers) == ("Who?", ("Ada",))
    assert "q.tsv:3: it has 1 columns" in said[0]


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "q.jsonl")
    for path, what in ((tmp_path / "q.jsonl", "FIFO"), (Path("/dev/zero"), "device"), (tmp_path, "folder")):
        with pytest.raises(MissingInputError, match=what):
            read_questions(path)
