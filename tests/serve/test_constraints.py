"""Schemas and grammars over HTTP: in the fields of three servers' clients, whole and streamed; and what is none."""

import json
import re
import sys
from typing import Any

import pytest
from serve_helpers import Server, post

from retro_engine.serve.api_error import ApiError
from retro_engine.serve.constraints import grammar_of
from retro_engine.serve.fields import Chat
from retro_engine.serve.limits import parse

openai = pytest.importorskip("openai")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
NAMED = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
LARK, GBNF = 'start: "yes" | "no"', 'root ::= "yes" | "no"'


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": NAMED}, None),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, None),
        ({"guided_json": SCHEMA}, None),
        ({"guided_json": json.dumps(SCHEMA)}, None),
        ({"json_schema": SCHEMA}, None),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, None),
        ({"guided_regex": "[ab]{4}"}, "[ab]{4}"),
        ({"structured_outputs": {"regex": "[ab]{4}"}}, "[ab]{4}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"guided_grammar": LARK}, "yes|no"),
        ({"grammar": GBNF}, "yes|no"),
        ({"structured_outputs": {"grammar": GBNF}}, "yes|no"),
    ],
)  # fmt: skip
def test_an_answer_matches(server: Server, fields: dict[str, Any], pattern: str | None) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    client = server.openai("read", max_retries=0)
    ask = {"model": "tiny", "temperature": 1.2, "seed": 5, "max_tokens": 300, "extra_body": fields}
    out = client.chat.completions.create(messages=[{"role": "user", "content": "Say."}], n=2, **ask)
    texts = [choice.message.content for choice in out.choices]
    pieces = client.completions.create(prompt="Say.", stream=True, **ask)
    texts.append("".join(piece.choices[0].text for piece in pieces))
    for text in texts:
        if pattern is not None:
            assert re.fullmatch(pattern, text)
        else:
            value = json.loads(text)
            assert value["a"] in range(10) and value["b"] in ("x", "y")
    assert {choice.finish_reason for choice in out.choices} == {"stop"}
    assert out.retro["notes"] == []


def test_what_has_no_end_is_said(server: Server) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    long = {"response_format": {"type": "json_object", "schema": {"type": "string", "minLength": 400}}}
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 8, **long}
    out = post(server, "/v1/chat/completions", **ask).json()
    assert out["choices"][0]["finish_reason"] == "length"
    assert ["cut off by max_tokens" in note for note in out["retro"]["notes"]] == [True]
    streamed = post(server, "/v1/chat/completions", **ask, stream=True).text
    assert "cut off by max_tokens" in streamed


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": ["text"]}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": []}}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object", "schema": 1}}, "response_format.schema"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema"),
        ({"response_format": {**NAMED, "more": 1}}, "response_format.more"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"yaml": "a"}}, "structured_outputs.yaml"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": "a", "grammar": "b"}, "grammar"),
        ({"guided_regex": "a", "response_format": NAMED}, "guided_regex"),
    ],
)  # fmt: skip
def test_what_is_refused_names_its_field(fields: dict[str, Any], param: str) -> None:
    body = parse(Chat, {"model": "x", "messages": [{"role": "user", "content": "a"}], **fields})
    with pytest.raises(ApiError) as caught:
        grammar_of(body)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_nothing_is_said() -> None:
    for fields in ({}, {"response_format": {"type": "text"}}, {"response_format": None, "guided_json": None}):
        body = parse(Chat, {"model": "x", "messages": [{"role": "user", "content": "a"}], **fields})
        assert grammar_of(body) is None


def test_grammars_that_are_none_and_a_missing_extra(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = {"model": "tiny", "prompt": "a", "max_tokens": 2}
    if "llguidance" in sys.modules:
        for fields in ({"guided_regex": "("}, {"grammar": "start: start"}, {"guided_json": {"type": "strange"}}):
            answer = post(server, "/v1/completions", **ask, **fields)
            assert answer.status_code == 400, answer.text
            assert "the grammar" in answer.json()["error"]["message"]
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for stream in (False, True):
        answer = post(server, "/v1/completions", **ask, guided_regex="[xyz]{3}", stream=stream)
        assert answer.status_code == 501
        assert "retro-engine[grammar]" in answer.text
    assert post(server, "/v1/completions", **ask).status_code == 200
