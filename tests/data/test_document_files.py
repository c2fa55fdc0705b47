"""PDF and Word files: their text as it is read on, and every way in which there is none."""

import gzip
import io
import random
import sys
import zipfile
from pathlib import Path

import pytest
from document_helpers import docx_bytes, encrypted_pdf, pdf_bytes, write

from retro_engine import cli
from retro_engine.data.corpus import Document, Reader
from retro_engine.data.document_files import docx_text, pdf_text
from retro_engine.data.inputs import SetAside, find_files
from retro_engine.data.streams import Unusable
from retro_engine.errors import MissingExtraError

pytest.importorskip("pypdf", reason="pypdf is not installed")
pytest.importorskip("docx", reason="python-docx is not installed")
LINES = ["The castle was built in 1302 by Adel-", "heid, who (it is said) never", "lived there.", "It burned down."]


def test_lines_of_a_pdf_are_joined() -> None:
    title, text = pdf_text(pdf_bytes([LINES, [], ["The twenty-", "First page."]], "A castle"))
    assert title == "A castle"
    first = "The castle was built in 1302 by Adelheid, who (it is said) never lived there.\nIt burned down."
    assert text == f"{first}\n\nThe twenty- First page."


def test_words_and_tables_of_docx() -> None:
    title, text = docx_text(docx_bytes(["First.", "", "Second\tone."], [["Year", "Rain"], ["1302", "none"]], "Notes"))
    assert title == "Notes"
    assert text == "First.\nSecond\tone.\nYear Rain\n1302 none"


def test_files_become_documents(tmp_path: Path) -> None:
    write(tmp_path / "a.PDF", pdf_bytes([LINES]))
    write(tmp_path / "b.pdf.gz", gzip.compress(pdf_bytes([["Packed."]], "Its title")))
    write(tmp_path / "c.docx", docx_bytes(["A paragraph."]))
    found = list(Reader().read(find_files([tmp_path])[0]))
    assert [(d.title, d.text.split()[0], d.path) for d in found if isinstance(d, Document)] == [
        ("a", "The", tmp_path / "a.PDF"),
        ("Its title", "Packed.", tmp_path / "b.pdf.gz"),
        ("c", "A", tmp_path / "c.docx"),
    ]


def bomb() -> bytes:
    out = io.BytesIO()
    with (
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("word/document.xml", "w", force_zip64=True) as member,
    ):
        for _ in range(300):
            member.write(bytes(1 << 20))
    return out.getvalue()


BAD = {
    "scan.pdf": (lambda: pdf_bytes([[], []]), "no text on its 2 pages: a scan"),
    "locked.pdf": (lambda: encrypted_pdf([["Secret."]], "word"), "encrypted: it opens with a password"),
    "empty.pdf": (lambda: b"", "damaged: "),
    "text.pdf": (lambda: b"this is no PDF", "damaged: "),
    "cut.docx": (lambda: docx_bytes(["x"])[:-400], "damaged: File is not a zip file"),
    "text.docx": (lambda: b"this is no zip", "damaged: File is not a zip file"),
    "other.docx": (lambda: zipped({"a.txt": "x"}), "damaged: "),
    "xml.docx": (lambda: changed(docx_bytes(["x"]), "word/document.xml", b"<w:document"), "damaged: "),
    "old.docx": (lambda: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "encrypted, or of an old kind"),
    "nothing.docx": (lambda: docx_bytes(["", " "]), "empty: it has no text"),
    "bomb.docx": (bomb, "it unpacks to more than 268,435,456 bytes"),
}


def zipped(members: dict[str, str | bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def changed(raw: bytes, name: str, content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return zipped({item: content if item == name else archive.read(item) for item in archive.namelist()})


@pytest.mark.parametrize("name", BAD)
def test_what_is_set_aside(tmp_path: Path, name: str) -> None:
    make, reason = BAD[name]
    path = write(tmp_path / name, make())
    (found,) = Reader().read([path])
    assert isinstance(found, SetAside)
    assert found.source == str(path)
    assert found.reason.startswith(reason), found.reason


def test_a_password_for_changes_alone() -> None:
    assert pdf_text(encrypted_pdf([["Read me."]], ""))[1] == "Read me."


def test_texts_that_are_too_long(tmp_path: Path) -> None:
    path = write(tmp_path / "a.docx", docx_bytes(["word " * 100]))
    (found,) = Reader(max_document_bytes=100).read([path])
    assert isinstance(found, SetAside)
    assert found.reason == "its text is larger than 100 bytes"


@pytest.mark.parametrize("kind", ["pdf", "docx"])
def test_flipped_bytes_are_a_reason_or_a_text(kind: str) -> None:
    word, part = docx_bytes(LINES, [["a", "b"]]), "word/document.xml"
    with zipfile.ZipFile(io.BytesIO(word)) as archive:
        raw = pdf_bytes([LINES] * 3) if kind == "pdf" else archive.read(part)
    draw = random.Random(0)
    outcomes = set()
    for _ in range(150):
        bad = bytearray(raw)
        for _ in range(draw.choice([1, 4, 30])):
            bad[draw.randrange(len(bad))] = draw.randrange(256)
        try:
            if kind == "pdf":
                pdf_text(bytes(bad))
            else:
                docx_text(changed(word, part, bytes(bad)))
            outcomes.add("text")
        except Unusable:
            outcomes.add("reason")
    assert outcomes == {"text", "reason"}


@pytest.mark.parametrize(("name", "module"), [("a.pdf", "pypdf"), ("a.docx", "docx")])
def test_a_missing_extra_is_named(
    tmp_path: Path, name: str, module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / name, b"x")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError):
        list(Reader().read([path]))
    assert cli.main(["prepare", str(path), "--out", str(tmp_path / "store")]) == 4
    assert "pip install 'retro-engine[documents]'" in capsys.readouterr().err


def test_prepare_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.pdf", pdf_bytes([["The river is long and wide, and the stone is old."] * 4]))
    write(tmp_path / "b.docx", docx_bytes(["A stone in the river, and another stone beside the river."] * 4))
    write(tmp_path / "c.docx", b"no zip")
    command = ["prepare", str(tmp_path), "--out", str(tmp_path / "store"), "--vocab-size", "300", "--chunk-size", "16"]
    assert cli.main(command) == 0
    said = (tmp_path / "store" / "set_aside.jsonl").read_text()
    assert "c.docx" in said
    assert "damaged" in said
