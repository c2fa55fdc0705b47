"""One large text as many documents: where it is cut, what is kept whole, what is said."""

import bz2
import io
from pathlib import Path

import pytest

from retro_engine.data.corpus import Document, Reader
from retro_engine.data.inputs import SetAside, find_files
from retro_engine.data.prepare import prepare
from retro_engine.data.splitting import LEAST, heading_level, pieces
from retro_engine.errors import UsageError

MARKDOWN = b"before\n# The book\nby nobody\n## One\n```sh\n# no heading\n```\nfirst\n### deep\n\n## Two ##\nsecond"
WIKITEXT = b" = Castle = \n stone \n = = Walls = = \n thick \n = River = \n water \n"


@pytest.mark.parametrize(
    ("text", "level", "titles"),
    [
        (MARKDOWN, 2, [b"", b"One", b"Two"]),
        (MARKDOWN.replace(b"\n", b"\r\n"), 2, [b"", b"One", b"Two"]),
        (WIKITEXT, 1, [b"Castle", b"River"]),
        (b"#no heading\n#none\n = a\nb = \n", None, [b""]),
        (b"", None, []),
    ],
)
def test_headings(tmp_path: Path, text: bytes, level: int | None, titles: list[bytes]) -> None:
    (tmp_path / "a.md").write_bytes(text)
    assert heading_level(tmp_path / "a.md") == level
    found = list(pieces(io.BytesIO(text), level, 1 << 20))
    assert [piece.title for piece in found] == titles
    assert b"".join(piece.text for piece in found) == text


def test_blank_lines_end_a_document_that_is_long_enough() -> None:
    paragraph = b"word " * 100 + b"\n"
    text = b"\n\n" + b"\n".join([paragraph] * 11) + b" \n\nlast"
    found = list(pieces(io.BytesIO(text), None, 1 << 20))
    assert [piece.text.count(paragraph) for piece in found] == [4, 4, 3]
    assert [piece.line for piece in found] == [1, 11, 19]
    assert b"".join(piece.text for piece in found) == text
    assert all(len(piece.text) >= LEAST for piece in found[:-1])


def test_of_what_is_too_long_no_more_is_kept_than_shows_it() -> None:
    (found,) = pieces(io.BytesIO(b"x" * 5_000_000), None, 1000)
    assert len(found.text) == 1001


def read(path: Path, **how: str) -> list[Document | SetAside]:
    return list(Reader(**how).read([path]))  # type: ignore[arg-type]


def test_parts_are_documents_with_a_place_and_a_title(tmp_path: Path) -> None:
    (tmp_path / "book.md.bz2").write_bytes(bz2.compress(MARKDOWN.replace(b"second", b"caf\xe9")))
    good, one, two = read(tmp_path / "book.md.bz2", split="headings")
    assert isinstance(good, Document)
    assert isinstance(one, Document)
    assert (good.title, one.title, one.id) == ("book", "One", f"{tmp_path}/book.md.bz2:4")
    assert isinstance(two, SetAside)
    assert two.source.endswith("book.md.bz2:11")
    assert "not UTF-8" in two.reason
    (tmp_path / "plain.txt").write_text("no heading")
    (whole,) = read(tmp_path / "plain.txt", split="headings")
    assert isinstance(whole, Document)
    assert whole.path is not None, "it stays whole"


def test_a_large_text_alone_is_split_and_that_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    text = tmp_path / "book.raw"
    text.write_text("\n\n".join(f"Paragraph {n} of the old river town. " * 30 for n in range(80)))
    store = prepare([text], tmp_path / "split", vocab_size=300, say=said.append)
    assert store.num_documents > 20
    assert any("book.raw is one large text: split at blank lines" in line for line in said)
    whole = prepare([text], tmp_path / "whole", str(tmp_path / "split"), reader=Reader(split="none"), say=said.append)
    assert whole.num_documents == 1
    assert "--split blank-lines makes several" in said[-1]
    (tmp_path / "b.txt").write_text("another")
    both = prepare([text, tmp_path / "b.txt"], tmp_path / "both", str(tmp_path / "split"))
    assert both.num_documents == 2
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}')
    with pytest.raises(UsageError, match="--split headings cannot be used\n.*no input is a text"):
        prepare([tmp_path / "rows.jsonl"], tmp_path / "rows", reader=Reader(split="headings"))


def test_any_name_is_read_as_the_format_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "wiki.train.tokens").write_text("known")
    (tmp_path / "page.article").write_text("<html><title>T</title><p>shown")
    (tmp_path / "rows.dat").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert [path.name for path in find_files([tmp_path])[0]] == ["wiki.train.tokens"]
    assert len(find_files([tmp_path], of_any_kind=True)[0]) == 3
    (page,) = read(tmp_path / "page.article", format="html")
    assert isinstance(page, Document)
    assert (page.title, page.text.strip()) == ("T", "shown")
    assert len(read(tmp_path / "rows.dat", format="jsonl")) == 2
    (text,) = read(tmp_path / "rows.dat", format="text")
    assert isinstance(text, Document)
    assert text.title == "rows"
    with pytest.raises(UsageError, match="unknown kind\n.*\n.*--format text"):
        find_files([tmp_path / "rows.dat"])
    with pytest.raises(UsageError, match="--format txet does not exist\n.*did you mean text"):
        Reader(format="txet")
    with pytest.raises(UsageError, match="--split heading does not exist\n.*did you mean headings"):
        Reader(split="heading")
