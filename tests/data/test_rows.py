"""Rows of JSON, TSV and CSV: each with its place, bad ones alone set aside, and no row lost without a word."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from retro_engine.data.inputs import SetAside
from retro_engine.data.rows import Row, RowReader


def read(path: Path, content: str | bytes, max_bytes: int = 1 << 20, required: str = "text") -> list[Row | SetAside]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(RowReader("strict", max_bytes, ("text", "id", "title"), required).read(path))


def texts(rows: list[Row | SetAside]) -> list[str]:
    return [str(row.values.get("text")) if isinstance(row, Row) else f"! {row.reason}" for row in rows]


def test_json_in_its_forms(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    two = [{"text": "a"}, {"text": "b"}]
    for content in (json.dumps(two), json.dumps(two, indent=2), "\n\ufeff\n[" + json.dumps(two)[1:]):
        assert texts(read(path, content.replace("\n\ufeff", "\ufeff"))) == ["a", "b"], content
    assert texts(read(path, "".join(json.dumps(row) + "\n" for row in two))) == ["a", "b"], "lines, under .json"
    assert texts(read(path, json.dumps(two[0], indent=2))) == ["a"]
    assert texts(read(path, json.dumps(two[0]))) == ["a"]
    assert texts(read(path, "[]")) == texts(read(path, " ")) == texts(read(path, "")) == []
    assert [row.source for row in read(path, json.dumps(two))] == [f"{path}:1", f"{path}:2"]


def test_bad_rows_of_an_array_leave_the_others(tmp_path: Path) -> None:
    rows = b'[{"text": "a"}, 7, {"text": NaN}, {"text": "b", "text": "c"}, {"text": "\xff"}, {"text": "d"}]'
    found = texts(read(tmp_path / "a.json", rows))
    assert found[0] == "a"
    assert found[1:4] == [
        "! not a JSON object but int",
        "! not JSON: NaN is not JSON",
        "! not JSON: a key stands twice",
    ]
    assert found[4].encode("utf-8", "surrogateescape") == b"\xff", "set aside by whoever reads the text"
    assert found[5] == "d"
    for end, reason in (
        ('{"text": "b"', "the array is cut short"),
        ('{"text": "b"}', "the array is cut short"),
        ("{oops}]", "not JSON: Expecting property name"),
        ('{"text": "b"} {"text": "c"}]', "not JSON: expected ,"),
        ("{}] x", "something follows the array"),
    ):
        last = texts(read(tmp_path / "a.json", '[{"text": "a"}, ' + end))[-1]
        assert last.startswith("! the file cannot be read further"), end
        assert reason in last


def test_a_long_array_is_read_in_little_memory(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "a.json"
    path.write_text("[" + ", ".join(json.dumps({"text": "x" * 1000, "n": i}) for i in range(20_000)) + "]")
    tracemalloc.start()
    count = sum(isinstance(row, Row) for row in RowReader("strict", 1 << 20, ("text",), "text").read(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 4 << 20, "20 MB of rows"
    first, last = texts(read(path, '[{"text": "a"}, {"text": "' + "x" * 300_000 + '"}]', max_bytes=1000))
    assert first == "a"
    assert "a row larger than 1,000 bytes" in last
    assert "larger than 1,000 bytes" in texts(read(path, '{\n"text": "' + "x" * 300_000 + '"}', max_bytes=1000))[0]


def test_dprs_passages(tmp_path: Path) -> None:
    """With its line of names and without; quotes as csv writes them, and quotes that are just letters."""
    path = tmp_path / "psgs.tsv"
    lines = '1\t"Aaron ( or ; ""Ahärôn"") is a prophet"\tAaron\n2\t"Unclosed, he said and left\tQuote\n3\tplain text of it\tC\n'
    expected = [
        {"id": "1", "text": 'Aaron ( or ; "Ahärôn") is a prophet', "title": "Aaron"},
        {"id": "2", "text": '"Unclosed, he said and left', "title": "Quote"},
        {"id": "3", "text": "plain text of it", "title": "C"},
    ]
    for content in ("id\ttext\ttitle\n" + lines, lines):
        rows = read(path, content)
        assert [row.values for row in rows] == expected
        assert rows[0].source == f"{path}:{2 if content.startswith('id') else 1}"
    two = read(path, "7\tA passage of several words and no title\n8\tAnother passage of words\n")
    assert [row.values for row in two][1] == {"id": "8", "text": "Another passage of words"}
    (refused,) = read(path, "docid\tbody\theading\n1\tx\ty\n")
    assert (
        refused.reason
        == "no column 'text' (it has docid, body, heading); --text-key of prepare and docs add names another"
    )


def test_cells_of_several_lines(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.tsv", 'id\ttext\n1\t"one\ntwo ""three"""\n2\t"open\n3\tthree\n4\t5\t6\n\n')
    assert texts(rows) == ['one\ntwo "three"', '"open', "three", "! it has 3 columns, not 2 (id, text)"]
    assert [row.source.rsplit(":")[-1] for row in rows] == ["2", "4", "5", "6"]
    rows = read(tmp_path / "a.csv", 'id,text\n1,"one\ntwo, ""three"""\n2,"a"b\n3,c\n4\n5,"open\n6,d\n')
    assert texts(rows)[:2] == ['one\ntwo, "three"', "! not CSV: ',' expected after '\"'"]
    assert texts(rows)[2:4] == ["c", "! it has 1 columns, not 2 (id, text)"]
    assert texts(rows)[4].startswith("! not CSV: unexpected end of data")
    assert [row.source.rsplit(":")[-1] for row in rows] == ["2", "4", "5", "6", "7"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_tables_with_bad_bytes_and_names(tmp_path: Path, name: str) -> None:
    comma = "," if name == "a.csv" else "\t"
    rows = read(tmp_path / name, f"id{comma}text\n1{comma}a\n2{comma}".encode() + b"\xff\n3" + f"{comma}b\n".encode())
    assert texts(rows)[0::2] == ["a", "b"]
    assert texts(rows)[1].startswith("! not UTF-8 at byte 2")
    assert "stands twice" in texts(read(tmp_path / name, f"text{comma}text\na{comma}b\n"))[0]
    long = "x" * 200_000  # more than csv's own limit
    assert texts(read(tmp_path / name, f"id{comma}text\n1{comma}{long}\n")) == [long]
    assert "line longer than" in texts(read(tmp_path / name, f"id{comma}text\n1{comma}{long}\n2{comma}a\n", 1000))[0]


def test_spreadsheets_separators(tmp_path: Path) -> None:
    for separator in ",;\t":
        assert texts(read(tmp_path / "a.csv", f"id{separator}text\r\n1{separator}a\r\n")) == ["a"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_lines_that_end_with_carriage_returns_alone(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    packed = {bytes: "", gzip.compress: ".gz", bz2.compress: ".bz2", lzma.compress: ".xz"}[pack]
    for name, content in {
        "a.jsonl": '{"text": "one"}\r{"text": "tw\\ro"}\r',
        "b.json": '{"text": "one"}\r{"text": "tw\\ro"}',
        "c.csv": '\ufefftext,id\rone,1\r"tw\ro",2\r',
        "d.tsv": 'text\tid\rone\t1\r"tw\ro"\t2',
    }.items():
        path = tmp_path / (name + packed)
        path.write_bytes(pack(content.encode()))
        rows = list(RowReader("strict", 1 << 20, ("text",)).read(path))
        assert [text.replace("\r", "\n") for text in texts(rows)] == ["one", "tw\no"], name
    path.with_name("e.tsv").write_bytes(b"id\ttext\n1\ta\rb\n")
    (row,) = RowReader("strict", 1 << 20, ("text",)).read(path.with_name("e.tsv"))
    assert isinstance(row, Row) and row.values["text"] == "a\rb", "a carriage return within a line stays"
