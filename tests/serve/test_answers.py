"""Generation, searches, explanations and NeMo's route show the same neighbors, under the same names and numbers."""

from pathlib import Path
from typing import Any

from serve_helpers import serving_run

FIELDS = {"document", "title", "chunk", "score", "text", "continuation", "source"}
PROMPT, K = "quarry by the river", 4


def test_every_route_shows_what_generation_reads(small_run: Path, tmp_path: Path) -> None:
    """Chunks side by side in one document: of two that share what is read the better alone, on every path."""
    with serving_run(small_run, tmp_path, has_nemo=True) as server, server.client() as client:
        text = "the quarry by the river is deep and the river runs by it " * 6
        body: dict[str, Any] = {
            "documents": [{"id": name, "title": name.upper(), "text": f"{name} {text}"} for name in "ab"]
        }
        assert client.post("/v1/documents", json=body).status_code == 200
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "retro": {"k": K}}
        read = client.post("/v1/completions", json=body).json()["retro"]["neighbors"]
        found = client.post("/v1/retrieve", json={"query": PROMPT, "k": K}).json()["data"]
        explained = client.post("/v1/explain", json={"prompt": PROMPT, "text": " is deep", "k": K}).json()["neighbors"]
        assert len(read) == K
        assert {hit["source"] for hit in read} == {"library"}, "its documents have the words of the prompt"
        assert all(set(hit) == FIELDS for hit in read)
        assert found == read
        assert [{name: row[name] for name in FIELDS} for row in explained] == read
        many = client.post("/v1/retrieve", json={"query": PROMPT, "k": 50}).json()["data"]
        for name in "ab":
            chunks = sorted(hit["chunk"] for hit in many if (hit["source"], hit["document"]) == ("library", name))
            assert len(chunks) > 1
            assert all(after - before >= 2 for before, after in zip(chunks, chunks[1:])), "no two share what is read"
        tokenizer, width = server.service.tokenizer, 2 * server.service.generator.model.config.chunk_size
        rows = client.put("/knn", json={"sentences": PROMPT, "neighbors": K}).json()
        texts = [tokenizer.decode([i for i in row if i != tokenizer.pad_id]) for row in rows]
        assert texts == [hit["text"] + hit["continuation"] for hit in read]
        assert {len(row) for row in rows} == {width}
        nemo = client.put("/generate", json={"sentences": [PROMPT], "tokens_to_generate": 1, "neighbors": K}).json()
        assert nemo["retrieved"][0] == texts
