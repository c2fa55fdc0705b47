"""Files and vector stores by OpenAI's own client; and stores that are deleted while they are searched."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from document_helpers import docx_bytes, pdf_bytes
from serve_helpers import Server, post, serving_run

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def shelves(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving_run(small_run, tmp_path_factory.mktemp("stores")) as server:
        yield server


def made(server: Server, **texts: str) -> tuple[Any, Any, dict[str, str]]:
    """A client, a store with a file of each text, and the files' ids."""
    client = server.openai("write", max_retries=0)
    files = {
        name: client.files.create(file=(f"{name}.txt", text.encode()), purpose="assistants").id
        for name, text in texts.items()
    }
    return client, client.vector_stores.create(name="shelf", file_ids=list(files.values()), metadata={"a": "b"}), files


def test_files_are_searched_once_they_are_in_a_store(shelves: Server) -> None:
    client, store, files = made(shelves, harbor="The harbor was dredged in 1902.", mill="The mill burned down.")
    assert (store.name, store.file_counts.completed, store.metadata, store.status) == (
        "shelf",
        2,
        {"a": "b"},
        "completed",
    )
    found = client.vector_stores.search(store.id, query="When was the harbor dredged?").data
    assert {(one.file_id, one.filename) for one in found} == {(files["harbor"], "harbor.txt")}
    assert "harbor" in found[0].content[0].text
    assert found[0].content[0].text in "The harbor was dredged in 1902."
    assert found[0].score > 0
    both = client.vector_stores.search(store.id, query=["harbor", "mill"], max_num_results=5).data
    assert {one.filename for one in both} == {"harbor.txt", "mill.txt"}
    late = client.files.create(file=("tide.txt", b"The tide turned at noon."), purpose="user_data")
    assert client.vector_stores.search(store.id, query="tide").data == []
    assert client.vector_stores.files.create(store.id, file_id=late.id).status == "completed"
    assert {one.file_id for one in client.vector_stores.search(store.id, query="tide").data} == {late.id}
    assert {one.id for one in client.vector_stores.files.list(store.id)} == {*files.values(), late.id}
    assert client.vector_stores.files.retrieve(late.id, vector_store_id=store.id).usage_bytes == 24
    client.vector_stores.files.delete(late.id, vector_store_id=store.id)
    assert client.vector_stores.search(store.id, query="tide").data == []
    assert client.files.retrieve(late.id).filename == "tide.txt"
    assert client.files.content(late.id).text == "The tide turned at noon."
    other = client.vector_stores.create(name="empty")
    assert client.vector_stores.search(other.id, query="harbor").data == []
    assert store.id in {one.id for one in client.vector_stores.list()}
    assert client.vector_stores.delete(store.id).deleted
    for call in (client.vector_stores.retrieve, client.vector_stores.delete):
        with pytest.raises(openai.NotFoundError):
            call(store.id)
    with pytest.raises(openai.NotFoundError):
        client.vector_stores.search(store.id, query="harbor")
    assert client.files.delete(files["mill"]).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(files["mill"])


def test_stores_are_apart_from_what_generation_reads(shelves: Server) -> None:
    client, store, files = made(shelves, secret="The zyzzyva sleeps in the granary.")
    assert post(shelves, "/v1/retrieve", query="zyzzyva", k=3).json()["data"] == []
    client.vector_stores.files.create("default", file_id=files["secret"])
    hit = post(shelves, "/v1/retrieve", query="zyzzyva", k=1).json()["data"][0]
    assert (hit["document"], hit["title"], hit["source"]) == (files["secret"], "secret.txt", "library")
    assert {one.file_id for one in client.vector_stores.search("default", query="zyzzyva").data} == {files["secret"]}
    with pytest.raises(openai.BadRequestError, match="the library itself"):
        client.vector_stores.delete("default")
    assert store.file_counts.total == 1


def test_pages(shelves: Server) -> None:
    client = shelves.openai("write", max_retries=0)
    names = {client.files.create(file=(f"p{n}.txt", f"page {n}".encode()), purpose="assistants").id for n in range(5)}
    assert names <= {one.id for one in client.files.list(limit=2)}


