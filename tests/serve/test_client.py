"""`retro docs --url`: the same commands on a server's library, its errors as ours, the key sent to nobody else."""

import gzip
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from serve_helpers import Server, serving_run

from retro_engine import cli
from retro_engine.data.corpus import Document
from retro_engine.errors import MissingInputError, OutOfResourceError, UsageError
from retro_engine.serve import client
from retro_engine.serve.client import RemoteLibrary


@pytest.fixture(scope="module")
def server(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One of its own: these tests leave documents behind."""
    with serving_run(small_run, tmp_path_factory.mktemp("client")) as server:
        yield server


@pytest.fixture
def remote(server: Server) -> RemoteLibrary:
    library = RemoteLibrary(server.url, server.keys["admin"])
    library.reset()
    return library


def test_what_a_library_does(remote: RemoteLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BATCH_BYTES", 200)  # several requests
    documents = [Document(f"a/{n} ü", "Title", f"The castle number {n} was built of sand.") for n in range(10, 19)]
    version = remote.add(documents)
    assert version == remote.version > 0
    assert remote.get("a/13 ü") == documents[3]
    assert remote.get("none") is None
    assert [entry.id for entry in remote.entries(limit=4)] == [d.id for d in documents[:4]]
    assert [entry.id for entry in remote.entries(after="a/17 ü")] == ["a/18 ü"]
    assert remote.statistics()["namespaces"]["default"]["documents"] == 9
    hit = remote.search("castle number 15", 1)[0]
    assert hit.document == "a/15 ü"
    assert "number 15" in hit.text
    assert remote.search("to be", 1) == [] and "stop words" in remote.why_nothing("to be")
    assert remote.delete(["a/15 ü", "none"]) == 1
    assert "a/15 ü" not in {found.document for found in remote.search("castle number 15", 9)}
    assert remote.reset() == 8


def test_the_commands(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RETRO_API_KEY", server.keys["admin"])
    note = tmp_path / "note.md"
    note.write_text("The lighthouse was painted red in 1911.")
    rows = tmp_path / "rows.jsonl.gz"
    good = [json.dumps({"id": f"r{n}", "text": f"Row {n} of the harbour."}) for n in range(5)]
    rows.write_bytes(gzip.compress("\n".join([*good, "{no json"]).encode()))

    def run(*words: str) -> str:
        code = cli.main(["docs", *words])
        assert code == 0, capsys.readouterr().err
        return capsys.readouterr().out

    run("reset", "--yes", "--url", server.url)
    assert "added: 1" in run("add", "--url", server.url, str(note))
    assert "lighthouse" in run("query", server.url, "painted lighthouse", "--k", "1")
    out = json.loads(run("import", str(rows), "--url", server.url, "--json").splitlines()[-1])
    assert (out["state"], out["added"], out["failed"]) == ("done", 5, 1)
    assert "Row 3" in run("get", "--url", server.url, "r3")
    assert "deleted: 2" in run("rm", "--url", server.url, "r1", "r2")
    gone = json.loads(run("rm", "--url", server.url, "r1", "--json"))
    assert gone == {"deleted": 0, "version": server.service.index_version} and gone["version"]
    assert len(run("list", server.url, "--quiet").splitlines()) == 4


def test_names_that_no_id_may_hold(
    server: Server, remote: RemoteLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of macOS, whose letters come in parts, one that is not UTF-8, and a row's id: one document each."""
    monkeypatch.setenv("RETRO_API_KEY", server.keys["admin"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "r.jsonl").write_text(json.dumps({"id": "e\u0301", "text": "A row."}))
    for text in ("It was red.", "It was blue."):
        for name in ("d/u\u0308.txt", os.fsdecode(b"d/caf\xe9.txt")):
            (tmp_path / name).write_text(text)
        assert cli.main(["docs", "add", "--url", server.url, "d", "r.jsonl"]) == 0
    assert cli.main(["docs", "import", "--url", server.url, "r.jsonl"]) == 0
    assert [entry.id for entry in remote.entries()] == ["d/caf\\xe9.txt", "d/\u00fc.txt", "\u00e9"]
    found = remote.get("d/u\u0308.txt")
    assert found is not None and found.text == "It was blue."
    assert cli.main(["docs", "rm", "--url", server.url, "e\u0301"]) == 0
    assert remote.get("\u00e9") is None


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["get", "URL", "none"], 3, "does not exist"),
        (["add", "URL", "NOTE", "--store", "s"], 2, "--store is for a library in a folder"),
        (["query", "URL", "x", "--k", "0"], 2, "answered 400"),
        (["list", "URL", "--namespace", "other"], 2, "namespace other is not served"),
        (["list", "http://127.0.0.1:9"], 3, "does not answer"),
        (["list", "http://user:secret@127.0.0.1:9"], 2, "cannot be used"),
        (["import", "URL", "NOTE"], 3, "is not a file of JSON lines"),
        (["import", "URL", "CUT"], 3, "cannot be read to its end"),
    ],
)
def test_bad_input(
    words: list[str], code: int, message: str, server: Server, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("RETRO_API_KEY", server.keys["admin"])
    (tmp_path / "note.md").write_text("x")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    places = {"URL": server.url, "NOTE": str(tmp_path / "note.md"), "CUT": str(tmp_path / "cut.jsonl.gz")}
    assert cli.main(["docs", *(places.get(word, word) for word in words)]) == code
    assert message in capsys.readouterr().err


def test_keys_that_may_not(server: Server) -> None:
    for key in ("", "rk_wrong", server.keys["read"]):
        with pytest.raises(UsageError, match="answered 40[13]"):
            RemoteLibrary(server.url, key).add([Document("x", "", "text")])


class Strange(http.server.BaseHTTPRequestHandler):
    """Answers that are not ours: a redirect, a page, a full disk, and no answer at all."""

    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if "redirect" in self.path:
            self.send_response(302)
            self.send_header("Location", "/stolen")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if "cut" in self.path:
            return
        status, body = (503, b'{"error": {"message": "no space"}}') if "full" in self.path else (200, b"<html>")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("redirect", MissingInputError, "answered 302"),
        ("page", MissingInputError, "is not a server of retro-engine"),
        ("full", OutOfResourceError, "no space"),
        ("cut", MissingInputError, "does not answer"),
    ],
)
def test_servers_that_are_none(path: str, error: type[Exception], message: str) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Strange) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            with pytest.raises(error, match=message):
                RemoteLibrary(f"http://127.0.0.1:{other.server_port}/{path}", "rk_secret").get("x")
        finally:
            other.shutdown()
            thread.join()
    assert not any("stolen" in asked for asked in Strange.asked)
