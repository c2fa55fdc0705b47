"""What a server of a plain decoder reads: documents and given neighbors as a RETRO does, or nothing; what cannot apply is named."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from interop_helpers import decoder_folder
from serve_helpers import Server, post, serving

from retro_engine.data.store import Store
from retro_engine.errors import StoreError, UsageError
from retro_engine.generate.generator import Generator
from retro_engine.generate.open_memory import open_beside
from retro_engine.generate.open_model import open_model, read_in_front
from retro_engine.library.library import Library
from retro_engine.memory.ngram_memory import build_ngram_memory
from retro_engine.serve.encode_ahead import EVERY_S
from retro_engine.serve.service import ServiceOptions, open_service


@pytest.fixture(scope="module")
def decoder(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder_folder(tmp_path_factory.mktemp("plain") / "decoder", small_store.tokenizer)


@pytest.fixture(scope="module")
def reading(decoder: Path, small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With a library in chunks of 16 tokens, in which there is a document."""
    folder = tmp_path_factory.mktemp("reading")
    Library.create(folder / "library", small_store.tokenizer, 16)
    options = ServiceOptions(run=str(decoder), library=str(folder / "library"), name="plain")
    with serving(lambda: open_service(options), folder, has_nemo=True) as server:
        with server.client() as client:
            added = client.post("/v1/documents", json={"id": "note", "text": "The quarry by the river is deep."})
            assert added.status_code < 300
        yield server


def complete(server: Server, **retro: Any) -> dict[str, Any]:
    body = {"model": "plain", "prompt": "the quarry by the river", "max_tokens": 4, "temperature": 0, "logprobs": 0}
    answer = post(server, "/v1/completions", **body, retro=retro)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_documents_are_read_as_by_a_retro(reading: Server, decoder: Path, small_store: Store) -> None:
    out = complete(reading)
    assert [hit["document"] for hit in out["retro"]["neighbors"]] == ["note"]
    assert out["usage"]["neighbor_tokens"] > 0
    off = complete(reading, neighbors=[])
    assert off["usage"]["neighbor_tokens"] == 0
    assert off["choices"][0]["logprobs"] != out["choices"][0]["logprobs"]
    opened = open_model(decoder)
    alone = Generator(opened.model, small_store.tokenizer).generate("the quarry by the river", 4)
    assert off["choices"][0]["text"] == alone.text, "with nothing to read it is the plain decoder"
    read_in_front(opened.model, small_store.tokenizer, 16)
    given = complete(reading, neighbors=["amber stone"])
    exact = Generator(opened.model, small_store.tokenizer).generate("the quarry by the river", 4, neighbors=["amber stone"])  # fmt: skip
    assert given["choices"][0]["text"] == exact.text
    assert given["usage"]["neighbor_tokens"] == len(small_store.tokenizer.encode("amber stone"))
    assert complete(reading, k=1)["retro"]["neighbors"]


def test_every_route_reads(reading: Server) -> None:
    explained = post(reading, "/v1/explain", prompt="the quarry by the river", text=" is deep").json()
    assert [row["document"] for row in explained["neighbors"]] == ["note"]
    assert explained["logprob"] != pytest.approx(explained["logprob_without"], abs=1e-3)
    found = post(reading, "/v1/retrieve", query="quarry", k=1).json()
    assert found["data"][0]["document"] == "note"
    chat = {"model": "plain", "messages": [{"role": "user", "content": "the quarry by the river"}], "max_tokens": 2}
    assert post(reading, "/v1/chat/completions", **chat).json()["retro"]["neighbors"]
    with httpx.Client(base_url=reading.url, trust_env=False) as client:
        headers = {"authorization": f"Bearer {reading.keys['read']}"}
        nemo = {"sentences": ["the quarry by the river"], "tokens_to_generate": 2, "neighbors": 1}
        answer = client.put("/generate", json=nemo, headers=headers)
        assert answer.status_code == 200, answer.text
        assert "quarry" in str(answer.json())


def test_what_is_kept_is_counted(reading: Server) -> None:
    def counts() -> dict[str, float]:
        with reading.client("admin") as client:
            lines = client.get("/metrics").text.splitlines()
        return {name: float(value) for name, _, value in (line.partition(" ") for line in lines) if "neighbor" in name}

    complete(reading)
    before, earlier = counts(), {}
    while before != earlier:  # what came to the library is encoded in the background
        time.sleep(2 * EVERY_S)
        before, earlier = counts(), before
    complete(reading)
    after = counts()
    assert after["retro_neighbor_bytes"] > 0
    assert after["retro_neighbors_encoded"] == before["retro_neighbors_encoded"] > 0
    assert after["retro_neighbors_kept"] >= before["retro_neighbors_kept"]


