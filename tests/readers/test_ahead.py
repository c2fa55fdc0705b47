"""The search that runs beside the opening of a model: what it finds, and that whoever it fails searches again."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from retro_engine.errors import MissingInputError, StoreError, UsageError
from retro_engine.progress import Reporter
from retro_engine.readers import ahead
from retro_engine.readers.ahead import begin, checked_question, compare, search
from retro_engine.readers.ask import Asker
from retro_engine.readers.reader import open_reader
from retro_engine.readers.reader_file import read_reader

QUIET = Reporter("quiet")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RETRO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(ahead, "_can_fork", lambda: True)  # torch is here, but has one thread
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "castle.md").write_text("# A castle\n\nThe castle was built in 1302 by Adelheid.")
    return tmp_path / "in"


def test_what_it_finds_is_what_a_search_finds(folder: Path, reader_folder: Path, base: Path) -> None:
    reader = read_reader(reader_folder)
    assert begin(reader, [str(folder)], "the castle", QUIET) is None, "nothing was opened yet"
    asker = Asker([folder], reader, base, dtype="fp32")
    started = begin(reader, [str(folder)], "Who built the castle?", QUIET)
    assert started is not None
    found = started.result()
    expected = search(asker.documents, "Who built the castle?", reader.reading)
    assert found is not None
    assert [hit.document for hit, _ in found.found.pairs()] == [hit.document for hit, _ in expected.found.pairs()] != []
    assert found.found.hits == expected.found.hits
    assert found.synced.num_read == 1, "it read the documents"
    assert expected.synced.num_read == 0
    answers = [asker.ask("Who built the castle?"), asker.ask("Who built the castle?", begin(reader, [str(folder)], "Who built the castle?", QUIET))]  # fmt: skip
    assert answers[0].sources == answers[1].sources
    assert answers[0].answer == answers[1].answer


def test_what_it_met_is_met_again(folder: Path, reader_folder: Path, base: Path) -> None:
    reader = read_reader(reader_folder)
    open_reader(reader, base, "fp32")
    started = begin(reader, [str(folder / "gone")], "Who?", QUIET)
    assert started is not None
    assert started.result() is None
    with pytest.raises(MissingInputError):
        Asker([folder / "gone"], reader, base, dtype="fp32").ask(
            "Who?", begin(reader, [str(folder / "gone")], "Who?", QUIET)
        )


def test_nothing_is_forked_beside_threads(reader_folder: Path, base: Path, tmp_path: Path) -> None:
    reader = read_reader(reader_folder)
    open_reader(reader, base, "fp32")
    assert "torch" in sys.modules
    assert begin(reader, [str(tmp_path)], "Who?", QUIET) is None


def test_files_are_compared_meanwhile(folder: Path, reader_folder: Path, base: Path, tmp_path: Path) -> None:
    reader = read_reader(reader_folder)
    assert compare(reader, base, None).kept == {}, "nothing was opened yet"
    open_reader(reader, base, "bf16")
    (kept,) = compare(reader, base, None).kept.items()
    assert kept[0].name.startswith("bf16-")
    assert kept[1].result() == kept[0]
    assert compare(reader, base, "int8").kept == {}, "int8 is made of fp32"
    open_reader(reader, base, "fp32")
    assert compare(reader, base, None).kept == {}, "which of two types is opened is not known yet"
    assert [path.name[:5] for path in compare(reader, base, "int8").kept] == ["fp32-"]
    (kept[0] / "model.safetensors").write_bytes(b"other")
    said: list[str] = []
    assert open_reader(reader, compare(reader, base, "bf16"), "bf16", said.append).model.dtype == torch.bfloat16
    assert "it is made again" in said[0]
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    with pytest.raises(StoreError, match="is not the base of the reader"):
        Asker([folder], reader, compare(reader, other, "bf16"), dtype="bf16")
    with pytest.raises(MissingInputError, match="is not here"):
        Asker([folder], reader, tmp_path / "none.gguf", dtype="bf16")


def test_who_answers_does_not_import_what_searches() -> None:
    """It takes a tenth of a second, and runs in the other process meanwhile."""
    code = "import sys, retro_engine.readers.ask, retro_engine.library.file_states; print('retro_engine.library.library' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "False"


def test_questions() -> None:
    assert checked_question(" Who\n built  it? ") == "Who built it?"
    for bad in ("", " \n", "x" * 2001, "a\0b", "a\ud800b"):
        with pytest.raises(UsageError):
            checked_question(bad)
