"""A folder that a library follows: what is read, deleted and kept, a folder that vanishes, a program that is stopped."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from retro_engine.data.corpus import Document
from retro_engine.data.store import Store
from retro_engine.errors import MissingInputError, StoreError, UsageError
from retro_engine.library import following
from retro_engine.library.following import sync
from retro_engine.library.library import Library


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
