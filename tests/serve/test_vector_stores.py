"""Files and vector stores by OpenAI's own client; and stores that are deleted while they are searched."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
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
        ("a.html", b"<title>only a title</title>", "has no text"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused_whatever_its_name(shelves: Server, name: str, raw: bytes, why: str) -> None:
    with shelves.client("write") as client:
        answer = client.post("/v1/files", files={"file": (name, raw)}, data={"purpose": "assistants"})
    assert answer.status_code == 400, answer.text
    assert why in answer.json()["error"]["message"]


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
        ("/v1/vector_stores/default/search", {"query": "a", "filters": {"type": "eq", "key": "a", "value": 1}}, 400),
        ("/v1/vector_stores/default/search", {"query": []}, 400), ("/v1/vector_stores/vs_no/search", {"query": "a"}, 404),
        ("/v1/vector_stores/default/files", {"file_id": "file-no"}, 404), ("/v1/vector_stores/files/search", {"query": "a"}, 404),
        ("/v1/vector_stores/vector-stores/files", {"file_id": "a"}, 404), ("/v1/vector_stores/default/files", {"file_id": "a", "attributes": {"a": 1}}, 400),
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
