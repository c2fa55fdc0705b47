"""Documents over HTTP: against a dict, in the next answer, while the disk is full, after kill -9."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from helpers import small_disk
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from serve_helpers import Server, serving_run

from retro_engine.library.snapshots import LibraryIndex

CAMPAIGN = bool(os.environ.get("RETRO_CAMPAIGN"))
IDS = ["a", "B", "ä/ö", "a b", "...", "import", "reset", "100%", "x?y#z", "日本", "a//b", "%2e"]
TEXTS = [
    "amber lantern",
    "a granite harbor in winter",
    "wörter 日本 🙂",
    "thistle " * 40,
    '<script>alert("x")</script>',
]


@pytest.fixture
def own(small_run: Path, tmp_path: Path) -> Any:
    with serving_run(small_run, tmp_path) as server:
        yield server


def at(identifier: str) -> str:
    return f"/v1/documents/{quote(identifier, safe='')}"


def test_added_is_used_by_the_next_request_and_deleted_is_not(own: Server) -> None:
    ask = {"model": "tiny", "prompt": "Nafock Wuhack grew up in", "max_tokens": 2, "temperature": 0}
    with own.client("admin") as client:

        def read() -> list[str]:
            answer = client.post("/v1/completions", json=ask).json()
            return [hit["document"] for hit in answer["retro"]["neighbors"]]

        assert "news" not in read()
        added = client.post(
            "/v1/documents", json={"id": "news", "title": "N", "text": "Nafock Wuhack grew up in Gaituchul."}
        ).json()
        assert added == {"object": "documents.added", "ids": ["news"], "index_version": 1}
        assert "news" in read()
        hit = client.post("/v1/retrieve", json={"query": "Nafock Wuhack", "k": 1}).json()["data"][0]
        assert (hit["document"], hit["title"], hit["chunk"], hit["source"]) == ("news", "N", 0, "library")
        assert client.post("/v1/documents", json={"id": "news", "text": "Nothing of that kind."}).status_code == 200
        assert "news" not in read()
        client.post("/v1/documents", json={"id": "news", "text": "grew up in Gaituchul"})
        assert "news" in read()
        assert client.delete("/v1/documents/news").json() == {"id": "news", "deleted": True, "index_version": 4}
        assert "news" not in read()
        assert client.delete("/v1/documents/news").status_code == 404
        assert client.get("/v1/documents/news").status_code == 404


class AgainstADict(RuleBasedStateMachine):
    """Whatever was written is read, in the order of ids; whatever was not is not."""

    server: Server

    @initialize()
    def begin(self) -> None:
        self.client = self.server.client("admin")
        self.client.post("/v1/documents/reset", json={"confirm": True})
        self.known: dict[str, tuple[str, str]] = {}

    def teardown(self) -> None:
        self.client.close()

    @rule(rows=st.lists(st.tuples(st.sampled_from(IDS), st.sampled_from(TEXTS)), min_size=1, max_size=4))
    def add(self, rows: list[tuple[str, str]]) -> None:
        body = [{"id": identifier, "title": f"T {text[:5]}", "text": text} for identifier, text in rows]
        answer = self.client.post("/v1/documents", json={"documents": body} if len(body) > 1 else body[0])
        assert answer.status_code == 200, answer.text
        self.known |= {row["id"]: (row["title"], row["text"]) for row in body}

    @rule(rows=st.lists(st.sampled_from(IDS), max_size=2), wrong=st.sampled_from(["", " ", "\0", "x\0y"]))
    def add_with_one_that_is_refused(self, rows: list[str], wrong: str) -> None:
        body = [{"id": identifier, "text": "never"} for identifier in rows] + [{"id": "z", "text": wrong}]
        assert self.client.post("/v1/documents", json={"documents": body}).status_code == 400

    @rule(identifier=st.sampled_from(IDS))
    def delete(self, identifier: str) -> None:
        status = self.client.delete(at(identifier)).status_code
        assert status == (200 if identifier in self.known else 404)
        self.known.pop(identifier, None)

    @rule(identifier=st.sampled_from(IDS))
    def get(self, identifier: str) -> None:
        answer = self.client.get(at(identifier))
        if identifier not in self.known:
            assert answer.status_code == 404
        else:
            title, text = self.known[identifier]
            assert answer.json() == {
                "object": "document",
                "id": identifier,
                "title": title,
                "metadata": {},
                "text": text,
            }

    @rule(word=st.sampled_from(["amber", "granite", "wörter", "thistle", "alert", "never"]))
    def search(self, word: str) -> None:
        hits = self.client.post("/v1/retrieve", json={"query": word, "k": 200}).json()["data"]
        mine = {hit["document"] for hit in hits if hit["source"] == "library"}
        assert mine == {identifier for identifier, (_, text) in self.known.items() if word in text}

    @rule()
    def reset(self) -> None:
        assert self.client.post("/v1/documents/reset", json={"confirm": True}).json()["deleted"] == len(self.known)
        self.known = {}

    @invariant()
    def the_list_is_the_dict(self) -> None:
        if not hasattr(self, "known"):
            return
        found, after = [], ""
        while True:
            page = self.client.get("/v1/documents", params={"after": after, "limit": 5}).json()
            found += [row["id"] for row in page["data"]]
            if not page["has_more"]:
                break
            after = found[-1]
        assert found == sorted(self.known, key=lambda name: name.encode())
        assert page["statistics"].get("documents", 0) == len(self.known)


def test_documents_against_a_dict(own: Server) -> None:
    machine = type("Machine", (AgainstADict,), {"server": own})
    check = settings(
        max_examples=1000 if CAMPAIGN else 5,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    test = machine.TestCase  # type: ignore[attr-defined]
    test.settings = check
    test("runTest").runTest()


def test_import(own: Server) -> None:
    lines = [f'{{"id": "i{n}", "text": "imported amber {n}"}}' for n in range(300)]
    lines[5] = "not json"
    lines[6] = '{"id": "i6", "text": ""}'
    with own.client("write") as client:
        answer = client.post("/v1/documents/import", content="\n".join(lines).encode())
        assert answer.status_code == 202
        job = answer.json()
        deadline = time.monotonic() + 20
        while job["state"] == "running":
            assert time.monotonic() < deadline
            time.sleep(0.02)
            job = client.get(f"/v1/jobs/{job['id']}").json()
        assert (job["state"], job["done"], job["added"], job["failed"]) == ("done", 300, 298, 2)
        assert [error["reason"] for error in job["errors"]]
        assert not any("/" in error["source"] for error in job["errors"])
        assert client.get("/v1/documents/i7").json()["text"] == "imported amber 7"
        assert client.get("/v1/jobs/99").status_code == 404
        assert client.get("/v1/jobs/x").status_code == 404
        assert client.post("/v1/documents/import", content=b"").status_code == 400
    left = [path.name for path in own.service.library.folder.iterdir()]  # type: ignore[union-attr]
    assert not [name for name in left if name.startswith("tmp")]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": 1}, "text"),
        ({"text": "a", "path": "/etc/passwd"}, "path"),
        ({"text": "a", "url": "http://x"}, "url"),
        ({"documents": []}, "documents"),
        ({"documents": [{"text": "a"}, {"text": "a", "x": 1}]}, "documents.1.x"),
        ({"documents": [{"text": "a"}] * 1001}, "documents"),
        ([{"text": "a"}], None),
        ({"text": ""}, "text"),
        ({"text": " \n"}, "text"),
        ({"text": "a\0b"}, "text"),
        ({"documents": [{"text": "a"}, {"text": " "}]}, "documents.1.text"),
        ({"text": "a", "id": ""}, "id"),
        ({"text": "a", "id": " a"}, "id"),
        ({"text": "a", "id": ".."}, "id"),
        ({"text": "a", "id": "a\nb"}, "id"),
        ({"text": "a", "id": "x" * 513}, "id"),
        ({"documents": [{"text": "a"}, {"text": "b", "id": "a\u200bb"}]}, "documents.1.id"),
        ({"text": "a", "title": "x" * 4097}, None),
    ],
)  # fmt: skip
def test_documents_that_are_refused(server: Server, body: Any, param: str | None) -> None:
    with server.client("write") as client:
        answer = client.post("/v1/documents", json=body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param
        assert client.get("/v1/documents").json()["data"] == []


def test_other_refusals(server: Server) -> None:
    with server.client("admin") as client:
        for body in ({}, {"confirm": False}, {"confirm": 1}, {"confirm": "true"}, {"confirm": True, "all": True}):
            assert client.post("/v1/documents/reset", json=body).status_code == 400
        assert client.post("/v1/documents", json={"text": "a" * (9 << 20)}).status_code == 413
        for query in ("limit=0", "limit=-1", "limit=1001", "limit=x", "limit=9999999999", "limit=%D9%A1", "lmit=1"):
            assert client.get(f"/v1/documents?{query}").status_code == 400, query
        for body, param in (
            ({}, "query"), ({"query": ""}, "query"), ({"query": " "}, "query"), ({"query": "a", "k": 0}, "k"), ({"query": "a", "k": 1001}, "k"),
            ({"query": "a", "mode": "x"}, "mode"), ({"query": "a", "weights": [1]}, "weights"), ({"query": "a", "weights": [-1, 1]}, "weights.0"),
            ({"query": "a", "weights": [0, 0]}, "weights"), ({"query": "a" * 70_000}, "query"), ({"query": "a", "namespace": "x"}, "namespace"),
        ):  # fmt: skip
            answer = client.post("/v1/retrieve", json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), body
        for mode in ("lexical", "dense", "hybrid"):
            assert client.post("/v1/retrieve", json={"query": "river", "mode": mode}).status_code == 200


def test_a_full_disk_is_503_with_nothing_half_added(small_run: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path, "6m") as disk, serving_run(small_run, disk) as server, server.client("write") as client:
        assert client.post("/v1/documents", json={"id": "first", "text": "amber"}).status_code == 200
        filler = disk / "filler"
        filler.write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - 100_000))
        many = {"documents": [{"id": f"m{n}", "text": "granite " * 100} for n in range(50)]}
        answer = client.post("/v1/documents", json=many)
        assert answer.status_code == 503, answer.text
        assert answer.json()["error"]["code"] == "no_space"
        assert answer.headers["retry-after"]
        assert [row["id"] for row in client.get("/v1/documents").json()["data"]] == ["first"]
        assert client.post("/v1/retrieve", json={"query": "granite"}).status_code == 200
        answer = client.post("/v1/documents/import", content=b'{"text": "granite"}\n' * 20_000)
        assert answer.status_code == 503, answer.text
        filler.unlink()
        assert client.post("/v1/documents", json=many).status_code == 200
        assert client.get("/v1/documents/m49").status_code == 200


def test_the_audit_log_has_who_and_what_but_no_text(own: Server) -> None:
    with own.client("admin") as client:
        client.post("/v1/documents", json={"id": "kept", "text": "a secret sentence"})
        client.delete("/v1/documents/kept")
        client.post("/v1/documents/reset", json={"confirm": True})
        client.post("/v1/completions", json={"model": "tiny", "prompt": "a secret prompt", "max_tokens": 1})
    log = own.state.accounts.path.with_name("audit.jsonl").read_text()
    for action in ("documents.add", "documents.delete", "documents.reset"):
        assert action in log
    assert '"caller": "admin"' in log
    assert "secret" not in log
    assert "rk_" not in log


def test_many_clients_at_once(own: Server) -> None:
    """8 threads write and read their own: each sees its own writes at once."""
    import concurrent.futures

    def work(number: int) -> None:
        with own.client("write") as client:
            for turn in range(5):
                name = f"w{number}"
                client.post("/v1/documents", json={"id": name, "text": f"turn{number}x{turn} amber"}).raise_for_status()
                hits = client.post("/v1/retrieve", json={"query": f"turn{number}x{turn}", "k": 3}).json()["data"]
                assert hits[0]["document"] == name
                client.delete(f"/v1/documents/{name}").raise_for_status()
                hits = client.post("/v1/retrieve", json={"query": f"turn{number}x{turn}", "k": 50}).json()["data"]
                assert name not in {hit["document"] for hit in hits}

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, number) for number in range(8)]:
            done.result()


def test_a_client_that_stops_in_the_middle_of_an_import_leaves_nothing(own: Server) -> None:
    def body() -> Any:
        yield b'{"id": "half", "text": "amber"}\n'
        raise ConnectionError

    with own.client("write") as client:
        with pytest.raises((ConnectionError, httpx.HTTPError)):
            client.post("/v1/documents/import", content=body())
        time.sleep(0.1)
        assert client.get("/v1/documents").json()["data"] == []


@pytest.mark.parametrize(
    "identifier",
    ["a\u200bb", "\u202egpj.a", "a\u2066b", "\u00ad", "a\ufeff", "\u3164", "\u2800", " ", "\t", "a\nb", "\u115f"],
)  # fmt: skip
def test_ids_that_look_like_others_are_refused(server: Server, identifier: str) -> None:
    with server.client("write") as client:
        for body in ({"id": identifier, "text": "amber"}, {"documents": [{"id": identifier, "text": "amber"}]}):
            answer = client.post("/v1/documents", json=body)
            assert answer.status_code == 400, ascii(identifier)
        for good in ("\u00e9t\u00e9", "e\u0301te\u0301", "\u65e5\u672c", "a b", "\U0001f642"):
            assert client.post("/v1/documents", json={"id": good, "text": "amber"}).status_code == 200
            assert client.delete(f"/v1/documents/{good}").status_code == 200


def test_two_spellings_of_an_id_are_one(own: Server) -> None:
    """A file's name comes decomposed from some systems: imported so, it is replaced, read and deleted in either spelling."""
    composed, decomposed = "caf\u00e9.md", "cafe\u0301.md"
    with own.client("write") as client:
        job = client.post(
            "/v1/documents/import", content=f'{{"id": "{decomposed}", "text": "imported"}}\n'.encode()
        ).json()
        deadline = time.monotonic() + 20
        while client.get(f"/v1/jobs/{job['id']}").json()["state"] != "done" and time.monotonic() < deadline:
            time.sleep(0.02)
        assert client.post("/v1/documents", json={"id": decomposed, "text": "replaced"}).json()["ids"] == [composed]
        assert client.get(at(decomposed)).json()["text"] == "replaced"
        assert client.get(at(composed)).json()["text"] == "replaced"
        assert len(client.get("/v1/documents").json()["data"]) == 1
        assert client.delete(at(decomposed)).status_code == 200
        assert client.get(at(composed)).status_code == 404


