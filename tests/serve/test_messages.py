"""Anthropic's Messages: the requests and answers of its client, by their shapes (the client itself where it is installed)."""

import json
from typing import Any

import pytest
from serve_helpers import Server, post

from retro_engine.serve.api_error import ApiError
from retro_engine.serve.messages import Turn, turn_messages

SAY = [{"role": "user", "content": "What is amber?"}]
ASK: dict[str, Any] = {"model": "tiny", "messages": SAY, "max_tokens": 12, "temperature": 0}
TOOL = {
    "name": "clock",
    "description": "now",
    "input_schema": {"type": "object", "properties": {}, "additionalProperties": False},
}


def create(server: Server, **fields: Any) -> dict[str, Any]:
    answer = post(server, "/v1/messages", **{**ASK, **fields})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for part in text.split("\n\n")[:-1]:
        name, data = part.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    assert all(name == data["type"] for name, data in found)
    return found


def test_a_message_is_what_a_chat_says(server: Server) -> None:
    out = create(server, system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}])
    messages = [{"role": "system", "content": "Be brief."}, *SAY]
    chat = server.openai("read").chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=12)
    assert out["content"] == [{"type": "text", "text": chat.choices[0].message.content}]
    reasons = {"length": "max_tokens", "stop": "end_turn"}
    assert out["stop_reason"] == reasons[chat.choices[0].finish_reason]
    usage = out["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == chat.usage.prompt_tokens
    assert usage["output_tokens"] == chat.usage.completion_tokens
    assert (out["type"], out["role"], out["id"][:4]) == ("message", "assistant", "msg-")
    counted = post(server, "/v1/messages/count_tokens", model="tiny", messages=SAY, system="Be brief.").json()
    assert counted == {"input_tokens": chat.usage.prompt_tokens}


def test_the_events_of_a_stream(server: Server) -> None:
    whole = create(server)
    found = events(post(server, "/v1/messages", **ASK, stream=True).text)
    names = [name for name, _ in found]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "".join(d["delta"]["text"] for n, d in found if n == "content_block_delta") == whole["content"][0]["text"]
    assert found[-2][1]["delta"]["stop_reason"] == whole["stop_reason"]
    assert found[-2][1]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    assert found[0][1]["message"]["content"] == []


def test_stop_sequences_are_named(server: Server) -> None:
    text = create(server, temperature=0.9, max_tokens=60)["content"][0]["text"]
    stop = next(text[n : n + 2] for n in range(2, len(text)) if text[n : n + 2] not in text[: n + 1])
    seeded = create(server, stop_sequences=["\0never", " "], max_tokens=60)
    assert seeded["stop_reason"] in ("stop_sequence", "max_tokens", "end_turn")
    if seeded["stop_reason"] == "stop_sequence":
        assert seeded["stop_sequence"] == " "
    assert stop


def test_an_answer_that_is_begun_goes_on(server: Server) -> None:
    begun = [*SAY, {"role": "assistant", "content": "It is"}]
    out = create(server, messages=begun)
    prompt = "Question: What is amber?\nAnswer: It is"
    same = post(
        server, "/v1/completions", model="tiny", prompt=prompt, temperature=0, max_tokens=12, stop=["\nQuestion:"]
    )
    assert out["content"][0]["text"] == same.json()["choices"][0]["text"]


def test_tools(server: Server) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    ask = {"tools": [TOOL], "tool_choice": {"type": "any"}, "max_tokens": 300, "temperature": 1.0}
    out = create(server, **ask)
    (block,) = out["content"]
    assert (block["type"], block["name"], block["input"], out["stop_reason"]) == ("tool_use", "clock", {}, "tool_use")
    streamed = events(post(server, "/v1/messages", **{**ASK, **ask}, stream=True).text)
    deltas = [d["delta"]["partial_json"] for n, d in streamed if n == "content_block_delta"]
    assert json.loads("".join(deltas)) == {}
    result = {"type": "tool_result", "tool_use_id": block["id"], "content": [{"type": "text", "text": "noon"}]}
    told = [*SAY, {"role": "assistant", "content": out["content"]}, {"role": "user", "content": [result]}]
    assert create(server, messages=told, tools=[TOOL])["role"] == "assistant"


def test_keys_and_errors_are_as_its_client_has_them(server: Server) -> None:
    with server.client(None) as client:
        for key, status in ((server.keys["read"], 200), ("rk_wrong", 401), ("", 401)):
            answer = client.post(
                "/v1/messages", json=ASK, headers={"x-api-key": key, "anthropic-version": "2023-06-01"}
            )
            assert answer.status_code == status, answer.text
        assert answer.json()["type"] == "error"
        assert answer.json()["error"]["type"] == "authentication_error"
    wrong = post(server, "/v1/messages", model="tiny", messages=SAY)
    assert (wrong.status_code, wrong.json()["type"], wrong.json()["error"]["param"]) == (400, "error", "max_tokens")
    assert post(server, "/v1/messages", **{**ASK, "model": "claude"}).json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"), ({"messages": [{"role": "system", "content": "a"}]}, "messages.0.role"), ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0"), ({"temperature": 1.5}, "temperature"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"), ({"tool_choice": {"type": "any"}}, "tool_choice"), ({"top_k": -1}, "top_k"),
        ({"tools": [{"name": "a"}]}, "tools.0.input_schema"), ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.type"),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences"),
    ],
)  # fmt: skip
def test_what_is_refused(server: Server, fields: dict[str, Any], param: str) -> None:
    answer = post(server, "/v1/messages", **{**ASK, **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param), answer.text


def test_blocks_of_the_other_side_are_refused() -> None:
    use = {"type": "tool_use", "id": "a", "name": "b", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": "x"}
    for role, block in (("user", use), ("assistant", result)):
        with pytest.raises(ApiError, match=f"the {role}'s message has a block"):
            turn_messages(Turn.model_validate({"role": role, "content": [block]}))
    both = Turn.model_validate({"role": "user", "content": [{"type": "text", "text": "So?"}, result]})
    assert [(one.role, one.text) for one in turn_messages(both)] == [("tool", "x"), ("user", "So?")]


def test_its_own_client(server: Server) -> None:
    anthropic = pytest.importorskip("anthropic", reason="anthropic is not installed")
    client = anthropic.Anthropic(base_url=server.url, api_key=server.keys["read"], max_retries=0)
    out = client.messages.create(model="tiny", max_tokens=4, messages=SAY)
    assert out.content[0].type == "text"
    with client.messages.stream(model="tiny", max_tokens=4, messages=SAY) as stream:
        assert "".join(stream.text_stream) == stream.get_final_text()
