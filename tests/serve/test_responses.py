"""OpenAI's Responses by its own client: whole, streamed, gone on with; what is kept and what is forgotten."""

import json
from typing import Any

import pytest
from serve_helpers import Server, post

from retro_engine.serve.chat import said
from retro_engine.serve.kept import Kept, KeptAnswers
from retro_engine.serve.responses import said_messages

openai = pytest.importorskip("openai")
CLOCK: dict[str, Any] = {"type": "function", "name": "clock", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}  # fmt: skip
ASK: dict[str, Any] = {"model": "tiny", "input": "What is amber?", "temperature": 0, "max_output_tokens": 12}


def create(server: Server, scope: str = "read", **fields: Any) -> Any:
    return server.openai(scope, max_retries=0).responses.create(**{**ASK, **fields})


def test_a_response_is_what_a_chat_says(server: Server) -> None:
    out = create(server, instructions="Answer briefly.")
    messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "What is amber?"}]
    chat = server.openai("read").chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=12)
    assert out.output_text == chat.choices[0].message.content
    is_cut = chat.choices[0].finish_reason == "length"
    assert out.status == ("incomplete" if is_cut else "completed")
    assert (out.incomplete_details is not None) == is_cut
    (item,) = out.output
    assert (item.type, item.role, item.content[0].annotations) == ("message", "assistant", [])
    assert (out.usage.input_tokens, out.usage.output_tokens) == (chat.usage.prompt_tokens, chat.usage.completion_tokens)
    assert out.usage.total_tokens == chat.usage.total_tokens
    parts = [{"type": "input_text", "text": "What is "}, {"type": "input_text", "text": "amber?"}]
    same = create(server, instructions="Answer briefly.", input=[{"role": "user", "content": parts}], store=False)
    assert same.output_text == out.output_text


def test_the_events_of_a_stream(server: Server) -> None:
    whole = create(server)
    events = list(create(server, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", f"response.{whole.status}",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    last = events[-1].response
    assert last.output_text == whole.output_text
    assert (last.usage.output_tokens, last.id) == (whole.usage.output_tokens, events[0].response.id)
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {last.output[0].id}


def test_a_conversation_that_is_kept(server: Server) -> None:
    first = create(server)
    second = create(server, input="And granite?", previous_response_id=first.id)
    whole = [*said_messages("What is amber?"), said("assistant", first.output_text)]
    items = [{"role": one.role, "content": one.text} for one in whole] + [{"role": "user", "content": "And granite?"}]
    assert second.output_text == create(server, input=items).output_text
    assert second.usage.input_tokens > first.usage.input_tokens
    third = list(create(server, input="And?", previous_response_id=second.id, stream=True))[-1].response
    assert third.usage.input_tokens > second.usage.input_tokens
    client = server.openai("read", max_retries=0)
    assert client.responses.retrieve(third.id).output_text == third.output_text
    with pytest.raises(openai.NotFoundError):
        server.openai("admin", max_retries=0).responses.retrieve(third.id)  # another caller's
    with pytest.raises(openai.BadRequestError, match="not kept"):
        create(server, "admin", previous_response_id=third.id)
    client.responses.delete(third.id)
    for _ in range(2):
        with pytest.raises(openai.NotFoundError):
            client.responses.delete(third.id)
    gone = create(server, store=False)
    with pytest.raises(openai.BadRequestError) as caught:
        create(server, previous_response_id=gone.id)
    assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")


def test_functions_and_schemas(server: Server) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    ask = {"tools": [CLOCK], "tool_choice": "required", "max_output_tokens": 300, "temperature": 1.0}
    out = create(server, **ask)
    (call,) = out.output
    assert (call.type, call.name, json.loads(call.arguments), out.status) == ("function_call", "clock", {}, "completed")
    events = list(create(server, **ask, stream=True))
    kinds = [event.type for event in events]
    assert "response.function_call_arguments.done" in kinds and "response.output_text.delta" not in kinds
    given = {"type": "function_call_output", "call_id": call.call_id, "output": "noon"}
    more = create(server, input=[given], previous_response_id=out.id)
    assert more.output[0].type == "message"
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    assert json.loads(create(server, text=form, max_output_tokens=200).output_text)["a"] in (1, 2)


def test_what_has_no_effect_is_said(server: Server) -> None:
    out = create(server, metadata={"a": "b"}, user="ada", reasoning={"effort": "low"}, max_output_tokens=1)
    assert out.retro["notes"] == ["taken, without effect here: user, metadata, reasoning_effort"]
    assert out.metadata == {"a": "b"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"), ({"input": [{"role": "user"}]}, "input.0.content"), ({"input": [{"type": "reasoning"}]}, "input.0.type"),
        ({"input": [{"type": ["message"]}]}, "input.0.type"), ({"input": [{"role": "tool", "content": "a"}]}, "input.0.role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "text": "a"}]}]}, "input.0.content.0.type"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"), ({"max_output_tokens": 0}, "max_output_tokens"), ({"background": True}, "background"),
        ({"include": ["reasoning.encrypted_content"]}, "include.0"), ({"text": {"format": {"type": "xml"}}}, "response_format.type"),
        ({"previous_response_id": "resp_x"}, "previous_response_id"), ({"unknown": 1}, "unknown"), ({"truncation": "auto"}, "truncation"),
    ],
)  # fmt: skip
def test_what_is_refused(server: Server, fields: dict[str, Any], param: str) -> None:
    answer = post(server, "/v1/responses", **{**ASK, **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_calls_beside_each_other_are_one_message() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "clock", "arguments": "{}"}
    rows = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "Let me see."},
        call,
        {**call, "call_id": "d"},
    ]
    found = said_messages([*rows, {"type": "function_call_output", "call_id": "c", "output": "noon"}])
    assert [message.role for message in found] == ["user", "assistant", "tool"]
    assert [one.id for one in found[1].tool_calls or ()] == ["c", "d"]
    assert found[1].text == "Let me see."


