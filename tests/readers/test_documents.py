"""Files as a live library: what is read when, what is set aside, and what two processes make of it."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from document_helpers import docx_bytes, encrypted_pdf, pdf_bytes, write

from retro_engine.data.identity import file_id
from retro_engine.data.store import Store
from retro_engine.errors import MissingInputError, UnavailableError, UsageError
from retro_engine.library import following
from retro_engine.library.file_states import Synced
from retro_engine.library.library import Library
from retro_engine.progress import Reporter
from retro_engine.readers import documents as module
from retro_engine.readers.documents import Documents, short


class Listening(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__("quiet")
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("RETRO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(following, "FRESH_NS", 0)  # tests change files at once
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "river.md").write_text("# The river\n\nThe river is long.")
    (tmp_path / "in" / "stone.txt").write_text("The stone is old.")
    (tmp_path / "in" / "rows.jsonl").write_text('{"id": "x", "text": "A cloud of rain."}\n{"text": "Wind and snow."}\n')
    return tmp_path / "in"


def made(store: Store, *inputs: Path) -> Documents:
    return Documents(inputs, store.tokenizer, 16, 8, Listening())


def found(documents: Documents, text: str) -> list[str]:
    with documents.opened() as (library, _):
        return [hit.document for hit in library.search(text, 5)]


def synced(documents: Documents) -> Synced:
    with documents.opened() as (_, state):
        return state


def touch(path: Path, seconds: int) -> None:
    at = path.stat().st_mtime_ns + seconds * 10**9
    os.utime(path, ns=(at, at))


def test_files_of_any_suffix_are_read_as_one_kind(small_store: Store, tmp_path: Path, home: Path) -> None:
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "today.log"
    log.write_text("The pump stopped at noon.")
    plain = made(small_store, tmp_path / "logs")
    with pytest.raises(MissingInputError, match="no document"):
        synced(plain)
    as_text = Documents([tmp_path / "logs"], small_store.tokenizer, 16, 8, format="text")
    assert as_text.folder != plain.folder and len(found(as_text, "pump")) == 1
    with pytest.raises(UsageError, match="--format txt does not exist"):
        Documents([log], small_store.tokenizer, 16, format="txt")


def test_only_what_changed_is_read(small_store: Store, folder: Path, home: Path) -> None:
    documents = made(small_store, folder)
    first = synced(documents)
    assert (first.num_files, first.num_documents, first.num_read, first.num_removed) == (3, 4, 3, 0)
    assert found(documents, "river") == [f"{folder}/river.md"]
    assert found(documents, "snow") == [f"{folder}/rows.jsonl:2"]
    with documents.opened() as (library, _):
        assert [hit.title for hit in library.search("cloud", 1)] == ["x"], "a row's own id"
        version = library.version
    assert synced(made(small_store, folder)).num_read == 0
    touch(folder / "stone.txt", 5)
    assert synced(documents).num_read == 0, "its content is the same"
    (folder / "stone.txt").write_text("The glacier moves.")
    (folder / "rows.jsonl").write_text('{"text": "Fog."}\n')
    (folder / "river.md").unlink()
    (folder / "new.html").write_text("<title>New</title><p>A volcano.</p>")
    after = synced(documents)
    assert (after.num_files, after.num_documents, after.num_read, after.num_removed) == (3, 3, 3, 1)
    assert found(documents, "glacier") == [f"{folder}/stone.txt"]
    assert found(documents, "volcano") == [f"{folder}/new.html"]
    assert found(documents, "river cloud snow") == []
    with documents.opened() as (library, _):
        assert library.version > version
        library.verify()
    assert (home / "documents").stat().st_mode & 0o077 == 0


def test_a_file_that_changed_just_now_is_compared(
    small_store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same size and time, as file systems with coarse clocks leave it."""
    monkeypatch.setattr(following, "FRESH_NS", 10**12)
    documents = made(small_store, folder)
    (folder / "a.txt").write_text("The stone is old.")
    assert sorted(found(documents, "stone")) == [f"{folder}/a.txt", f"{folder}/stone.txt"]
    state = (folder / "a.txt").stat()
    (folder / "a.txt").write_text("The cliff is old.")
    os.utime(folder / "a.txt", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (folder / "a.txt").stat().st_size == state.st_size
    assert found(documents, "stone") == [f"{folder}/stone.txt"]
    assert found(documents, "cliff") == [f"{folder}/a.txt"]


def test_what_is_set_aside(small_store: Store, folder: Path) -> None:
    pytest.importorskip("pypdf", reason="pypdf is not installed")
    pytest.importorskip("docx", reason="python-docx is not installed")
    write(folder / "scan.pdf", pdf_bytes([[], []]))
    write(folder / "locked.pdf", encrypted_pdf([["x"]], "word"))
    write(folder / "cut.docx", docx_bytes(["x"])[:-300])
    write(folder / "good.pdf", pdf_bytes([["The ocean is deep."]]))
    write(folder / "good.docx", docx_bytes(["The desert is dry."]))
    with open(folder / "rows.jsonl", "a") as file:
        file.write('{"no": "text"}\n')
    documents = made(small_store, folder)
    assert found(documents, "ocean") == [f"{folder}/good.pdf"]
    assert found(documents, "desert") == [f"{folder}/good.docx"]
    assert isinstance(documents.reporter, Listening)
    said = documents.reporter.lines
    for name, reason in (("scan.pdf", "a scan"), ("locked.pdf", "password"), ("cut.docx", "damaged"), ("rows.jsonl:3", "no key")):  # fmt: skip
        assert sum(name in line and reason in line for line in said) == 1, name
    state = synced(made(small_store, folder))
    assert (state.num_read, state.num_aside, len(state.aside)) == (0, 4, 4)


def test_nothing_to_read(small_store: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there are no documents"):
        Documents([], small_store.tokenizer, 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInputError, match="there is no document to read"):
        synced(made(small_store, tmp_path / "empty"))
    (tmp_path / "empty" / "blank.txt").write_text(" \n")
    with pytest.raises(MissingInputError, match=r"blank.txt: empty"):
        synced(made(small_store, tmp_path / "empty"))
    with pytest.raises(MissingInputError, match="does not exist"):
        synced(made(small_store, tmp_path / "gone"))
    (tmp_path / "x.odt").write_text("x")
    with pytest.raises(UsageError, match="unknown kind"):
        synced(made(small_store, tmp_path / "x.odt"))


def test_what_a_kill_leaves_is_made_anew(small_store: Store, folder: Path) -> None:
    documents = made(small_store, folder)
    synced(documents)
    with Library(documents.library_folder) as library:  # written, and killed before the state was
        library.delete([f"{folder}/stone.txt"])
    assert found(documents, "stone") == [f"{folder}/stone.txt"]
    for damage in ("", "{", '{"version": 1}', '{"version": 1, "library": -1, "files": {}}'):
        (documents.folder / "files.json").unlink()
        (documents.folder / "files.json").write_text(damage)
        assert found(documents, "stone") == [f"{folder}/stone.txt"]
    for name in ("documents.sqlite", "segments"):
        path = documents.library_folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        assert found(documents, "river") == [f"{folder}/river.md"], name
    with open(documents.library_folder / "documents.sqlite", "r+b") as file:
        file.write(b"no database at all, whatever it was before")
    assert found(documents, "cloud") == [f"{folder}/rows.jsonl:1"]


def test_a_file_that_goes_meanwhile(small_store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = made(small_store, folder)
    synced(documents)
    (folder / "river.md").write_text("The river is short.")
    sha256_file = following.files.sha256_file

    def gone(path: Path) -> str:
        if path.name == "river.md":
            raise FileNotFoundError(2, "No such file or directory")
        return sha256_file(path)

    monkeypatch.setattr(following.files, "sha256_file", gone)
    state = synced(documents)
    assert (state.num_files, state.num_documents, state.num_aside) == (3, 3, 1)
    assert "it cannot be read: No such file" in state.aside[0].reason
    monkeypatch.setattr(following.files, "sha256_file", sha256_file)
    assert synced(documents).num_documents == 4
    assert found(documents, "short") == [f"{folder}/river.md"]


def test_who_is_stopped_goes_on(small_store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = made(small_store, folder)
    monkeypatch.setattr(following, "BATCH_DOCUMENTS", 1)  # a write for each
    write, calls = Library.write, []

    def stopped(self: Library, *args: Any) -> tuple[int, int]:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(self, *args)

    monkeypatch.setattr(Library, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        synced(documents)
    state = synced(documents)
    assert (state.num_read, state.num_documents) == (2, 4), "the first file was read before"
    assert found(documents, "cloud") == [f"{folder}/rows.jsonl:1"]


def test_what_cannot_be_looked_into_is_not_gone(
    small_store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = Documents([folder], small_store.tokenizer, 16)
    with docs.opened() as (_, before):
        assert before.num_documents
    with monkeypatch.context() as patch:
        patch.setattr(module, "look", lambda inputs, root, *others: ({}, [file_id(folder, root)]))
        with docs.opened() as (_, synced):
            assert (synced.num_documents, synced.num_removed) == (before.num_documents, 0)
        patch.setattr(module, "look", lambda inputs, root, *others: ({}, []))
        with pytest.raises(MissingInputError):
            docs.opened().__enter__()


def test_many_at_once(small_store: Store, folder: Path) -> None:
    """Processes, as threads with locks of their own, that ask while files change: each sees whole files, none fails."""
    errors: list[BaseException] = []
    stop = threading.Event()

    def ask() -> None:
        try:
            while not stop.is_set():
                assert set(found(made(small_store, folder), "river")) <= {f"{folder}/river.md"}
        except BaseException as error:  # noqa: B036 (said below)
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(6):
        (folder / "river.md").write_text(f"# The river\n\nThe river is {number} miles long." + " Or so." * number)
        stop.wait(0.1)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not errors, errors
    assert set(found(made(small_store, folder), "miles")) == {f"{folder}/river.md"}


def test_another_process_that_writes_is_waited_for(
    small_store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = made(small_store, folder)
    script = (
        "import sys, time; from pathlib import Path; from retro_engine.data import files\n"
        "with files.locked(Path(sys.argv[1])):\n print('has it', flush=True)\n time.sleep(float(sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, str(documents.folder)]
    with subprocess.Popen([*command, "1"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "has it\n"
        assert found(documents, "stone") == [f"{folder}/stone.txt"]
    assert isinstance(documents.reporter, Listening)
    assert any("in use by another process: waiting" in line for line in documents.reporter.lines)
    (folder / "more.txt").write_text("More.")
    with subprocess.Popen([*command, "20"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "has it\n"
        monkeypatch.setattr(module, "in_turn", lambda folder, say: _in_turn(folder, say, 0.3))
        with pytest.raises(UnavailableError, match="is in use"):
            synced(documents)
        other.kill()


_in_turn = module.in_turn


def test_the_state_says_what_was_read(small_store: Store, folder: Path) -> None:
    documents = made(small_store, folder)
    synced(documents)
    state = json.loads((documents.folder / "files.json").read_text())
    assert sorted(state["files"]) == sorted(str(path) for path in folder.iterdir())
    assert state["files"][f"{folder}/rows.jsonl"]["last_row"] == 2
    other = Documents([folder], small_store.tokenizer, 16, 16)
    assert other.folder != documents.folder, "another cut"
    assert made(small_store, folder / "river.md").folder != documents.folder, "other paths"


def test_names_for_people(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.chdir(folder)
    assert short(f"{folder}/river.md") == "river.md"
    assert short("/elsewhere/river.md") == "/elsewhere/river.md"
