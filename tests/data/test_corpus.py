"""Reading text: what is a document, and what is set aside with which reason. Good rows always survive bad ones."""

import bz2
import gzip
import io
import json
import os
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retro_engine.data.corpus import Document, Reader, spool_standard_input
from retro_engine.data.inputs import SetAside
from retro_engine.errors import MissingInputError

GOOD = b'{"id": 1, "title": "T", "text": "good"}\n'
BAD_BYTES = "not UTF-8 at byte 0 (--errors replace of prepare and docs add puts U+FFFD there; iconv -f ENCODING -t UTF-8 keeps it)"
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
    a, b, c, d = Reader().read([tmp_path / name for name in ("a.md", "b.txt", "c.txt", "d.txt")])
    assert isinstance(a, Document)
    assert a.title == "The *title*"
    assert isinstance(b, Document)
    assert b.text == "With a mark"
    assert isinstance(c, SetAside)
    assert "binary" in c.reason
    assert isinstance(d, SetAside)
    assert d.reason == "empty"


@settings(
    max_examples=10_000 if os.environ.get("RETRO_CAMPAIGN") else 200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
)
@given(st.lists(st.one_of(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")), st.dictionaries(st.sampled_from(["text", "id", "x"]), st.one_of(st.text(max_size=20), st.floats(), st.none())).map(lambda d: json.dumps(d).encode())), max_size=8))  # fmt: skip
def test_any_bytes_give_documents_or_reasons(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD.strip(), *lines, GOOD.strip(), b""]))
    found = rows(path)
    assert isinstance(found[-1], Document)
    assert len(found) == 2 + sum(bool(line.strip()) for line in lines)
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
    assert [getattr(r, "reason", "") for r in Reader().read([tmp_path / "bad.parquet"])] == ["", BAD_BYTES]
    raw = (tmp_path / "a.parquet").read_bytes()
    for content in (b"", raw[:100], raw[:-5], b"PAR1" + b"\xff" * 99, raw[:50] + b"\0" * 900 + raw[950:]):
        (tmp_path / "b.parquet").write_bytes(content)
        rows = list(Reader().read([tmp_path / "b.parquet"]))
        assert "cannot be read further" in rows[-1].reason


def test_parquet_of_other_writers(tmp_path: Path) -> None:
    """Spark writes text as bytes, pandas as large strings, others as dictionaries; a name that is no UTF-8 opens."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as parquet

    raw = [b"The castle stands here.", "Zürich".encode(), b"caf\xe9", None]
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.PARQUET"))
    columns = {"text": pyarrow.array(raw, pyarrow.binary()), "id": pyarrow.array([b"a", b"b", b"c", b"d"])}
    with open(path, "wb") as file:
        parquet.write_table(pyarrow.table(columns), file)
    one, two, three, four = rows(path)
    assert [(row.id, row.text) for row in (one, two)] == [("a", "The castle stands here."), ("b", "Zürich")]
    assert three.reason.startswith("not UTF-8 at byte 3")
    assert four.reason == "'text' is NoneType, not text"
    assert [row.text for row in rows(path, errors="replace")[2:3]] == ["caf\ufffd"]
    for kind in (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), pyarrow.large_binary()):
        column = pyarrow.array(["one", "two"]).cast(kind)
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / "b.parquet")
        assert [row.text for row in rows(tmp_path / "b.parquet")] == ["one", "two"], kind


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from retro_engine.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingExtraError, match=r"retro-engine\[data\]"):
        list(Reader().read([tmp_path / "a.parquet"]))


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """Ids, titles and reasons can be encoded, whatever bytes the name is made of."""
    for number, name in enumerate((b"caf\xe9.txt", b"\xff\xfe.jsonl", b"a\nb.txt", b"\xe9.md", b"\xe9.html")):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        path.write_text("not JSON" if b".jsonl" in name else "words")
        (row,) = rows(path)
        for text in (row.source, getattr(row, "id", ""), getattr(row, "title", "")):
            text.encode()
            assert text == "" or text.isprintable(), (number, text)
    assert rows(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")))[0].id == f"{tmp_path}/caf\\xe9.txt"
    path.unlink()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("suffix", ["", ".GZ"])
def test_every_kind_in_every_marked_encoding(tmp_path: Path, encoding: str, suffix: str) -> None:
    """What PowerShell and Excel write is read; one text a file, whatever it is wrapped in."""
    text = "A note about the mill beside the river. Zürich \u2028 黄山 🦊"
    contents = {
        "a.txt": text,
        "b.MD": text,
        "c.jsonl": json.dumps({"text": text}, ensure_ascii=False) + "\r\n",
        "d.ndjson": json.dumps({"text": text}) + "\n",
        "e.json": json.dumps([{"text": text}], ensure_ascii=False, indent=1),
        "f.json": json.dumps({"text": text}, indent=1),
        "g.tsv": f"id\ttext\ttitle\r\n1\t{text}\tT\r\n",
        "h.csv": f'id;text\r\n1;"{text}"\r\n',
        "i.html": f"<html><head><title>T</title><script>var x;</script></head><p>{text}</html>",
    }
    mark = {"utf-16-be": "\ufeff", "utf-32-be": "\ufeff"}.get(encoding, "")
    for name, content in contents.items():
        raw = (mark + content).encode(encoding)
        path = tmp_path / (name + suffix)
        path.write_bytes(gzip.compress(raw) if suffix else raw)
        (row,) = rows(path)
        assert isinstance(row, Document), row
        assert row.text == (" ".join(text.split()) if "html" in name else text), name


def test_latin1_and_utf16_without_a_mark_are_named(tmp_path: Path) -> None:
    for encoding, reason in (
        ("utf-16-le", "UTF-16LE without a byte order mark: iconv -f"),
        ("latin-1", "not UTF-8 at byte"),
    ):
        for name, content in (("a.txt", "A café by the river."), ("a.jsonl", '{"text": "A café by the river."}\n' * 3)):
            (tmp_path / name).write_bytes(content.encode(encoding))
            assert reason in rows(tmp_path / name)[0].reason
    half = "\ufeff".encode("utf-16-le") + b"a\0\0\xd8\n\0" + "good".encode("utf-16-le") + b"x"
    (tmp_path / "a.txt").write_bytes(half)
    assert "not UTF-16" in rows(tmp_path / "a.txt")[0].reason
    assert rows(tmp_path / "a.txt", errors="replace")[0].text == "a\ufffd\ngood\ufffd"


def test_markdown_of_every_suffix_and_case(tmp_path: Path) -> None:
    for name in ("a.MD", "b.markdown", "c.md.gz", "D.Markdown.BZ2"):
        raw = b"# The title\n\nBody."
        pack = {".gz": gzip.compress, ".BZ2": bz2.compress}.get(Path(name).suffix, bytes)
        (tmp_path / name).write_bytes(pack(raw))
        (row,) = rows(tmp_path / name)
        assert (row.title, row.text) == ("The title", raw.decode()), name


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "b.jsonl")
    for name, reason in (("a.txt", "is a FIFO"), ("b.jsonl", "is a FIFO"), ("gone.txt", "does not exist")):
        (row,) = rows(tmp_path / name)
        assert reason in row.reason
    (row,) = rows(Path("/dev/zero"))
    assert "is a device" in row.reason


def test_standard_input_is_kept_as_what_it_looks_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        b'{"text": "a"}\n{"text": "b"}': (".stdin.json", ["a", "b"]),
        b'[{"text": "a"}]': (".stdin.json", ["a"]),
        '\ufeff{\n"text": "a"}'.encode("utf-16-le"): (".stdin.json", ["a"]),
        b"[Chapter 1] words": (".stdin.txt", ["[Chapter 1] words"]),
        b"<!DOCTYPE html><p>a": (".stdin.html", ["a"]),
    }
    for raw, (name, texts) in cases.items():
        monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": io.BytesIO(raw)}))
        path = spool_standard_input(tmp_path)
        assert path.name == name
        assert [row.text for row in rows(path)] == texts
    with open("/dev/zero") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        with pytest.raises(MissingInputError, match="standard input is a device"):
            spool_standard_input(tmp_path)
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": io.BytesIO(b"words " * (1 << 20))}))
    assert spool_standard_input(tmp_path, 1000).stat().st_size < 3 << 20, "no more than shows that it is too long"
