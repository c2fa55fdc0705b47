"""Reading text: what is a document, and what is set aside with which reason. Good rows always survive bad ones."""

import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retro_engine.data.corpus import Document, Reader, SetAside, find_files
from retro_engine.errors import MissingInputError, UsageError

GOOD = b'{"id": 1, "title": "T", "text": "good"}\n'
DEEP = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
BAD_ROWS = {
    "not JSON": b"{oops\n",
    "not a JSON object but list": b"[1, 2]\n",
    "no key 'text'": b'{"body": "x"}\n',
    "'text' is int, not text": b'{"text": 5}\n',
    "not UTF-8 at byte": b'{"text": "\xff\xfe"}\n',
    "half of a surrogate pair": b'{"text": "a\\ud800b"}\n',
    "NUL byte": b'{"text": "a\\u0000b"}\n',
    "empty": b'{"text": "  \\n "}\n',
    "NaN is not JSON": b'{"text": "a", "x": NaN}\n',
    "a key stands twice": b'{"text": "a", "text": "b"}\n',
    "nested too deeply": DEEP,
}


def rows(path: Path, **options: object) -> list[Document | SetAside]:
    return list(Reader(**options).read([path]))


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_bad_rows_are_set_aside(tmp_path: Path, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + BAD_ROWS[reason] + GOOD)
    first, bad, last = rows(path)
    assert isinstance(first, Document)
    assert isinstance(last, Document)
    assert (first.id, first.title, first.text, last.source) == ("1", "T", "good", f"{path}:3")
    assert isinstance(bad, SetAside)
    assert bad.source == f"{path}:2"
    assert reason in bad.reason, bad.reason


def test_replace_repairs(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(BAD_ROWS["not UTF-8 at byte"] + BAD_ROWS["half of a surrogate pair"])
    texts = [row.text for row in rows(path, errors="replace") if isinstance(row, Document)]
    assert texts == ["\ufffd\ufffd", "a\ufffdb"]


def test_a_100_mb_line_is_set_aside_in_little_memory(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(GOOD + b'{"text": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n' + GOOD)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first, bad, last = rows(path, max_document_bytes=1 << 20)
    assert isinstance(bad, SetAside)
    assert "line longer than 1,048,576 bytes" in bad.reason
    assert isinstance(first, Document)
    assert isinstance(last, Document)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compressed_and_truncated(tmp_path: Path, suffix: str) -> None:
    content = b"".join(json.dumps({"text": f"text {i} " + os.urandom(300).hex()}).encode() + b"\n" for i in range(500))
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(content))
    assert len(rows(path)) == 500
    path.write_bytes(pack(content)[:-2000])
    found = rows(path)
    assert len(found) < 500
    assert isinstance(found[-1], SetAside), "what is missing is said"
    assert sum(isinstance(row, Document) for row in found) > 100
    if suffix == ".zst":
        path.write_bytes(pack(content[: len(content) // 2]) + pack(content[len(content) // 2 :]))
        assert len(rows(path)) >= 500, "frames follow each other"


def test_text_and_markdown(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# The *title*\n\nBody.")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfWith a mark")
    (tmp_path / "c.txt").write_bytes(b"\x00\x01binary")
    (tmp_path / "d.txt").write_text("")
    (tmp_path / ".hidden.txt").write_text("x")
    (tmp_path / "e.pdf").write_text("x")
    files, passed_over = find_files([tmp_path])
    assert [path.name for path in files] == ["a.md", "b.txt", "c.txt", "d.txt"]
    assert [path.name for path in passed_over] == ["e.pdf"]
    a, b, c, d = Reader().read(files)
    assert isinstance(a, Document)
    assert a.title == "The *title*"
    assert isinstance(b, Document)
    assert b.text == "With a mark"
    assert isinstance(c, SetAside)
    assert "binary" in c.reason
    assert isinstance(d, SetAside)
    assert d.reason == "empty"


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="does not exist"):
        find_files([tmp_path / "no.txt"])
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(UsageError, match="unknown kind"):
        find_files([tmp_path / "a.docx"])
    (tmp_path / "a.txt").write_text("x")
    os.chmod(tmp_path / "a.txt", 0)
    if os.geteuid() != 0:  # root reads everything
        with pytest.raises(MissingInputError, match="permission denied"):
            find_files([tmp_path / "a.txt"])


@settings(
    max_examples=10_000 if os.environ.get("RETRO_CAMPAIGN") else 200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
)
@given(st.lists(st.one_of(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")), st.dictionaries(st.sampled_from(["text", "id", "x"]), st.one_of(st.text(max_size=20), st.floats(), st.none())).map(lambda d: json.dumps(d).encode())), max_size=8))  # fmt: skip
def test_any_bytes_give_documents_or_reasons(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*lines, GOOD.strip(), b""]))
    found = rows(path)
    assert isinstance(found[-1], Document)
    assert len(found) == 1 + sum(bool(line.strip()) for line in lines)
    for row in found:
        if isinstance(row, Document):
            row.text.encode()
            assert row.text.strip()
            assert "\0" not in row.text
        else:
            assert row.reason


def test_parquet(tmp_path: Path) -> None:
    """Rows like those of JSON lines; rows, columns and files that cannot be used are set aside."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as parquet

    texts = ["first text", None, "  ", "second\0", "third text"] + [f"row {i}" for i in range(600)]
    table = pyarrow.table({"id": list(range(605)), "title": [f"T{i}" for i in range(605)], "text": texts})
    parquet.write_table(table, tmp_path / "a.parquet")
    rows = list(Reader().read([tmp_path / "a.parquet"]))
    assert [(r.id, r.title, r.text) for r in rows[::4][:2]] == [("0", "T0", "first text"), ("4", "T4", "third text")]
    assert [r.reason for r in rows[1:4]] == ["'text' is NoneType, not text", "empty", "binary: it holds a NUL byte"]
    assert rows[1].source == f"{tmp_path}/a.parquet:2"
    assert len(rows) == 605
    (found,) = Reader(text_key="body").read([tmp_path / "a.parquet"])
    assert "no column 'body' (it has id, title, text)" in found.reason
    (too_long, *_) = Reader(max_document_bytes=5).read([tmp_path / "a.parquet"])
    assert too_long.reason == "larger than 5 bytes"
    bad = pyarrow.table({"text": pyarrow.array([b"ok", b"\xff\xfe"]).cast(pyarrow.string(), safe=False)})
    parquet.write_table(bad, tmp_path / "bad.parquet")
    assert [getattr(r, "reason", "") for r in Reader().read([tmp_path / "bad.parquet"])] == ["", "not UTF-8"]
    raw = (tmp_path / "a.parquet").read_bytes()
    for content in (b"", raw[:100], raw[:-5], b"PAR1" + b"\xff" * 99, raw[:50] + b"\0" * 900 + raw[950:]):
        (tmp_path / "b.parquet").write_bytes(content)
        rows = list(Reader().read([tmp_path / "b.parquet"]))
        assert "cannot be read further" in rows[-1].reason


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from retro_engine.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingExtraError, match=r"retro-engine\[data\]"):
        list(Reader().read([tmp_path / "a.parquet"]))