def test_what_has_no_id_is_one_document_however_often_it_comes(own: Server) -> None:
    line = b'{"text": "a row without an id"}\nnot json\n'
    with own.client("write") as client:
        for _ in range(2):
            job = client.post("/v1/documents/import", content=line).json()
            while job["state"] == "running":
                job = client.get(f"/v1/jobs/{job['id']}").json()
            assert [error["source"] for error in job["errors"]] == ["line 2"]
            (identifier,) = client.post("/v1/documents", json={"text": "a row without an id"}).json()["ids"]
        assert [entry["id"] for entry in client.get("/v1/documents").json()["data"]] == [identifier]


def test_a_search_without_hits_says_why(own: Server) -> None:
    with own.client("write") as client:
        client.post("/v1/documents", json={"id": "a", "text": "The heron."})
        for query, why in (("to be or not to be", "stop words"), ("qqqq", "none of its words"), ("?!", "no word")):
            answer = client.post("/v1/retrieve", json={"query": query}).json()
            assert answer["data"] == [] and why in answer["note"]
        assert "note" not in client.post("/v1/retrieve", json={"query": "heron"}).json()


def test_what_is_acknowledged_is_read_by_the_next_request_under_load(
    own: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 batches; all the time others ask for what is being added, so that what they were told could be remembered: also
    between the disk and the snapshot, which is made to take a while.
    """
    show = LibraryIndex.show

    def slowly(self: LibraryIndex, *arguments: Any, **named: Any) -> None:
        time.sleep(0.02)
        show(self, *arguments, **named)

    monkeypatch.setattr(LibraryIndex, "show", slowly)
    current, is_over = ["Nobody Nowhere"], threading.Event()
    ask = {"model": "tiny", "max_tokens": 1, "temperature": 0}

    def press(scope: str) -> None:
        with own.client(scope) as client:
            while not is_over.is_set():
                client.post("/v1/completions", json={**ask, "prompt": current[0]})

    with ThreadPoolExecutor(2) as pool, own.client("admin") as client:
        pressing = [pool.submit(press, scope) for scope in ("admin", "write")]
        missed = []
        for batch in range(40):
            name = f"Nafock{batch} Wuhack{batch}"
            current[0] = name
            rows = [{"id": f"b{batch}-{n}", "text": f"{name} grew up in Gaituchul."} for n in range(2)]
            added = client.post("/v1/documents", json={"documents": rows}).json()
            answer = client.post("/v1/completions", json={**ask, "prompt": name}).json()["retro"]
            found = client.post("/v1/retrieve", json={"query": name, "k": 2}).json()
            read = {hit["document"] for hit in answer["neighbors"]}
            seen = {hit["document"] for hit in found["data"]}
            kept = client.get(f"/v1/documents/b{batch}-1").json()
            if not (read and read <= set(added["ids"]) == seen and kept["text"] == rows[1]["text"]):
                missed.append((batch, read, seen))
            assert min(answer["index_version"], found["index_version"]) >= added["index_version"]
        is_over.set()
        for one in pressing:
            one.result(30)
    assert missed == []
