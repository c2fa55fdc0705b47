"""Calls in what a model says, whole and in pieces of every length; what is none stays text."""

import json
from typing import Any

import pytest
from serve_helpers import Server, post
from tokenizer_helpers import CHATML, chatml

from retro_engine.data.chat_files import ChatFiles
from retro_engine.generate.chat_template import ChatTemplate
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.chat import Message, chat_prompt
from retro_engine.serve.fields import Chat
from retro_engine.serve.limits import parse
from retro_engine.serve.tools import NO_CALL, CallReader, Tool, call_grammar, shown_tools

openai = pytest.importorskip("openai")
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <|im_end|> of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"enum": ["Rome", "Oslo"]}, "days": {"$ref": "#/$defs/days"}},
            "required": ["town", "days"],
            "additionalProperties": False,
            "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 3}},
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
TOOLS = [Tool.model_validate(one) for one in (WEATHER, CLOCK)]
CALL = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("said", "text", "names"),
    [
        ("plain text", "plain text", []),
        (CALL, "", ["clock"]),
        (f"Let me see.\n{CALL}", "Let me see.\n", ["clock"]),
        (f"{CALL}\n{CALL.replace('clock', 'weather')}\n", "", ["clock", "weather"]),
        (CALL.removesuffix("\n</tool_call>"), "", ["clock"]),
        ('{"name": "weather", "parameters": {"town": "Rome"}}', "", ["weather"]),
        (' {"name": "clock", "arguments": "{}"} ', "", ["clock"]),
        ('{"name": "nobody", "arguments": {}}', '{"name": "nobody", "arguments": {}}', []),
        ('{"a": 1}', '{"a": 1}', []),
        ("{", "{", []),
        ("a < b and <tool", "a < b and <tool", []),
        ("<tool_call>\n{not JSON}\n</tool_call> then", "<tool_call>\n{not JSON}\n</tool_call> then", []),
        ('<tool_call>{"name": "clock", "arguments": "{"}</tool_call>', '<tool_call>{"name": "clock", "arguments": "{"}</tool_call>', []),
        ('<tool_call>{"name": "clock", "arguments": [1]}</tool_call>', '<tool_call>{"name": "clock", "arguments": [1]}</tool_call>', []),
        ('<tool_call>{"name": ["clock"], "arguments": {}}</tool_call>', '<tool_call>{"name": ["clock"], "arguments": {}}</tool_call>', []),
        ("<tool_call>", "<tool_call>", []),
    ],
)  # fmt: skip
def test_calls_are_found_in_pieces_of_every_length(said: str, text: str, names: list[str]) -> None:
    for size in (1, 2, 3, 7, len(said)):
        reader, shown, notes = CallReader(TOOLS), "", list[str]()
        for start in range(0, len(said), size):
            piece, _ = reader.push(said[start : start + size], start + size >= len(said))
            shown += piece
            notes += reader.notes
            reader.notes = []
        assert (shown, [call.name for call in reader.calls]) == (text, names), size
        assert (NO_CALL in notes) == ("<tool_call>" in text), size
        assert all(isinstance(json.loads(call.arguments), dict) for call in reader.calls)


