"""The text of pages: what is seen is kept, in lines; scripts and styles are not seen; broken pages are read as far as they go."""

import time
from pathlib import Path

import pytest

from retro_engine.data.corpus import Reader
from retro_engine.data.html_text import declared_encoding, page_text

PAGE = """<!DOCTYPE html><html><head><title>The  old\n mill &amp; more</title><style>p {color: red}</style>
<script>if (a < b) document.write("<p>not text</p>");</script></head><body><!-- a comment -->
<nav><a href="/">Home</a></nav><h1>The mill</h1><p>It stands <b>by</b> the
river&nbsp;Rhine.<br>Since 1302.</p><ul><li>one<li>two</ul>
<table><tr><th>Year<th>Name<tr><td>1302<td>Ada</table><pre>  a = 1
  b = 2
</pre><svg><title>an icon</title></svg></body></html>"""


def test_what_is_seen() -> None:
    title, text = page_text(PAGE)
    assert title == "The old mill & more"
    assert text.split("\n") == [
        "Home", "The mill", "It stands by the river Rhine.", "Since 1302.", "one", "two", "Year Name", "1302 Ada",
        "  a = 1", "  b = 2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("no tags at all", ("", "no tags at all")),
        ("<title>open<p>text", ("open", "text")),
        ("a <!-- open comment", ("", "a")),
        ("a<script>open", ("", "a")),
        ("</b>a<script/>b<p", ("", "ab")),
        ("a &amp b &am", ("", "a & b &am")),
        ("<p>1 < 2 & 3 > 2", ("", "1 < 2 & 3 > 2")),
        ("", ("", "")),
    ],
)
def test_broken_pages(page: str, expected: tuple[str, str]) -> None:
    assert page_text(page) == expected


def test_time_is_bounded_by_the_length() -> None:
    start = time.process_time()
    for part in ("<!--", "<!", "<p ", "</", "<script>", "&", "<![CDATA["):
        page_text(part * 20_000)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("head", "encoding"),
    [
        (b'<meta charset="iso-8859-1">', "cp1252"),
        (b"<META http-equiv=Content-Type content='text/html; charset=Shift_JIS'>", "shift_jis"),
        (b'<?xml version="1.0" encoding="koi8-r"?>', "koi8-r"),
        (b'<meta charset="utf-16">', "utf-8"),
        (b'<meta charset="rot13">', "utf-8"),
        (b'<meta charset="nonsense">', "utf-8"),
        (b"<html>", "utf-8"),
    ],
)
def test_declared_encodings(head: bytes, encoding: str) -> None:
    assert declared_encoding(head) == encoding


def test_pages_as_documents(tmp_path: Path) -> None:
    (tmp_path / "a.HTM").write_bytes(b'<meta charset="latin1"><title>Caf\xe9</title><p>Z\xfcrich')
    (tmp_path / "b.html").write_text("<script>app()</script><div id=root></div>")
    (tmp_path / "c.html").write_bytes(b'<meta charset="shift_jis"><p>\xff\xff\xff')
    (tmp_path / "d.xhtml").write_text("<p>no title</p>")
    a, b, c, d = Reader().read([tmp_path / name for name in ("a.HTM", "b.html", "c.html", "d.xhtml")])
    assert (a.title, a.text) == ("Café", "Zürich")
    assert b.reason == "empty: the page has no text"
    assert c.reason.startswith("not shift_jis, which the page says it is")
    assert (d.title, d.text) == ("d", "no title")