@pytest.mark.parametrize(
    ("name", "raw", "why"),
    [
        ("a.txt", b"%PDF-1.7 ...", "is a PDF"), ("a.txt", b"PK\x03\x04...", "ZIP"), ("a.md", b"\xff\xfe\x00", "not text in UTF-8"),
        ("a.txt", b"", "has no text"), ("a.txt", b" \n", "has no text"), ("a.txt", b"a\0b", "NUL"),
        ("a.html", b"<title>only a title</title>", "has no text"), ("a.pdf", b"A text.", "is not a PDF, which its name says"),
        ("a.PDF", b"PK\x03\x04...", "is not a PDF"), ("a.docx", b"%PDF-1.7 ...", "is not a Word file"), ("a.docx", b"PK\x03\x04...", "damaged"),
        ("a.pdf", b"%PDF-1.7 ...", "cannot be read"), ("a.docx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "save it as .docx"),
        ("scan.pdf", pdf_bytes([[], []]), "a scan"), ("a.pdf.txt", pdf_bytes([["x"]]), "is a PDF"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused_whatever_its_name(shelves: Server, name: str, raw: bytes, why: str) -> None:
    with shelves.client("write") as client:
        answers = [
            client.post("/v1/files", files={"file": (name, raw)}, data={"purpose": "assistants"}),
            client.post("/v1/documents", files={"file": (name, raw)}),
        ]
    for answer in answers:
        assert answer.status_code == 400, answer.text
        assert why in answer.json()["error"]["message"]
        assert answer.json()["error"]["code"] == "unsupported_file"


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("Deep.PDF", pdf_bytes([["The ocean is deep."]], "Seas")),
        ("dry.docx", docx_bytes(["The ocean is deep."], title="Seas")),
    ],
)
def test_pdf_and_word_files(shelves: Server, name: str, raw: bytes) -> None:
    client, store, _ = made(shelves)
    file = client.files.create(file=(name, raw), purpose="assistants")
    assert client.files.content(file.id).text.strip() == "The ocean is deep."
    client.vector_stores.files.create(store.id, file_id=file.id)
    assert [one.filename for one in client.vector_stores.search(store.id, query="ocean").data] == [name]
    about = {"id": f"sea/{name}", "metadata": '{"year": 2024}'}
    with shelves.client("write") as http:
        added = http.post("/v1/documents", files={"file": (name, raw)}, data=about).json()
        assert added["ids"] == [f"sea/{name}"]
        kept = http.get(f"/v1/documents/sea%2F{name}").json()
        assert (kept["title"], kept["text"].strip(), kept["metadata"]) == ("Seas", "The ocean is deep.", {"year": 2024})
        assert http.post("/v1/documents", files={"file": ("n.txt", b"A text.")}).json()["ids"] == ["n.txt"]
        assert http.get("/v1/documents/n.txt").json()["title"] == "n.txt"


@pytest.mark.parametrize(
    ("data", "param"),
    [({"id": ".."}, "id"), ({"id": "a\nb"}, "id"), ({"metadata": "[]"}, "metadata"), ({"metadata": "{"}, None), ({"metadata": '{"a": [1]}'}, "metadata.a"),
     ({"metadata": '{"": 1}'}, "metadata"), ({"purpose": "assistants"}, "purpose"), ({"id": ["a", "b"]}, "id")],
)  # fmt: skip
def test_forms_of_documents_that_are_refused(shelves: Server, data: dict[str, Any], param: str | None) -> None:
    with shelves.client("write") as client:
        answer = client.post("/v1/documents", files={"file": ("a.txt", b"A text.")}, data=data)
        assert answer.status_code == 400, answer.text
        assert (answer.json()["error"]["param"] or "").startswith(param or "")
    with shelves.client("read") as client:
        assert client.post("/v1/documents", files={"file": ("a.txt", b"A text.")}).status_code == 403


def test_attributes_and_filters(shelves: Server) -> None:
    client, store, files = made(shelves, old="The harbor was dredged.", new="The harbor was dredged again.")
    first = client.vector_stores.files.create(
        store.id, file_id=files["old"], attributes={"year": 1902, "is_open": True}
    )
    assert first.attributes == {"year": 1902, "is_open": True}
    client.vector_stores.files.create(store.id, file_id=files["new"], attributes={"year": 2024})

    def found(**wanted: Any) -> list[str]:
        page = client.vector_stores.search(store.id, query="harbor", **wanted)
        return sorted(one.filename for one in page.data)

    assert found() == ["new.txt", "old.txt"]
    later = {"type": "gt", "key": "year", "value": 1950}
    assert found(filters=later) == ["new.txt"]
    assert found(filters={"type": "and", "filters": [later, {"type": "eq", "key": "is_open", "value": True}]}) == []
    assert client.vector_stores.search(store.id, query="harbor", filters=later).data[0].attributes == {"year": 2024}
    changed = client.vector_stores.files.update(files["old"], vector_store_id=store.id, attributes={"year": 1999})
    assert changed.attributes == {"year": 1999}
    assert found(filters=later) == ["new.txt", "old.txt"]
    assert {one.id: one.attributes["year"] for one in client.vector_stores.files.list(store.id)} == {
        files["old"]: 1999,
        files["new"]: 2024,
    }  # type: ignore[index]
    page = client.vector_stores.search(store.id, query="harbor", filters={"type": "ne", "key": "author", "value": "x"})
    assert page.data == []
    assert page.note == "no document has the field author (fields that documents have: year)"
    out = client.responses.create(
        model="tiny", input="harbor", max_output_tokens=2, include=["file_search_call.results"],
        tools=[{"type": "file_search", "vector_store_ids": [store.id], "filters": {"type": "eq", "key": "year", "value": 2024}}],
    )  # fmt: skip
    assert {one.filename for one in out.output[0].results} == {"new.txt"}


def test_filters_of_retrieve(shelves: Server) -> None:
    with shelves.client("write") as client:
        for name, year in (("a", 2023), ("b", 2024)):
            client.post("/v1/documents", json={"id": name, "text": "A quokka smiles.", "metadata": {"year": year}})

        def asked(**filters: Any) -> Any:
            return client.post("/v1/retrieve", json={"query": "quokka", "filters": filters}).json()

        assert [hit["document"] for hit in asked(type="eq", key="year", value=2024)["data"]] == ["b"]
        assert "note" not in asked(type="gte", key="year", value=2023)
        either = asked(
            type="or", filters=[{"type": "eq", "key": "yaer", "value": 1}, {"type": "eq", "key": "year", "value": 2023}]
        )
        assert [hit["document"] for hit in either["data"]] == ["a"]
        assert either["note"].startswith("no document has the field yaer (fields that documents have: ")
        assert asked(type="eq", key="yaer", value=1)["note"].startswith("no hit: no document has the field yaer")
        assert asked(type="eq", key="year", value=1)["note"] == "no hit: no document matches the filter"
        listed = client.get("/v1/documents", params={"limit": 1}).json()["data"][0]
        assert listed["metadata"] == {"year": 2023}
        for filters in ({}, {"type": "like", "key": "a", "value": 1}, {"type": "eq", "key": "year"}):
            answer = client.post("/v1/retrieve", json={"query": "a", "filters": filters})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "filters"), filters
        for about in ({"a": None}, {"a": {}}, {"a": "x" * 513}, {"": 1}, [], {str(n): n for n in range(17)}):
            answer = client.post("/v1/documents", json={"text": "a", "metadata": about})
            assert (answer.status_code, answer.json()["error"]["param"].split(".")[0]) == (400, "metadata"), about


def test_what_scores_too_little_is_not_read(shelves: Server) -> None:
    """A least score is of the scores that are shown; of rankings that are joined there are none."""
    with shelves.client("write") as client:
        for name, text in (("e", "A dugong grazes."), ("f", "A dugong sleeps.")):
            client.post("/v1/documents", json={"id": name, "text": text})
        hits = client.post("/v1/retrieve", json={"query": "dugong grazes", "k": 2}).json()["data"]
        between = (hits[0]["score"] + hits[1]["score"]) / 2
        best = client.post("/v1/retrieve", json={"query": "dugong grazes", "k": 2, "min_score": between}).json()["data"]
        assert best == hits[:1] and hits[0]["score"] > hits[1]["score"]
        none = client.post("/v1/retrieve", json={"query": "dugong grazes", "min_score": 99}).json()
        assert (none["data"], none["note"]) == ([], f"no hit: the best score is {hits[0]['score']:.3f}")
        ask = {"prompt": "dugong grazes", "max_tokens": 1, "temperature": 0}
        for least, count in ((0, 2), (between, 1), (99, 0)):
            out = client.post("/v1/completions", json={**ask, "retro": {"k": 2, "min_score": least}}).json()
            assert [one["document"] for one in out["retro"]["neighbors"]] == [
                one["document"] for one in hits[:count]
            ], out
        for path, body, param in (
            ("/v1/retrieve", {"query": "dugong", "mode": "hybrid", "min_score": 1}, "min_score"),
            ("/v1/completions", {**ask, "retro": {"mode": "hybrid", "min_score": 1}}, "retro.min_score"),
            ("/v1/completions", {**ask, "retro": {"neighbors": ["a"], "min_score": 1}}, "retro.neighbors"),
        ):  # fmt: skip
            answer = client.post(path, json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_filters_of_generation(shelves: Server) -> None:
    """Completions, chats and explanations read what matches, and no store; an earlier search without is not taken for it."""
    later = {"filters": {"type": "eq", "key": "year", "value": 2031}}
    with shelves.client("write") as client:
        for name, year in (("c", 2030), ("d", 2031)):
            client.post("/v1/documents", json={"id": name, "text": "A numbat digs.", "metadata": {"year": year}})

        def read(path: str, **body: Any) -> tuple[set[str], list[str]]:
            answer = client.post(path, json={"max_tokens": 1, "temperature": 0, **body})
            assert answer.status_code == 200, answer.text
            retro = answer.json()["retro"]
            return {hit["document"] for hit in retro["neighbors"]}, retro["notes"]

        assert {"c", "d"} & read("/v1/completions", prompt="numbat digs")[0], "the same text without a filter"
        assert read("/v1/completions", prompt="numbat digs", retro=later) == ({"d"}, [])
        said = [{"role": "user", "content": "numbat digs"}]
        assert read("/v1/chat/completions", messages=said, retro=later) == ({"d"}, [])
        assert read("/v1/messages", model="tiny", messages=said, retro=later) == ({"d"}, [])
        nobody = {"filters": {"type": "eq", "key": "yaer", "value": 1}}
        found, notes = read("/v1/completions", prompt="numbat digs", retro=nobody)
        assert found == set() and [note[:35] for note in notes] == ["no document has the field yaer (fie"]
        explained = client.post("/v1/explain", json={"prompt": "numbat digs", "text": "a", "k": 1, **later})
        assert [one["document"] for one in explained.json()["neighbors"]] == ["d"]
        wrong: list[dict[str, Any]] = [{**later, "neighbors": ["a"]}, {**later, "neighbors": []}, {"filters": {}}]
        for retro in wrong:
            answer = client.post("/v1/completions", json={"prompt": "a", "retro": retro})
            assert (answer.status_code, answer.json()["error"]["param"][:6]) == (400, "retro."), retro
        wrong = [{"neighbors": ["a"], **later}, {"filters": []}]
        for more in wrong:
            assert client.post("/v1/explain", json={"prompt": "a", "text": "b", **more}).status_code == 400


def test_a_page_is_kept_as_its_text(shelves: Server) -> None:
    client = shelves.openai("write")
    file = client.files.create(
        file=("a.HTML", b"<title>T</title><p>amber &amp; granite</p><script>x</script>"), purpose="assistants"
    )
    assert client.files.content(file.id).text.strip() == "amber & granite"


def test_forms_that_are_none(shelves: Server) -> None:
    form = {"content-type": "multipart/form-data; boundary=x"}
    with shelves.client("write") as client:
        for raw, headers in ((b"", form), (b"--x\r\nbroken", form), (b"{}", {"content-type": "multipart/form-data"})):
            assert client.post("/v1/files", content=raw, headers=headers).status_code == 400, raw
        assert client.post("/v1/files", json={}).status_code == 415
        for data in ({}, {"purpose": "batch"}, {"purpose": "assistants", "other": "x"}):
            answer = client.post("/v1/files", files={"file": ("a.txt", b"a")}, data=data)
            assert answer.status_code == 400, data
        answer = client.post("/v1/files", files={"other": ("a.txt", b"a")}, data={"purpose": "assistants"})
        assert answer.status_code == 400
        big = client.post("/v1/files", files={"file": ("a.txt", b"a" * (9 << 20))}, data={"purpose": "assistants"})
        assert big.status_code == 413


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/vector_stores", {"file_ids": ["file-no"]}, 404), ("/v1/vector_stores", {"expires_after": {"days": 1}}, 400),
        ("/v1/vector_stores/default/search", {"query": ""}, 400), ("/v1/vector_stores/default/search", {"query": "a", "max_num_results": 51}, 400),
        ("/v1/vector_stores/default/search", {"query": "a", "filters": {"type": "eq", "key": "a"}}, 400), ("/v1/vector_stores/default/files/no", {"attributes": {}}, 404),
        ("/v1/vector_stores/default/search", {"query": []}, 400), ("/v1/vector_stores/vs_no/search", {"query": "a"}, 404),
        ("/v1/vector_stores/default/files", {"file_id": "file-no"}, 404), ("/v1/vector_stores/files/search", {"query": "a"}, 404),
        ("/v1/vector_stores/vector-stores/files", {"file_id": "a"}, 404), ("/v1/vector_stores/default/files", {"file_id": "a", "attributes": {"a": [1]}}, 400),
    ],
)  # fmt: skip
def test_what_is_refused(shelves: Server, path: str, body: dict[str, Any], status: int) -> None:
    with shelves.client("write") as client:
        answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text


def test_a_store_that_is_deleted_while_it_is_searched(shelves: Server) -> None:
    """Every answer is a whole one, or says that there is no such store."""
    seen: list[int] = []

    def search(store: str) -> None:
        with shelves.client("read") as client:
            for _ in range(40):
                answer = client.post(f"/v1/vector_stores/{store}/search", json={"query": "harbor"})
                seen.append(answer.status_code)
                if answer.status_code == 404:
                    return

    client, store, _ = made(shelves, harbor="The harbor " * 200)
    threads = [threading.Thread(target=search, args=(store.id,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    client.vector_stores.delete(store.id)
    for thread in threads:
        thread.join(60)
    assert set(seen) <= {200, 404}
