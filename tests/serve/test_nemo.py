"""NeMo's bodies and answers."""

from pathlib import Path
from typing import Any

import pytest
from serve_helpers import Server, serving_run


def put(server: Server, path: str, scope: str = "read", **body: Any) -> Any:
    with server.client(scope) as client:
        return client.put(path, json=body)


def test_generate(server: Server) -> None:
    body = {
        "sentences": ["Document doc7. river", "amber"], "tokens_to_generate": 8, "temperature": 1.0, "add_BOS": False, "top_k": 0,
        "top_p": 0.9, "greedy": True, "all_probs": False, "repetition_penalty": 1.2, "min_tokens_to_generate": 2,
        "end_strings": ["<|endoftext|>"], "neighbors": 2, "compute_logprob": True,
    }  # fmt: skip
    answer = put(server, "/generate", **body)
    assert answer.status_code == 200, answer.text
    out = answer.json()
    assert set(out) == {"sentences", "tokens", "logprob", "token_ids", "offsets", "retrieved"}
    for number, sentence in enumerate(body["sentences"]):
        assert out["sentences"][number].startswith(sentence)
        assert len(out["tokens"][number]) == len(out["token_ids"][number]) == len(out["offsets"][number])
        assert "".join(out["tokens"][number]).startswith(sentence)
        assert 2 <= len(out["logprob"][number]) <= 8
    assert put(server, "/generate", **{**body, "compute_logprob": False}).json()["logprob"] is None
    off = put(server, "/generate", **{**body, "neighbors": 0}).json()
    assert off["retrieved"] == [[], []]
    full = put(server, "/generate", **{**body, "all_probs": True}).json()
    for row, value in zip(full["full_logprob"][0], full["logprob"][0]):
        assert value in row
        assert sum(2.718281828**one for one in row if one is not None) == pytest.approx(1, abs=1e-3)
    for wrong in ({"sentences": []}, {"sentences": [""]}, {"all_probs": True, "tokens_to_generate": 2000, "sentences": ["a"] * 128}, {"tokens_to_generate": 0}, {"top_p": 2}, {"neighbors": -1}, {"x": 1}, {"task_ids": [1]}, {"sentences": ["a"] * 129}):  # fmt: skip
        assert put(server, "/generate", **{**body, **wrong}).status_code == 400, wrong


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"neighbors": 64}, "neighbors"), ({"tokens_to_generate": 2047}, "tokens_to_generate"), ({"sentences": ["word " * 2100]}, "sentences")],
)  # fmt: skip
def test_what_has_no_room_names_its_field(server: Server, fields: dict[str, Any], param: str) -> None:
    answer = put(server, "/generate", **{"sentences": ["amber river"], "tokens_to_generate": 2, **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_knn_adds_finds_and_resets(small_run: Path, tmp_path: Path) -> None:
    with serving_run(small_run, tmp_path, has_nemo=True) as server:
        text = "Nafock Wuhack grew up in Gaituchul"
        assert put(server, "/knn", sentences=[text]).status_code == 403
        assert put(server, "/knn", "write", sentences=[text], add_eos=True).json() == "success"
        tokenizer, width = server.service.tokenizer, 2 * server.service.generator.model.config.chunk_size
        rows = put(server, "/knn", sentences=["Nafock Wuhack", "river"], neighbors=2).json()
        assert [len(row) for row in rows] == [2, 2]
        assert {len(ids) for row in rows for ids in row} == {width}
        assert tokenizer.decode(rows[0][0]).startswith("Nafock Wuhack grew")
        single = put(server, "/knn", sentences="Nafock Wuhack", neighbors=2).json()
        assert single == rows[0]
        by_ids = put(server, "/knn", sentences=[tokenizer.encode("Nafock Wuhack")], neighbors=2).json()
        assert by_ids[0] == rows[0]
        assert put(server, "/knn", sentences=["x"], neighbors=0).json() == [[[tokenizer.pad_id] * width]]
        assert put(server, "/knn", "write", reset=None).status_code == 403
        for more in ({"sentences": ["x"], "neighbors": 1, "reset": None}, {"reset": False}, {"reset": 1}, {"neighbors": 1, "reset": True}):  # fmt: skip
            answer = put(server, "/knn", "admin", **more)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "reset"), more
        assert put(server, "/knn", sentences="Nafock Wuhack", neighbors=2).json() == rows[0]
        assert put(server, "/knn", "admin", reset=None).json() == "success"
        assert put(server, "/knn", sentences=["Nafock"], neighbors=1).json() != rows[:1]
        for wrong in ({}, {"sentences": []}, {"sentences": [[-1]], "neighbors": 1}, {"sentences": ["a"], "neighbors": -1}, {"sentences": [1]}, {"query": "gASVAAAA"}):  # fmt: skip
            assert put(server, "/knn", "admin", **wrong).status_code == 400, wrong


def test_they_are_absent_unless_asked_for(small_run: Path, tmp_path: Path) -> None:
    with serving_run(small_run, tmp_path) as server:
        for path in ("/generate", "/knn"):
            assert put(server, path, "admin").status_code == 404


@pytest.mark.parametrize("greedy", [True, False])
def test_seeds(server: Server, greedy: bool) -> None:
    body = {
        "sentences": ["river"],
        "tokens_to_generate": 12,
        "greedy": greedy,
        "random_seed": 3,
        "temperature": 2.0,
        "top_p": 0.0,
    }
    first, second = (put(server, "/generate", **body).json()["sentences"] for _ in range(2))
    assert first == second
