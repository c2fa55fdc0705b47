"""A folder that a library follows: what is read, deleted and kept, a folder that vanishes, a program that is stopped."""

import errno
import gzip
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from retro_engine.data import files
from retro_engine.data.corpus import Document
from retro_engine.data.store import Store
from retro_engine.errors import MissingInputError, StoreError, UsageError
from retro_engine.library import following
from retro_engine.library.following import sync
from retro_engine.library.library import Library
from retro_engine.progress import Reporter


@pytest.fixture
def library(tmp_path: Path, small_store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    monkeypatch.setattr(following, "FRESH_NS", 0)  # tests change files at once
    Library.create(tmp_path / "library", small_store.tokenizer, 16)
    with Library(tmp_path / "library") as library:
        library.add([Document("own", "", "A heron that came in another way.")])
        yield library


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    (tmp_path / "notes" / "river.md").write_text("# The river\n\nThe river is long.")
    (tmp_path / "notes" / "deep" / "stone.txt").write_text("The stone is old.")
    (tmp_path / "notes" / "rows.jsonl").write_text(
        '{"id": "x", "text": "A cloud.", "metadata": {"n": 1}}\n{"text": "Snow."}\n'
    )
    return tmp_path / "notes"


def ids(library: Library) -> list[str]:
    return [entry.id for entry in library.entries()]


ALL = ["notes/deep/stone.txt", "notes/river.md", "notes/rows.jsonl:1", "notes/rows.jsonl:2", "own"]


def test_added_changed_deleted(library: Library, notes: Path) -> None:
    first = sync(library, notes)
    assert (first.num_files, first.num_documents, first.num_read, first.num_removed) == (3, 4, 3, 0)
    assert ids(library) == ALL
    found = library.get("notes/rows.jsonl:1")
    assert found is not None
    assert (found.title, found.metadata) == ("x", {"n": 1})
    version = library.version
    again = sync(library, notes)
    assert (again.num_read, again.num_removed, library.version) == (0, 0, version), "nothing is written for nothing"
    (notes / "river.md").write_text("The river is short.")
    (notes / "rows.jsonl").write_text('{"text": "Fog."}\n')
    (notes / "deep" / "stone.txt").unlink()
    (notes / "new.html").write_text("<title>New</title><p>A volcano.</p>")
    after = sync(library, notes)
    assert (after.num_files, after.num_documents, after.num_read, after.num_removed) == (3, 3, 3, 1)
    assert ids(library) == ["notes/new.html", "notes/river.md", "notes/rows.jsonl:1", "own"]
    assert library.get("notes/river.md").text == "The river is short."  # type: ignore[union-attr]
    library.verify()


def test_a_file_is_the_document_that_add_makes_of_it(library: Library, notes: Path) -> None:
    from retro_engine.data.corpus import Reader
    from retro_engine.library.identity import identified_in

    (document,) = Reader().read([notes / "river.md"])
    assert isinstance(document, Document)
    library.add(identified_in(library, [document], "default"))
    sync(library, notes)
    assert ids(library) == ALL


def test_a_folder_that_vanishes_is_not_taken_for_deletions(library: Library, notes: Path, tmp_path: Path) -> None:
    sync(library, notes)
    version = library.version
    notes.rename(tmp_path / "unplugged")
    with pytest.raises(MissingInputError, match="what was read of it stays: 3 files"):
        sync(library, notes)
    notes.mkdir()
    with pytest.raises(MissingInputError, match="is it mounted"):
        sync(library, notes)
    (notes / "picture.png").write_bytes(b"x")
    with pytest.raises(MissingInputError, match="it held 3"):
        sync(library, notes)
    shutil.rmtree(notes)
    notes.write_text("a file now")
    with pytest.raises(MissingInputError, match="is no folder"):
        sync(library, notes)
    assert (ids(library), library.version) == (ALL, version)
    assert following.forget(library, notes) == 3
    assert ids(library) == ["own"]
    with pytest.raises(MissingInputError, match="is not followed"):
        following.forget(library, notes)
    with pytest.raises(MissingInputError, match="is no folder"):
        sync(library, tmp_path / "never")


def test_what_cannot_be_looked_into_stays(library: Library, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync(library, notes)
    scandir = os.scandir

    def refused(path: Any) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    (notes / "river.md").unlink()
    state = sync(library, notes)
    assert (state.num_removed, state.num_files) == (1, 2)
    assert "notes/deep/stone.txt" in ids(library)


def test_folders_within_each_other_are_refused(library: Library, notes: Path, tmp_path: Path) -> None:
    sync(library, notes)
    for other in (notes / "deep", tmp_path):
        with pytest.raises(UsageError, match="holds the same files"):
            sync(library, other)
    (tmp_path / "notes2").mkdir()
    (tmp_path / "notes2" / "a.txt").write_text("Another.")
    assert sync(library, tmp_path / "notes2").num_read == 1, "a name that only begins alike"
    assert sync(library, notes, "elsewhere").num_read == 3, "namespaces do not see each other"


def test_who_is_killed_goes_on(library: Library, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is known with it: rows that are gone by then are found, and nothing is there twice."""
    monkeypatch.setattr(following, "BATCH_DOCUMENTS", 1)
    write, calls = Library.write, []

    def killed(self: Library, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(self, *args)

    monkeypatch.setattr(Library, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        sync(library, notes)
    assert ids(library) == ["notes/river.md", "notes/rows.jsonl:1", "own"]
    (notes / "rows.jsonl").write_text("\n")
    state = sync(library, notes)
    assert (state.num_read, state.num_documents) == (2, 2)
    assert ids(library) == ["notes/deep/stone.txt", "notes/river.md", "own"]


def test_a_reset_reads_all_again_and_damage_is_seen(library: Library, notes: Path) -> None:
    sync(library, notes)
    library.reset("default")
    assert sync(library, notes).num_read == 3
    connection = apsw.Connection(str(library.file.path))
    for damage in ("state = replace(state, 'documents', 'document')", "state = '{}', state_crc = 2745614147"):
        connection.execute(f"UPDATE followed SET {damage}")
        with pytest.raises(StoreError, match="is damaged"):
            sync(library, notes)
    connection.close()


class Said(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__("quiet")
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


class Failing(io.FileIO):
    """A file whose disk fails from a place on."""

    at = 0

    def readinto(self, buffer: Any) -> int:
        if self.tell() >= self.at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().readinto(buffer)


def fails_once_hashed(monkeypatch: pytest.MonkeyPatch, at: int = 0) -> None:
    """Files are hashed, and cannot be read then."""
    sha256_file, open_file, hashed = files.sha256_file, files.open_file, set[Path]()

    def hashes(path: Path) -> str:
        mark = sha256_file(path)
        hashed.add(path)
        return mark

    def opened(path: Path) -> io.FileIO:
        return Failing(path) if path in hashed else open_file(path)

    def unpacked(path: Path, mode: str) -> Any:
        return gzip.GzipFile(fileobj=io.BufferedReader(opened(path)), mode=mode)

    monkeypatch.setattr(Failing, "at", at)
    monkeypatch.setattr(files, "sha256_file", hashes)
    monkeypatch.setattr(files, "open_file", opened)
    monkeypatch.setattr(gzip, "open", unpacked)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_what_cannot_be_hashed_stays(library: Library, notes: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    sync(library, notes)
    for path in (notes / "river.md", notes / "new.txt"):
        path.write_text("Another river.")
    sha256_file = files.sha256_file

    def refused(path: Path) -> str:
        if path.name in ("river.md", "new.txt"):
            raise OSError(code, os.strerror(code))
        return sha256_file(path)

    with monkeypatch.context() as patched:
        patched.setattr(files, "sha256_file", refused)
        said = Said()
        state = sync(library, notes, reporter=said)
        assert (ids(library), state.num_read, state.num_removed, state.num_aside) == (ALL, 0, 0, 2)
        assert len([line for line in said.lines if f"river.md: it cannot be read: {os.strerror(code)}" in line]) == 1
        assert library.get("notes/river.md").text == "# The river\n\nThe river is long."  # type: ignore[union-attr]
    (notes / "river.md").write_text("# The river\n\nThe river is long.")
    assert sync(library, notes).num_read == 1, "the new one; the other is found to be as it was"
    (notes / "river.md").write_text("The river is short.")
    assert sync(library, notes).num_aside == 0
    assert library.get("notes/river.md").text == "The river is short."  # type: ignore[union-attr]
    version = library.version
    sync(library, notes)
    assert library.version == version


def write_parquet(path: Path, text: str) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": [text]}), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.txt", lambda path, text: path.write_text(text)),
        ("a.txt.gz", lambda path, text: path.write_bytes(gzip.compress(text.encode()))),
        ("a.html", lambda path, text: path.write_text(f"<p>{text}</p>")),
        ("a.jsonl", lambda path, text: path.write_text(json.dumps({"text": text}))),
        ("a.csv", lambda path, text: path.write_text(f"text\n{text}\n")),
        ("a.parquet", write_parquet),
    ],
)
def test_what_cannot_be_read_once_it_was_hashed_stays(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, write: Callable[[Path, str], object]
) -> None:
    (tmp_path / "one").mkdir()
    write(tmp_path / "one" / name, "An old heron.")
    sync(library, tmp_path / "one")
    before = [(one, library.get(one)) for one in ids(library)]
    write(tmp_path / "one" / name, "A new and larger heron.")
    with monkeypatch.context() as patched:
        fails_once_hashed(patched)
        for _ in range(2):
            said = Said()
            assert sync(library, tmp_path / "one", reporter=said).num_aside == 1
            assert any("Input/output error" in line for line in said.lines), said.lines
            assert [(one, library.get(one)) for one in ids(library)] == before
    assert sync(library, tmp_path / "one").num_aside == 0
    assert [library.get(one).text for one in ids(library)][0] == "A new and larger heron."  # type: ignore[union-attr]


def test_rows_stay_where_the_disk_fails_between_batches(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read takes its place, nothing is deleted, and the file is read again though it has its old content then."""
    monkeypatch.setattr(following, "BATCH_DOCUMENTS", 1)
    (tmp_path / "one").mkdir()
    path, size = tmp_path / "one" / "a.jsonl", io.DEFAULT_BUFFER_SIZE

    def rows(word: str, count: int) -> str:
        return "".join(json.dumps({"text": f"{word} {number} " + "x" * size}) + "\n" for number in range(count))

    def words() -> list[str]:
        texts = [library.get(f"one/a.jsonl:{row}") for row in range(1, 9)]
        return [one.text.split()[0] for one in texts if one is not None]

    path.write_text(old := rows("old", 6))
    sync(library, tmp_path / "one")
    path.write_text(rows("new", 5))
    with monkeypatch.context() as patched:
        fails_once_hashed(patched, at=3 * size)
        assert sync(library, tmp_path / "one").num_aside == 1
    assert len(words()) == 6 and set(words()) == {"old", "new"}
    kept = path.stat()
    path.write_text(old)
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert sync(library, tmp_path / "one").num_read == 1
    assert words() == ["old"] * 6
    path.write_text(rows("new", 2))
    sync(library, tmp_path / "one")
    assert words() == ["new"] * 2
    library.verify()


def test_what_can_be_read_and_not_used_takes_its_place(library: Library, notes: Path) -> None:
    sync(library, notes)
    (notes / "river.md").write_bytes(b"A r\xefver.")
    (notes / "rows.jsonl").write_text('{"text": "Fog."}\n{"text": 3}\nthe file cannot be read: Input/output error\n')
    assert sync(library, notes).num_aside == 3
    assert ids(library) == ["notes/deep/stone.txt", "notes/rows.jsonl:1", "own"]
    assert sync(library, notes).num_read == 0, "it is not tried again"


@pytest.mark.parametrize("code", [None, errno.EIO, errno.EACCES, errno.ENOENT, errno.ENOTDIR])
def test_only_what_is_not_there_has_gone(
    library: Library, notes: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    """Between finding a file and looking at it; None: the system says no, and not why."""
    sync(library, notes)
    check_file = following.check_file

    def checked(path: Path) -> os.stat_result:
        if path.name != "river.md":
            return check_file(path)
        cause = None if code is None else OSError(code, os.strerror(code))
        raise MissingInputError("river.md cannot be read", "permission denied") from cause

    monkeypatch.setattr(following, "check_file", checked)
    has_gone = code in (errno.ENOENT, errno.ENOTDIR)
    assert sync(library, notes).num_removed == has_gone
    assert ids(library) == [one for one in ALL if not (has_gone and one == "notes/river.md")]
