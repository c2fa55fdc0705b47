"""`retro docs`, as it is typed."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers import write_corpus

from retro_engine.cli import main
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*words: str, code: int = 0) -> tuple[str, str]:
        assert main(["docs", *words]) == code
        return capsys.readouterr()

    return call


def test_from_nothing_to_an_answer_and_back(run: Any, small_store: Store, tmp_path: Path) -> None:
    library, source = str(tmp_path / "library"), write_corpus(tmp_path / "c.jsonl", 12)
    (tmp_path / "bad.jsonl").write_text('{"id": "ok", "text": "a heron"}\n{"text": ""}\n')
    _, error = run("add", library, str(source), code=3)
    assert "--store STORE" in error
    made = ("--store", str(small_store.folder), "--embedder", "hash")
    out, _ = run("add", library, str(source), "--json", *made)
    assert json.loads(out) == {"added": 12, "set_aside": 0, "version": 1}
    out, error = run("add", library, str(tmp_path / "bad.jsonl"))
    assert "added: 1\nset_aside: 1" in out
    assert "empty" in error
    out, _ = run("query", library, "heron", "--json", "--k", "1")
    hit = json.loads(out)
    assert (hit["document"], hit["text"], hit["chunk"]) == ("ok", "a heron", 0)
    for mode in ("dense", "hybrid", "hash"):
        out, _ = run("query", library, "heron", "--retriever", mode, "--fusion", "1", "2")
        assert len(out.splitlines()) == 5
    out, _ = run(
        "query", library, "river stone", "--stores", str(small_store.folder), "--source-weights", "1", "1", "--json"
    )
    assert {json.loads(line)["source"] for line in out.splitlines()} == {"library", "store"}
    out, _ = run("list", library, "--limit", "3", "--after", "d1")
    assert [line.split("\t")[0] for line in out.splitlines()] == ["d10", "d11", "d2"]
    assert run("get", library, "ok")[0] == "a heron\n"
    assert json.loads(run("rm", library, "ok", "unknown", "--json")[0]) == {"deleted": 1, "version": 3}
    assert "does not exist" in run("get", library, "ok", code=3)[1]
    assert json.loads(run("reset", library, "--yes", "--json")[0]) == {"deleted": 12, "version": 4}
    assert run("list", library, "--json")[0] == ""


def test_import(run: Any, small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, source = str(tmp_path / "library"), write_corpus(tmp_path / "c.jsonl", 12)
    out, _ = run("import", library, str(source), "--json", "--store", str(small_store.folder), "--stride", "8")
    assert json.loads(out)["added"] == 12

    class Stdin:
        buffer = io.BytesIO(b'{"id": "piped", "text": "a heron"}\nnonsense\n')

    monkeypatch.setattr("sys.stdin", Stdin)
    out, error = run("import", library, "-", "--namespace", "other")
    assert "added: 1\nfailed: 1" in out
    assert "not JSON" in error
    assert "heron" in run("query", library, "heron", "--namespace", "other")[0]
    Stdin.buffer = io.BytesIO(b"the text of one document")
    run("add", library, "-", "--id", "one")
    assert run("get", library, "one")[0] == "the text of one document\n"


def test_inspect(run: Any, small_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library = tmp_path / "library"
    run("add", str(library), str(write_corpus(tmp_path / "c.jsonl", 12)), "--store", str(small_store.folder))
    assert main(["inspect", str(library), "--verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["verified"], found["namespaces"]["default"]["documents"]) == ("library", True, 12)


def test_refusals(run: Any, small_store: Store, tmp_path: Path) -> None:
    library = str(tmp_path / "library")
    assert "is not a library" in run("list", library, code=3)[1]
    (tmp_path / "empty.txt").write_text(" ")
    made = ("--store", str(small_store.folder))
    assert "nothing was added" in run("add", library, str(tmp_path / "empty.txt"), *made, code=3)[1]
    assert "needs an id" in run("add", library, "-", code=2)[1]
    assert "k=0" in run("query", library, "river", "--k", "0", code=2)[1]
    assert "1,000,000 characters" in run("query", library, "x" * 1_000_000, code=2)[1]
    assert "needs vectors" in run("query", library, "river", "--retriever", "dense", code=2)[1]
    assert "required: --yes" in run("reset", library, code=2)[1]


def test_a_library_that_is_there_keeps_its_tokenizer(run: Any, small_store: Store, tmp_path: Path) -> None:
    """A --store of another one is refused, not passed over."""
    library, source = str(tmp_path / "library"), str(write_corpus(tmp_path / "c.jsonl", 3))
    run("add", library, source, "--store", str(small_store.folder))
    run("add", library, source, "--store", str(small_store.folder))
    other = prepare([source], tmp_path / "other", vocab_size=300, chunk_size=16)
    for what in ("add", "import"):
        assert "tokenizer" in run(what, library, source, "--store", str(other.folder), code=3)[1]
    run("list", library)


def test_no_hit_says_why(run: Any, small_store: Store, tmp_path: Path) -> None:
    library = str(tmp_path / "library")
    (tmp_path / "a.txt").write_text("The castle and C++.")
    run("add", library, str(tmp_path / "a.txt"), "--store", str(small_store.folder))
    for text, why in (("to be or not to be", "stop words"), ("zebra", "none of its words"), ("?!", "no word")):
        out, error = run("query", library, text)
        assert out == "" and "no hit: " in error and why in error
    assert "nor in" in run("query", library, "zebra", "--stores", str(small_store.folder))[1]
    assert json.loads(run("query", library, "zebra", "--json")[1])["text"].startswith("no hit")
    assert run("query", library, "zebra", "--quiet") == ("", "")
    assert run("query", library, "c++")[1] == ""


def test_the_reading_of_a_library(run: Any, small_store: Store, tmp_path: Path) -> None:
    library = str(tmp_path / "library")
    (tmp_path / "a.txt").write_text("to be or not to be")
    made = ("--store", str(small_store.folder), "--stop-words", "none")
    run("add", library, str(tmp_path / "a.txt"), *made)
    assert "a.txt" in run("query", library, "to be")[0]
    run("add", library, str(tmp_path / "a.txt"), "--stop-words", "none")
    assert "another library" in run("add", library, str(tmp_path / "a.txt"), "--stop-words", "de", code=2)[1]
    assert "0 stop words" in run("reread", library, "--stop-words", "none")[0]
    assert "English" in run("reread", library)[0]
    assert "stop words" in run("query", library, "to be")[1]
    assert "folder" in run("add", "http://127.0.0.1:9", str(tmp_path / "a.txt"), "--stop-words", "de", code=2)[1]


def test_one_document_by_every_spelling(
    run: Any, small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text("river")
    (tmp_path / "c.jsonl").write_text('{"text": "a row"}\n{"_id": "own", "text": "b"}\n{"id": true, "text": "c"}\n')
    run("add", "library", "d", "c.jsonl", "--store", str(small_store.folder))
    for name in (str(tmp_path / "d"), "./d/", "d/a.txt", "c.jsonl"):
        run("add", "library", name)
    run("import", "library", str(tmp_path / "c.jsonl"))
    out, _ = run("list", "library", "--quiet")
    names = [line.split("\t")[0] for line in out.splitlines()]
    assert names[:2] == ["d/a.txt", "own"] and len(names) == 3 and names[2].startswith("row-")
    assert "'id' is bool" in run("add", "library", "c.jsonl")[1]


def test_the_advice_of_what_is_set_aside_works(run: Any, small_store: Store, tmp_path: Path) -> None:
    library, rows, text = (str(tmp_path / name) for name in ("library", "rows.csv", "a.txt"))
    Path(rows).write_text("id,Body\n1,the river\n")
    Path(text).write_bytes(b"caf\xe9")
    made = ("--store", str(small_store.folder))
    assert "--text-key of prepare and docs add" in run("add", library, rows, *made, code=3)[1]
    assert "--errors replace of prepare and docs add" in run("add", library, text, code=3)[1]
    run("add", library, rows, text, "--text-key", "Body", "--errors", "replace")
    assert "--id cannot be used" in run("add", library, text, "--id", "x", code=2)[1]
    assert "--text-key cannot be used" in run("add", library, "-", "--id", "x", "--text-key", "y", code=2)[1]
    assert run("get", library, "1")[0].strip() == "the river" and "caf\ufffd" in run("get", library, "a.txt")[0]


def test_what_is_passed_over_is_named(
    run: Any, small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it: no file lists the rest. A FIFO is not waited for, and text that is not UTF-8 is not changed silently."""
    library, folder = str(tmp_path / "library"), tmp_path / "in"
    folder.mkdir()
    for name in [f"{number}.png" for number in range(25)] + ["A.MD", "b.csv"]:
        (folder / name).write_text("id,text\n1,words")
    os.mkfifo(folder / "f.jsonl")
    out, error = run("add", library, str(folder), "--store", str(small_store.folder))
    assert "added: 2" in out
    assert error.count("of an unknown kind") == 25
    assert f"passed over: {folder}/f.jsonl: a FIFO, not a file" in error
    for command in ("add", "import"):
        assert "is a FIFO" in run(command, library, str(folder / "f.jsonl"), code=3)[1]
    assert json.loads(run("import", library, str(folder / "b.csv"), "--json")[0])["added"] == 1
    monkeypatch.setattr("sys.stdin", type("Stdin", (), {"buffer": io.BytesIO(b"caf\xe9")}))
    assert "not UTF-8 at byte 3" in run("add", library, "-", "--id", "x", code=3)[1]
    with open("/dev/zero") as endless:
        monkeypatch.setattr("sys.stdin", endless)
        assert "is a device" in run("import", library, "-", code=3)[1]


