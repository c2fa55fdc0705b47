"""What each neighbor was worth, over HTTP."""

from serve_helpers import Server, post


def test_explain(server: Server) -> None:
    body = {"prompt": "Document doc7. river", "text": " stone amber", "neighbors": ["river stone amber", "winter"]}
    out = post(server, "/v1/explain", **body).json()
    assert out["tokens"] == len(out["text_tokens"]) == len(server.service.tokenizer.encode(" stone amber"))
    assert [row["text"] for row in out["neighbors"]] == body["neighbors"]
    assert out["logprob"] < 0
    retrieved = post(server, "/v1/explain", prompt="Document doc7. river", text=" stone", k=2).json()
    assert len(retrieved["neighbors"]) == 2
    assert {"document", "score", "removed"} <= set(retrieved["neighbors"][0])
    for wrong, param, said in (
        ({"text": ""}, "text", "the text is empty"), ({"prompt": ""}, "prompt", "the prompt is empty"), ({"k": 2}, "k", "k says nothing"),
    ):  # fmt: skip
        answer = post(server, "/v1/explain", **{**body, **wrong})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == param
        assert said in error["message"]
    for wrong in ({"prompt": ""}, {"text": ""}, {"neighbors": []}, {"k": 0}, {"text": "a " * 5000}, {"x": 1}):
        assert post(server, "/v1/explain", **{**body, **wrong}).status_code == 400, wrong
