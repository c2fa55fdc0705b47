"""Documents in the order of what they have to do with a query."""

from typing import Any

import numpy as np
import pytest
from serve_helpers import Server, post

from retro_engine.retrieval.analyzer import Analyzer
from retro_engine.serve.rerank import bm25_scores
from retro_engine.serve.service import Service

TEXTS = ["the tide is low", "granite, granite and amber", "an amber lantern of granite by the river bank", "", "amber"]


def test_scores_are_bm25s() -> None:
    found = bm25_scores(Analyzer(), "amber granite?", TEXTS)
    lengths = np.array([Analyzer().terms([text]).lengths[0] for text in TEXTS])
    expected = []
    for text, length in zip(TEXTS, lengths):
        total = 0.0
        for word, frequency in (("amber", 3), ("granite", 2)):
            weight = np.log(1 + (len(TEXTS) - frequency + 0.5) / (frequency + 0.5))
            tf = text.replace(",", "").split().count(word)
            total += weight * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * length / lengths.mean()))
        expected.append(total)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert bm25_scores(Analyzer(), "of the", ["of the", "a"]).tolist() == [0, 0], "only stop words"
    assert bm25_scores(Analyzer(), "x", [""]).tolist() == [0]


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
def test_the_best_come_first(server: Server, path: str) -> None:
    out = post(server, path, model="tiny", query="amber granite", documents=[*TEXTS[:3], {"text": TEXTS[4]}]).json()
    order = [row["index"] for row in out["results"]]
    assert order[0] in (1, 2) and order[-1] == 0
    scores = [row["relevance_score"] for row in out["results"]]
    assert scores == sorted(scores, reverse=True) and scores[-1] == 0
    assert out["results"][0]["document"] == {"text": TEXTS[order[0]]}
    assert (out["model"], out["retro"]["scorer"]) == ("tiny", "bm25")
    assert out["usage"]["total_tokens"] > 10
    two = post(server, path, query="amber granite", documents=TEXTS, top_n=2, return_documents=False).json()
    assert len(two["results"]) == 2 and "document" not in two["results"][0]


def test_by_an_embedder_where_there_is_one(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lengths:
        name = "lengths"

        def encode(self, texts: list[str]) -> np.ndarray:
            return np.array([[np.cos(len(text)), np.sin(len(text))] for text in texts], np.float32)

    monkeypatch.setattr(Service, "embedder", property(lambda self: Lengths()))
    out = post(server, "/v1/rerank", model="lengths", query="abc", documents=["a", "abc", "ab"]).json()
    assert [row["index"] for row in out["results"]] == [1, 2, 0]
    assert out["results"][0]["relevance_score"] == pytest.approx(1, abs=1e-6)
    assert (out["model"], out["retro"]["scorer"]) == ("lengths", "lengths")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"query": ""}, "query"), ({"query": "  "}, "query"), ({"documents": []}, "documents"), ({"documents": ["a"] * 1001}, "documents"),
        ({"documents": [1]}, "documents.0"), ({"documents": [{"title": "a"}]}, "documents.0"), ({"top_n": 0}, "top_n"),
        ({"documents": "a"}, "documents"), ({"max_chunks": 1}, "max_chunks"),
    ],
)  # fmt: skip
def test_what_is_refused(server: Server, body: dict[str, Any], param: str) -> None:
    answer = post(server, "/v1/rerank", **{"query": "a", "documents": ["a"], **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param)
    assert post(server, "/v1/rerank", model="other", query="a", documents=["a"]).status_code == 404