def test_metadata_is_filtered_by(run: Any, small_store: Store, tmp_path: Path) -> None:
    library = str(tmp_path / "library")
    for name, year in (("old", "1902"), ("new", "2024")):
        (tmp_path / f"{name}.txt").write_text("The heron stands.")
        made = ("--store", str(small_store.folder), "--metadata", f"year={year}", "--metadata", "kind=bird")
        run("add", library, str(tmp_path / f"{name}.txt"), *made)
    out, error = run("query", library, "heron", "--where", "year=2024", "--where", "kind=bird", "--json")
    assert [json.loads(line)["document"] for line in out.splitlines()] == ["new.txt"]
    assert error == ""
    assert json.loads(run("get", library, "new.txt", "--json")[0])["metadata"] == {"year": 2024, "kind": "bird"}
    out, error = run("query", library, "heron", "--where", "author=Ada")
    assert out == ""
    assert "no hit: no document has the field author (fields that documents have: kind, year)" in error
    assert "KEY=VALUE" in run("query", library, "heron", "--where", "year", code=2)[1]
    assert "no metadata" in run("query", library, "a", "--where", "a=1", "--stores", str(small_store.folder), code=2)[1]
    for wrong in (["--metadata", "year"], ["--metadata", "a=1", "--metadata", "a=2"], ["--metadata", f"a={'x' * 600}"]):
        assert "cannot be used" in run("add", library, str(tmp_path / "old.txt"), *wrong, code=2)[1]