def test_without_documents_it_reads_what_it_is_given(decoder: Path, tmp_path: Path) -> None:
    options = ServiceOptions(run=str(decoder), name="plain", neighbor_bytes=0)
    with serving(lambda: open_service(options), tmp_path) as server:
        assert not (decoder / "library").exists()
        assert complete(server)["usage"]["neighbor_tokens"] == 0
        assert complete(server, neighbors=["amber stone"])["usage"]["neighbor_tokens"] > 0
        assert server.service.engine.stats()["neighbor_bytes"] == 0
        for retro, code in (({"k": 2}, "no_library"), ({"mode": "lexical"}, "no_library")):
            answer = post(server, "/v1/completions", model="plain", prompt="x", retro=retro)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
        answer = post(server, "/v1/explain", prompt="river", text=" stone")
        assert answer.status_code == 400


def test_a_memory_beside_the_model(decoder: Path, small_store: Store, tmp_path: Path) -> None:
    """Its tokens are those of the generator beside it; the server says that there is one, and counts what it is asked."""
    memory = build_ngram_memory(small_store, tmp_path / "ngram")
    options = ServiceOptions(run=str(decoder), name="plain", memory=str(memory.folder), memory_weights="0.5")
    opened = open_model(decoder)
    beside = open_beside(str(memory.folder), "0.5", decoder, small_store.tokenizer)
    alone = Generator(opened.model, small_store.tokenizer, beside=beside).generate("the quarry by the river", 4)
    with serving(lambda: open_service(options), tmp_path) as server:
        assert complete(server)["choices"][0]["text"] == alone.text
        with server.client("admin") as client:
            about = client.get("/v1/models").json()["data"][0]["retro"]["memory"]
            counted = client.get("/metrics").text
        answer = post(server, "/v1/explain", prompt="river", text=" stone", neighbors=["tide"])
    assert alone.text != Generator(opened.model, small_store.tokenizer).generate("the quarry by the river", 4).text
    assert about == beside.summary() and about["tokens"] == memory.num_tokens
    assert f"retro_memory_tokens {float(memory.num_tokens)}" in counted
    asked = next(line for line in counted.splitlines() if line.startswith("retro_memory_lookups_total{"))
    assert float(asked.split()[-1]) >= 4
    assert answer.status_code == 400 and "cannot be told" in answer.json()["error"]["message"]
    for message, wrong in (
        ("has no weights", ServiceOptions(run=str(decoder), memory=str(memory.folder))),
        ("is of a memory", ServiceOptions(run=str(decoder), memory_weights="0.5")),
        ("from 0 to 1", ServiceOptions(run=str(decoder), memory=str(memory.folder), memory_weights="-0.1")),
        ("while decoding", ServiceOptions(run=str(decoder), memory="knn", memory_weights="0.5")),
    ):
        with pytest.raises(UsageError, match=message):
            open_service(wrong)


def test_what_cannot_apply_is_refused(decoder: Path, small_run: Path, small_store: Store, tmp_path: Path) -> None:
    run, library = str(decoder), str(tmp_path / "library")
    for message, options in (
        ("--library with --reading none", ServiceOptions(run=run, library=library, reading="none")),
        ("--stores with --reading none", ServiceOptions(run=run, stores=[str(small_store.folder)], reading="none")),
        ("this model reads no neighbors", ServiceOptions(run=run, reading="none", neighbor_bytes=1 << 20)),
        ("one neighbor of 128 tokens", ServiceOptions(run=run, neighbor_bytes=1000)),
        ("which cannot be changed", ServiceOptions(run=str(small_run), reading="prefix")),
        ("depend on the chunk", ServiceOptions(run=str(small_run), library=library, stores=[], neighbor_bytes=1 << 20)),
    ):
        with pytest.raises(UsageError, match=message):
            open_service(options)
    few = decoder_folder(tmp_path / "few", small_store.tokenizer, position_embedding="learned", encoder_seq_length=64)
    with pytest.raises(UsageError, match="64 positions"):
        open_service(ServiceOptions(run=str(few), reading="prefix"))
    service = open_service(ServiceOptions(run=str(few)))  # nothing to read: the decoder that it was
    assert not service.generator.model.config.retrieval
    service.close()
    Library.create(tmp_path / "chunks of 8", small_store.tokenizer, 8)
    both = ServiceOptions(run=run, library=str(tmp_path / "chunks of 8"), stores=[str(small_store.folder)])
    with pytest.raises(StoreError, match="chunk_size"):
        open_service(both)


def test_a_model_has_other_names(decoder: Path, tmp_path: Path) -> None:
    options = ServiceOptions(run=str(decoder), name="plain", aliases=["gpt-4", "org/model:1", "plain"], reading="none")
    with serving(lambda: open_service(options), tmp_path) as server:
        with server.client("read") as client:
            listed = client.get("/v1/models").json()["data"]
            assert [(one["id"], one["root"]) for one in listed] == [
                (n, "plain") for n in ("plain", "gpt-4", "org/model:1")
            ]
            assert client.get("/v1/models/org/model:1").json()["id"] == "org/model:1"
            assert client.get("/v1/models/gpt-5").status_code == 404
        for name in ("plain", "gpt-4", "org/model:1"):
            answer = post(server, "/v1/completions", model=name, prompt="a", max_tokens=1)
            assert (answer.status_code, answer.json()["model"]) == (200, "plain"), answer.text
        assert post(server, "/v1/completions", model="GPT-4", prompt="a", max_tokens=1).status_code == 404