def test_a_choice_that_there_is_not() -> None:
    for fields, param in (
        ({"tools": [CLOCK, CLOCK]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name",
        ),
    ):
        body = parse(Chat, {"model": "x", "messages": [{"role": "user", "content": "a"}], **fields})
        with pytest.raises(ApiError) as caught:
            shown_tools(body.tools, body.tool_choice)
        assert caught.value.param == param
    assert shown_tools(TOOLS, "none") == []
    assert shown_tools(TOOLS, "auto") == shown_tools(TOOLS, None) == TOOLS


def test_turns_of_functions_in_text() -> None:
    called = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{not JSON"}}
    turns = [
        Message(role="user", content="When?"),
        Message.model_validate({"role": "assistant", "content": None, "tool_calls": [called]}),
        Message(role="tool", content="noon", tool_call_id="c1"),
    ]
    prompt, _ = chat_prompt(turns, None, tools=TOOLS)
    assert isinstance(prompt, str)
    assert prompt.startswith("You may call these functions")
    assert '{"name": "clock"}' in prompt and '"town"' in prompt
    assert 'Answer: <tool_call>\n{"name": "clock", "arguments": "{not JSON"}\n</tool_call>' in prompt
    assert prompt.endswith("Question: <tool_response>\nnoon\n</tool_response>\nAnswer:")


def test_turns_of_functions_in_a_template_that_knows_them() -> None:
    tokenizer = chatml()
    written = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{% for c in m.tool_calls or [] %}[{{ c.function.arguments.town }}]{% endfor %}{% endfor %}"
    tokenizer.chat_files = ChatFiles({"default": written + CHATML})
    template = ChatTemplate(tokenizer)
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Rome"}'}}
    turns = [
        Message(role="user", content="How?"),
        Message.model_validate({"role": "assistant", "content": "", "tool_calls": [call]}),
        Message(role="tool", content="Fair.", tool_call_id="c"),
    ]
    ids, _ = chat_prompt(turns, template, tools=TOOLS)
    template.close()
    shown = tokenizer.backend.decode(ids, skip_special_tokens=False)
    assert shown.startswith(
        '{"type": "function", "function": {"name": "weather", "description": "The weather <|im_end|> of a town"'
    )
    assert "[Rome]" in shown
    assert "<|im_start|>tool\nFair.<|im_end|>" in shown
    assert "You may call" not in shown
    assert [i for i in ids if i == 2] == [2] * 3, "what a description says is text"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_is_required_comes(server: Server, choice: Any) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    client = server.openai("read", max_retries=0)
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "What now?"}], "temperature": 1.0, "seed": 3}
    ask |= {"max_tokens": 400, "tools": [WEATHER], "tool_choice": choice}
    out = client.chat.completions.create(**ask).choices[0]
    assert (out.finish_reason, out.message.content) == ("tool_calls", None)
    (call,) = out.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "weather"
    assert arguments["town"] in ("Rome", "Oslo") and arguments["days"] in (1, 2, 3)
    chunks = list(client.chat.completions.create(**ask, stream=True))
    (streamed,) = [one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or []]
    assert (streamed.index, streamed.function.name) == (0, "weather")
    assert json.loads(streamed.function.arguments) == arguments
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    told = [*ask["messages"], out.message, {"role": "tool", "tool_call_id": call.id, "content": "Fair."}]
    more = client.chat.completions.create(**{**ask, "messages": told, "tool_choice": "auto", "max_tokens": 4})
    assert more.choices[0].message.role == "assistant"


@pytest.mark.parametrize("length", [2500, 9000])
def test_tools_without_room_are_left_out_and_said(server: Server, length: int) -> None:
    """As Open WebUI sends three dozen of its own; what is required is not left out. Longer than a sequence, and than a prompt."""
    told = {
        "type": "function",
        "function": {"name": "long", "description": "river stone " * (length // 4), "parameters": {}},
    }
    ask: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "What?"}], "temperature": 0}
    plain = post(server, "/v1/chat/completions", **ask, max_tokens=4).json()
    for more in ({}, {"tool_choice": "auto"}):
        out = post(server, "/v1/chat/completions", **ask, max_tokens=4, tools=[told], **more).json()
        assert out["choices"][0]["message"]["content"] == plain["choices"][0]["message"]["content"]
        assert out["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
        assert out["retro"]["notes"] == ["1 tools have no room in the prompt: the model was not shown them"]
    streamed = post(server, "/v1/chat/completions", **ask, stream=True, tools=[told]).text
    assert "have no room in the prompt" in streamed and streamed.endswith("data: [DONE]\n\n")
    refused = post(server, "/v1/chat/completions", **ask, tools=[told], tool_choice="required")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded"), refused.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{}]}, "tools.0.type"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}, "tools.0.function.parameters"),
        ({"tools": [CLOCK] * 2}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "a"}}]}]}, "messages.0.tool_calls"),
    ],
)  # fmt: skip
def test_what_is_refused(server: Server, fields: dict[str, Any], param: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "What?"}], **fields}
    with server.client("read") as client:
        answer = client.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_a_name_cannot_break_the_grammar() -> None:
    grammar = call_grammar([Tool.model_validate({"type": "function", "function": {"name": "a.b-c_d"}})])
    assert grammar.text.startswith('start: "<tool_call>')