def test_a_folder_is_followed(run: Any, small_store: Store, tmp_path: Path) -> None:
    library, notes = str(tmp_path / "library"), tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text("The heron stands.")
    out, _ = run("sync", library, str(notes), "--json", "--store", str(small_store.folder))
    assert json.loads(out) == {"files": 1, "documents": 1, "read": 1, "removed": 0, "set_aside": 0, "version": 1}
    (notes / "a.txt").rename(notes / "b.txt")
    assert "read: 1\nremoved: 1" in run("sync", library, str(notes))[0]
    assert run("list", library)[0].startswith("notes/b.txt")
    notes.rename(tmp_path / "gone")
    assert "--forget" in run("sync", library, str(notes), code=3)[1]
    assert "forgotten: 1" in run("sync", library, str(notes), "--forget")[0]
    assert "retro serve RUN --follow DIR" in run("sync", "http://127.0.0.1:1", str(notes), code=2)[1]


def test_an_embedder_is_the_librarys_own(run: Any, small_store: Store, tmp_path: Path) -> None:
    library = str(tmp_path / "library")
    (tmp_path / "a.txt").write_text("The heron stands.")
    run("add", library, str(tmp_path / "a.txt"), "--store", str(small_store.folder))
    for name in ("hash", "minilm"):
        error = run("add", library, str(tmp_path / "a.txt"), "--embedder", name, code=2)[1]
        assert f"--embedder {name} cannot be used" in error and "was made with none" in error
    run("add", library, str(tmp_path / "a.txt"), "--embedder", "none")
    assert (
        "for a library in a folder"
        in run("add", "http://127.0.0.1:1", str(tmp_path / "a.txt"), "--embedder", "hash", code=2)[1]
    )
