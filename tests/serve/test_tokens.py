"""Embeddings and tokens."""

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from serve_helpers import Server, post, with_letters


@pytest.fixture
def letters() -> Iterator[None]:
    with with_letters():
        yield


def test_without_an_embedder_the_reason_is_said(server: Server) -> None:
    answer = post(server, "/v1/embeddings", model="tiny", input="amber lantern")
    assert (answer.status_code, answer.json()["error"]["code"]) == (501, "no_embedder")
    assert "hashed words" in answer.json()["error"]["message"]
    assert post(server, "/v1/embeddings", model="letters-small", input="a").status_code == 404


@pytest.mark.usefixtures("letters")
def test_embeddings_by_the_official_client(server: Server) -> None:
    client = server.openai("read")
    out = client.embeddings.create(model="tiny", input=["amber lantern", "amber lantern", "granite tide"])
    vectors = np.array([row.embedding for row in out.data])
    assert [row.index for row in out.data] == [0, 1, 2]
    assert out.model == "letters-small"
    assert client.embeddings.create(model="letters-small", input="a").model == "letters-small"
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert vectors[0] @ vectors[2] < 0.99
    assert out.usage.prompt_tokens == sum(len(server.service.tokenizer.encode(t)) for t in ("amber lantern", "amber lantern", "granite tide"))  # fmt: skip
    floats = client.embeddings.create(model="tiny", input="amber lantern", encoding_format="float")
    np.testing.assert_allclose(floats.data[0].embedding, vectors[0], atol=1e-6)
    ids = server.service.tokenizer.encode("amber lantern")
    by_ids = client.embeddings.create(model="tiny", input=ids)
    np.testing.assert_allclose(by_ids.data[0].embedding, vectors[0], atol=1e-6)
    raw = post(server, "/v1/embeddings", model="tiny", input="amber lantern").json()["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(raw), "<f4"), vectors[0].astype("<f4"))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"), ({"input": ""}, "input"), ({"input": ["a", ""]}, "input"), ({"input": ["a"] * 257}, "input"),
        ({"input": [1 << 30]}, "input"), ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "dimensions": 7}, "dimensions"), ({"input": {"a": 1}}, "input"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("letters")
def test_embeddings_that_are_refused(server: Server, body: dict[str, Any], param: str) -> None:
    answer = post(server, "/v1/embeddings", model="tiny", **body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_tokens_there_and_back(server: Server) -> None:
    for text in ("Document doc7.", "wörter 日本 🙂", "", "<|endoftext|>"):
        tokens = post(server, "/tokenize", prompt=text).json()
        assert tokens["count"] == len(tokens["tokens"])
        assert post(server, "/detokenize", tokens=tokens["tokens"]).json() == {"prompt": text}
    for tokens in ([-1], [1 << 20], [10**30], ["a"], [True], [1.5], "ab"):
        assert post(server, "/detokenize", tokens=tokens).status_code == 400, tokens
    assert post(server, "/tokenize", prompt=7).status_code == 400
    assert post(server, "/tokenize", prompt="a", model="other").status_code == 404
