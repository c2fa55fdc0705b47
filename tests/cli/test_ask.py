"""`retro ask` from the command line: answers, JSON, questions a line, and each bad input with its exit code."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf_helpers
import pytest
from document_helpers import docx_bytes, encrypted_pdf, pdf_bytes, write

from retro_engine import cli
from retro_engine.generate.generator import Generator
from retro_engine.readers import bases, reader_file
from retro_engine.readers.ask import NOT_FOUND

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("RETRO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "castle.md").write_text("# A castle\n\nThe castle was built in 1302 by Adelheid.")
    (tmp_path / "in" / "river.txt").write_text("The river is long.")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "in"


@pytest.fixture
def flags(reader_folder: Path, base: Path) -> list[str]:
    return ["--reader", str(reader_folder), "--base", str(base)]


def says(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    generate_all = Generator.generate_all

    def generated(self: Generator, *args: object) -> object:
        out = generate_all(self, *args)  # type: ignore[arg-type]
        for one in out:
            one.text = text
        return out

    monkeypatch.setattr(Generator, "generate_all", generated)


def test_a_question(folder: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    says(monkeypatch, " in 1302")
    assert cli.main(["ask", str(folder), "When was the castle built?", *flags]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "in 1302"
    assert out[2].startswith("  in/castle.md (A castle), score ")
    assert "[[in 1302]]" in out[3]
    assert cli.main(["ask", "in", "in/river.txt", "When was the castle built?", *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["found"] is True
    assert cli.main(["ask", "in", *flags, "--json", "in/river.txt", "When was the castle built?"]) == 0, (
        "flags anywhere"
    )
    assert json.loads(capsys.readouterr().out)["answer"] == "in 1302"
    assert cli.main(["ask", "in", *flags, "--hurry", "When was the castle built?"]) == 2
    assert cli.main(["ask", "in", *flags, "--json", "castle=built"]) == 0, "no setting: ask takes none"
    assert json.loads(capsys.readouterr().out)["question"] == "castle=built"
    assert found["reader"] == "tiny-reads"
    assert found["documents"] == {"files": 2, "documents": 2, "set_aside": 0}
    text = found["sources"][found["span"]["source"]]["text"]
    assert text[found["span"]["start"] : found["span"]["end"]] == "in 1302"


def test_the_search_begins_before_torch_is_there(folder: Path) -> None:
    """Also without --base: what looks for the reader's own must not import what answers."""
    looks = "from retro_engine.readers import ahead; ahead.begin = lambda *_: exit(3 if 'torch' in sys.modules else 4)"
    asks = "from retro_engine.cli import main; main(['ask', 'in', 'When was the castle built?', '--base', 'no.gguf'])"
    for words in (asks, asks.replace(", '--base', 'no.gguf'", "")):
        known = "from retro_engine.readers.bases import KnownBase as K; from pathlib import Path; K.path = Path('in/river.txt')"
        done = subprocess.run([sys.executable, "-c", f"import sys; {looks}; {known}; {words}"], check=False)
        assert done.returncode == 4