def test_what_is_kept_is_bounded() -> None:
    kept = KeptAnswers(max_answers=3, max_characters=100)
    for name in "abcd":
        kept.put(name, Kept("me", {"id": name}, [said("user", "x" * 10)]))
    assert [kept.get(name, "me") is not None for name in "abcd"] == [False, True, True, True]
    kept.put("e", Kept("me", {}, [said("user", "x" * 85)]))
    assert [kept.get(name, "me") is not None for name in "bcde"] == [False, False, True, True]
    kept.put("f", Kept("me", {}, [said("user", "x" * 101)]))
    assert kept.get("f", "me") is None
    assert not kept.delete("f", "me")


def test_files_that_are_searched_are_read_and_cited(server: Server) -> None:
    client = server.openai("write", max_retries=0)
    file = client.files.create(file=("quarry.txt", b"The quarry of Elmswell is deep."), purpose="assistants")
    store = client.vector_stores.create(name="s", file_ids=[file.id])
    search = {"type": "file_search", "vector_store_ids": [store.id]}
    ask = {"input": "How deep is the quarry of Elmswell?", "tools": [search]}
    out = create(server, **ask, include=["file_search_call.results"])
    call, message = out.output
    assert (call.type, call.queries) == ("file_search_call", [ask["input"]])
    assert {(one.file_id, one.filename) for one in call.results} == {(file.id, "quarry.txt")}
    (cited,) = message.content[0].annotations
    assert (cited.type, cited.file_id, cited.filename, cited.index) == (
        "file_citation",
        file.id,
        "quarry.txt",
        len(out.output_text),
    )
    assert [one["text"] for one in out.retro["neighbors"]] == [one.text for one in call.results], "it was read"
    events = list(create(server, **ask, stream=True))
    kinds = [event.type for event in events]
    assert kinds.index("response.file_search_call.completed") < kinds.index("response.output_text.delta")
    assert kinds.count("response.output_text.annotation.added") == 1
    assert events[-1].response.output[1].content[0].annotations == message.content[0].annotations
    again = create(
        server, input=[*[one.model_dump(exclude_none=True) for one in out.output], {"role": "user", "content": "And?"}]
    )
    assert again.output[0].type == "message"
    nothing = create(server, input="zyzzyva", tools=[search])
    assert nothing.output[-1].content[0].annotations == []
    for wrong in ({**search, "vector_store_ids": ["vs_no"]}, {**search, "filters": {"type": "eq"}}):
        with pytest.raises(openai.APIStatusError):
            create(server, input="a", tools=[wrong])
    with pytest.raises(openai.BadRequestError, match="say nothing"):
        create(server, **ask, extra_body={"retro": {"k": 1}})
