"""One document each, whichever way it came in; what an older library knows by its place keeps that id."""

import io
import json
import os
from pathlib import Path

import pytest

from retro_engine.data.corpus import Document, Reader
from retro_engine.data.identity import content_id
from retro_engine.data.inputs import find_files
from retro_engine.data.store import Store
from retro_engine.library.identity import identified, identified_in
from retro_engine.library.importer import Importer
from retro_engine.library.library import Library


@pytest.fixture
def folder(tmp_path: Path, small_store: Store, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a library, two text files and rows with and without ids; the working directory."""
    Library.create(tmp_path / "library", small_store.tokenizer, 16)
    (tmp_path / "d").mkdir()
    for name in ("a", "b"):
        (tmp_path / "d" / f"{name}.txt").write_text(f"The river of {name}.")
    rows = [{"text": "a row without an id", "title": "T"}, {"text": "another"}, {"_id": "own", "text": "third"}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def add(library: Library, *inputs: str) -> None:
    documents = [row for row in Reader().read(find_files(inputs)[0]) if isinstance(row, Document)]
    library.add(identified_in(library, documents, "default"))


def ids(library: Library) -> list[str]:
    return [entry.id for entry in library.entries()]


def test_files_by_every_spelling(folder: Path) -> None:
    (folder / "link").symlink_to("d")
    with Library(folder / "library") as library:
        for name in ("d", "./d", "d/", str(folder / "d"), "d/../d", "link", "d/a.txt", str(folder / "link" / "b.txt")):
            add(library, name)
            assert ids(library) == ["d/a.txt", "d/b.txt"], name
        os.chdir(folder / "d")
        add(library, ".", "../d/a.txt")
        assert ids(library) == ["d/a.txt", "d/b.txt"]


def test_the_same_rows_by_every_way(folder: Path) -> None:
    raw = (folder / "c.jsonl").read_bytes()
    expected = sorted([content_id("T", "a row without an id"), content_id("", "another"), "own"])
    with Library("library") as library, Importer(library) as importer:
        add(library, "c.jsonl")
        assert sorted(ids(library)) == expected
        for source in ("c.jsonl", io.BytesIO(raw), io.BytesIO(raw), str(folder / "c.jsonl"), Path("d/../c.jsonl")):
            assert importer.wait(importer.start(source)).state == "done"
            assert sorted(ids(library)) == expected
        (folder / "renamed.jsonl").write_bytes(b"\n" + raw)
        add(library, "renamed.jsonl")
        assert sorted(ids(library)) == expected


def test_what_is_wrong_in_a_stream_is_named_by_its_line(folder: Path) -> None:
    with Library("library") as library, Importer(library) as importer:
        job = importer.wait(importer.start(io.BytesIO(b'{"text": "good"}\nbad\n{"id": true, "text": "x"}\n')))
    assert [source for source, _ in job.errors] == ["line 2", "line 3"]


def test_an_older_library_keeps_its_ids(folder: Path) -> None:
    """It has documents under their places: as they were spelled, or absolute."""
    with Library("library") as library:
        del library.file.settings["identity"]
        old = [
            Document("./d/a.txt", "", "as it was"),
            Document(str(folder / "d/b.txt"), "", "as it was"),
            Document("c.jsonl:1", "T", "a row without an id"),
            Document(f"{folder}/c.jsonl:2", "", "some other text"),
        ]
        library.add(old)
        add(library, "d", "c.jsonl")
        kept = {document.id for document in old} - {"./d/a.txt"}
        assert set(ids(library)) == kept | {"./d/a.txt", "d/a.txt", content_id("", "another"), "own"}
        add(library, "./d/a.txt")
        found = library.get(f"{folder}/d/b.txt")
        assert found is not None and found.text == "The river of b."


def test_ids_of_their_own_stay(folder: Path) -> None:
    document = Document("d/a.txt", "", "text", "elsewhere.jsonl:3")
    assert identified(document, folder) is document
    assert identified(Document("x.jsonl:3", "T", "text", "x.jsonl:3"), folder).id == content_id("T", "text")


def test_files_whose_names_no_id_may_hold(folder: Path) -> None:
    """Bytes that are not UTF-8, macOS' letters in parts, emoji of several, what turns a line, long paths: one id a file,
    though its text changes.
    """
    (folder / "e").mkdir()
    long = folder / "e" / ("p" * 250) / ("q" * 251)
    long.mkdir(parents=True)
    paths = {
        os.fsencode(folder / "e") + b"/caf\xe9.txt": "e/caf\\xe9.txt",
        os.fsencode(folder / "e" / "cafe\u0301.md"): "e/caf\u00e9.md",
        os.fsencode(folder / "e" / "\U0001f468\u200d\U0001f469.txt"): "e/\U0001f468\\u200d\U0001f469.txt",
        os.fsencode(folder / "e" / "\u202etxt.html"): "e/\\u202etxt.html",
        os.fsencode(folder / "e" / "a\nb.txt"): "e/a\\nb.txt",
        os.fsencode(folder / " lead.txt"): "\\x20lead.txt",
        os.fsencode(long / "deep.txt"): "file-",
    }
    with Library("library") as library:
        for text in ("first", "second"):
            for path in paths:
                Path(os.fsdecode(path)).write_text(text)
            add(library, "e", " lead.txt")
        found = ids(library)
        expected = sorted(paths.values(), key=str.encode)
        assert len(found) == len(expected) and all(map(str.startswith, found, expected)), found
        assert {document.text for i in found if (document := library.get(i))} == {"second"}
        assert library.delete(found) == len(paths)


def test_letters_in_parts(folder: Path) -> None:
    """One id where Unicode has two spellings of it; two files where a folder has both."""
    (folder / "r.jsonl").write_text(
        json.dumps({"id": "e\u0301", "text": "a"}) + "\n" + '{"id": "\u00e9", "text": "b"}\n'
    )
    for name in ("u\u0308.txt", "\u00fc.txt"):
        (folder / name).write_text(name)
    with Library("library") as library:
        add(library, "r.jsonl", "u\u0308.txt", "\u00fc.txt")
        assert ids(library) == sorted(["\u00e9", "u\u0308.txt", "\u00fc.txt"], key=str.encode)
        found = library.get("e\u0301")
        assert found is not None and (found.id, found.text) == ("\u00e9", "b")
        assert library.delete(["e\u0301"]) == 1