def test_not_found(folder: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    says(monkeypatch, "not in the documents")
    assert cli.main(["ask", str(folder), "Who is long?", *flags]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{NOT_FOUND}\n  read: in/")
    assert cli.main(["ask", str(folder), "Zanzibar?", *flags]) == 0
    assert capsys.readouterr().out == f"{NOT_FOUND}\n  none of its words is in a document\n"
    assert cli.main(["ask", str(folder), "Zanzibar?", *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["found"] is False


def test_a_question_a_line(folder: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    says(monkeypatch, "1302")
    lines = f"When was the castle built?\n\n{'x' * 3000}\nAnd the river?\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert cli.main(["ask", str(folder), "-i", "--json", *flags]) == 0
    out, error = capsys.readouterr()
    assert [json.loads(line)["question"] for line in out.splitlines()] == [
        "When was the castle built?",
        "And the river?",
    ]
    assert "the question has" in error


def test_files_that_cannot_be_read_are_named(folder: Path, flags: list[str], capsys: Capture) -> None:
    pytest.importorskip("pypdf", reason="pypdf is not installed")
    pytest.importorskip("docx", reason="python-docx is not installed")
    write(folder / "scan.pdf", pdf_bytes([[]]))
    write(folder / "locked.pdf", encrypted_pdf([["x"]], "word"))
    write(folder / "cut.docx", docx_bytes(["x"])[:-300])
    write(folder / "good.pdf", pdf_bytes([["The ocean is deep."]]))
    assert cli.main(["ask", str(folder), "ocean", *flags, "--k", "1", "--max-new-tokens", "1"]) == 0
    out, error = capsys.readouterr()
    assert "in/good.pdf" in out
    for name in ("scan.pdf", "locked.pdf", "cut.docx"):
        assert f"set aside: {folder}/{name}: " in error
    assert cli.main(["ask", str(folder), "Zanzibar", *flags]) == 0
    assert "3 set aside: " in capsys.readouterr().err


BAD = {
    "no question": (["in"], 2, "there is no question about in"),
    "a file for a question": (["in", "in/castle.md"], 2, "there is no question: in/castle.md is a file"),
    "an empty question": (["in", " "], 2, "the question is empty"),
    "a huge question": (["in", "x" * 10_000], 2, "the question has 10,000 characters"),
    "documents that are not there": (["gone", "Who?"], 3, "gone does not exist"),
    "a question without quotes": (["in", "Who", "is", "he?"], 3, 'retro ask in "Who is he?"'),
    "the first of several is not there": (["gone", "in", "Who?"], 3, "documents are files and folders"),
    "no documents": (["empty", "Who?"], 3, "there is no document to read"),
    "an unknown kind": (["x.odt", "Who?"], 2, "x.odt is of an unknown kind"),
    "k of 0": (["in", "Who?", "--k", "0"], 2, "k=0 cannot be used"),
    "no such reader": (["in", "Who?", "--reader", "nobody"], 3, "there is no reader nobody"),
    "no such base": (["in", "Who?", "--base", "gone.gguf"], 3, "the base of the reader tiny-reads is not here"),
    "another base": (["in", "Who?", "--base", "other.gguf"], 3, "other.gguf is not the base of the reader tiny-reads"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(folder: Path, flags: list[str], capsys: Capture, name: str) -> None:
    words, code, message = BAD[name]
    (folder.parent / "empty").mkdir()
    (folder.parent / "x.odt").write_text("x")
    gguf_helpers.write(folder.parent / "other.gguf", blocks="Q4_0")
    assert cli.main(["ask", *flags, *words]) == code
    error = capsys.readouterr().err
    assert message in error, error
    assert len(error[error.index("error: ") :].splitlines()) == 3, error


def test_a_base_that_is_not_here(
    folder: Path, reader_folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    """Nobody is asked where nobody sits; `--yes` fetches it."""
    raw = base.read_bytes()
    reader = reader_file.read_reader(reader_folder)
    known = bases.KnownBase(
        name="tiny", file="tiny.gguf", sha256=reader.base.sha256, size=len(raw), package="tiny-none", version="1"
    )
    monkeypatch.setitem(bases.BASES, "tiny", known)
    shipped = tmp_path / "shipped"
    shutil.copytree(reader_folder, shipped / "smollm2")
    monkeypatch.setattr(reader_file, "SHIPPED", shipped)
    assert cli.main(["ask", str(folder), "castle"]) == 3
    assert "is not here" in capsys.readouterr().err
    monkeypatch.setattr(bases, "_download", lambda *args: base)
    assert cli.main(["ask", str(folder), "castle", "--yes"]) == 0
    assert known.path.read_bytes() == raw
    assert cli.main(["ask", str(folder), "castle"]) == 0
