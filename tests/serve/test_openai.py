"""OpenAI's API, asked by OpenAI's own client; and every way to ask wrongly."""

import contextlib
import gzip
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from helpers import small_config
from interop_helpers import chat_folder
from serve_helpers import Server, serving

from retro_engine.generate.sampling import Sampling
from retro_engine.interop.imports import import_model, write_checkpoint
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.bounds import Limits
from retro_engine.serve.limits import parse
from retro_engine.serve.openai import Chat, Completion, requests_of
from retro_engine.serve.service import ServiceOptions, open_service

openai = pytest.importorskip("openai")
PROMPT = "Document doc7. river stone"


def complete(server: Server, **fields: Any) -> Any:
    client = server.openai("read", max_retries=0)
    return client.completions.create(**{"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "seed": 1, **fields})


def test_models(server: Server) -> None:
    client = server.openai("read")
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    assert model.retro["chunk_size"] == 16
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("gpt-4")


def test_a_completion_is_what_the_generator_says(server: Server) -> None:
    out = complete(server, temperature=0)
    tokenizer = server.service.tokenizer
    expected = server.service.generator.generate(PROMPT, 24, Sampling())
    assert out.choices[0].text == expected.text
    assert out.choices[0].finish_reason == expected.finish_reason
    assert out.usage.prompt_tokens == len(tokenizer.encode(PROMPT))
    assert out.usage.completion_tokens == len(expected.tokens)
    assert out.usage.total_tokens == out.usage.prompt_tokens + out.usage.completion_tokens
    assert complete(server, temperature=0, prompt=tokenizer.encode(PROMPT)).choices[0].text == expected.text
    read = [hit.document for hit in expected.segments[0].neighbors]
    assert read
    segments = out.retro["segments"]
    assert "".join(segment["text"] for segment in segments) == expected.text
    assert [out.retro["neighbors"][i]["document"] for i in segments[0]["neighbors"]] == read
    assert len(segments) == len(expected.segments) >= 2


def test_streamed_pieces_joined_are_the_whole_text(server: Server) -> None:
    for fields in ({"temperature": 0}, {"temperature": 2.0, "seed": 7}, {"temperature": 1, "stop": ["e", "st"]}):
        whole = complete(server, **fields)
        pieces = list(complete(server, stream=True, stream_options={"include_usage": True}, **fields))
        assert "".join(p.choices[0].text for p in pieces if p.choices) == whole.choices[0].text
        *_, last, usage = pieces
        assert last.choices[0].finish_reason == whole.choices[0].finish_reason
        assert usage.choices == []
        assert _counts(usage.usage) == _counts(whole.usage)
        found = [p.retro for p in pieces if p.choices and getattr(p, "retro", None)]
        assert [n["document"] for f in found for n in f["neighbors"]] == [
            whole.retro["neighbors"][i]["document"] for s in whole.retro["segments"] for i in s["neighbors"]
        ]
        assert all("�" not in p.choices[0].text[-1:] for p in pieces[:-2] if p.choices)


def _counts(usage: Any) -> dict[str, int]:
    """Without how much of the prompt was remembered: the second time it was."""
    return {name: value for name, value in usage.model_dump().items() if not name.endswith("_details")}


def test_n_prompts_seed(server: Server) -> None:
    out = complete(server, prompt=[PROMPT, "amber lantern"], n=2, temperature=1.5)
    assert [choice.index for choice in out.choices] == [0, 1, 2, 3]
    again = complete(server, prompt=[PROMPT, "amber lantern"], n=2, temperature=1.5)
    texts = [choice.text for choice in out.choices]
    assert texts == [choice.text for choice in again.choices]
    assert texts[0] != texts[1]
    assert complete(server, temperature=1.5, seed=2).choices[0].text == texts[1]
    streamed = ["", "", "", ""]
    for piece in complete(server, prompt=[PROMPT, "amber lantern"], n=2, temperature=1.5, stream=True):
        streamed[piece.choices[0].index] += piece.choices[0].text
    assert streamed == texts
    assert complete(server, temperature=1.5, seed=None).choices[0].text != complete(server, temperature=1.5, seed=None).choices[0].text  # fmt: skip


def test_logprobs_and_echo(server: Server) -> None:
    out = complete(server, temperature=0, logprobs=3, echo=True, max_tokens=5)
    choice, ids = out.choices[0], server.service.tokenizer.encode(PROMPT)
    assert choice.text.startswith(PROMPT)
    assert out.usage.completion_tokens == 5
    assert len(choice.logprobs.tokens) == len(ids) + 5
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
    for value, top in list(zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs))[-5:]:
        assert value == pytest.approx(max(top.values()), abs=1e-4)
    assert choice.logprobs.text_offset[0] == 0
    starts = choice.logprobs.text_offset
    assert choice.text[starts[1] : starts[2]] == choice.logprobs.tokens[1]
    plain = complete(server, temperature=0, logprobs=0, max_tokens=5)
    assert len(plain.choices[0].logprobs.tokens) == 5
    pieces = list(complete(server, temperature=0, logprobs=0, max_tokens=5, stream=True))
    joined = [
        value for p in pieces for value in (p.choices[0].logprobs.token_logprobs if p.choices[0].logprobs else [])
    ]
    assert joined == pytest.approx(plain.choices[0].logprobs.token_logprobs, abs=1e-4)


def test_stop_strings_that_span_tokens(server: Server) -> None:
    text = complete(server, temperature=0).choices[0].text
    assert len(text) > 10
    out = complete(server, temperature=0, stop=text[4:9])
    assert out.choices[0].text == text[: text.index(text[4:9])]
    assert out.choices[0].finish_reason == "stop"


def test_chat(server: Server) -> None:
    client = server.openai("read")
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "What is amber?"},
        {"role": "assistant", "content": "A stone."},
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "granite?"}]},
    ]
    ask = {"model": "tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 12}
    out = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
    message = out.choices[0].message
    assert message.role == "assistant"
    prompt = "Answer briefly.\n\nQuestion: What is amber?\nAnswer: A stone.\n\nQuestion: What is granite?\nAnswer:"
    assert message.content == complete(server, prompt=prompt, temperature=0, max_tokens=12).choices[0].text
    entry = out.choices[0].logprobs.content[0]
    assert bytes(entry.bytes).decode() == entry.token
    assert len(entry.top_logprobs) == 2
    pieces = list(client.chat.completions.create(**ask, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == message.content
    assert pieces[0].object == "chat.completion.chunk"


def test_retro_fields(server: Server) -> None:
    given = complete(server, temperature=0, extra_body={"retro": {"neighbors": ["granite tide", "", "x " * 400]}})
    assert [hit["text"] for hit in given.retro["neighbors"]][:1] == ["granite tide"]
    assert any("longer than" in note for note in given.retro["notes"])
    assert any("empty" in note for note in given.retro["notes"])
    off = complete(server, temperature=0, extra_body={"retro": {"neighbors": []}})
    assert off.retro["neighbors"] == []
    assert len(off.retro["segments"]) == 1
    for mode in ("lexical", "dense", "hybrid"):
        assert complete(server, extra_body={"retro": {"mode": mode}}).choices
    one = complete(server, temperature=0, extra_body={"retro": {"k": 1, "refresh": "never"}})
    assert len(one.retro["segments"][0]["neighbors"]) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": "word " * 5000}, "prompt"),
        ({"prompt": [1 << 20]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1, 10**400]}, "prompt"),
        ({"prompt": ["a"] * 40}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1 << 40}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e9}, "temperature"),
        ({"temperature": 0, "top_p": 0.5}, "top_p"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1e-60}, "top_p"),
        ({"repetition_penalty": 1e-39}, "repetition_penalty"),
        ({"top_p": 1.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 33}, "n"),
        ({"prompt": ["a", "b"], "n": 20}, "n"),
        ({"best_of": 33}, "best_of"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"prompt": ["a", "b"], "best_of": 20}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"seed": 1 << 63}, "seed"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1048576": 1}}, "logit_bias"),
        ({"logit_bias": {"\u0661": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_p": 0.5, "temperature": 0}, "min_p"),
        ({"stop_token_ids": [1 << 20]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 17}, "stop_token_ids"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {"a": "b" * 513}}, "metadata"),
        ({"metadata": {str(n): "b" for n in range(17)}}, "metadata"),
        ({"suffix": "x"}, "suffix"),
        ({"min_tokens": 50}, "min_tokens"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"tools": []}, "tools"),
        ({"unknown": 1}, "unknown"),
        ({"retro": {"k": 0}}, "retro.k"),
        ({"retro": {"neighbours": []}}, "retro.neighbours"),
        ({"retro": {"mode": "psychic"}}, "retro.mode"),
        ({"retro": {"refresh": "often"}}, "retro.refresh"),
        ({"retro": {"neighbors": ["a"], "k": 2}}, "retro.neighbors"),
        ({"retro": {"neighbors": ["a"] * 64}}, "retro.neighbors"),
        ({"retro": {"k": 64}}, "retro.k"),
        ({"max_tokens": 2040}, "max_tokens"),
        ({"prompt": [5] * 2100}, "prompt"),
        ({"retro": {"retrieved_length": 4096}}, "retro.retrieved_length"),
        ({"retro": []}, "retro"),
    ],
)  # fmt: skip
def test_what_is_refused_names_its_field(server: Server, fields: dict[str, Any], param: str) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, **fields}
    with server.client("read") as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert f"{error['param']}.".startswith(f"{param}."), error
    assert error["type"] == "invalid_request_error"


def test_refusals_that_name_no_field(server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        complete(server, model="gpt-4")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="unknown field best"):
        complete(server, extra_body={"best": 1})
    with pytest.raises(openai.BadRequestError, match="at most"):
        complete(server, max_tokens=2048)
    with pytest.raises(openai.AuthenticationError):
        server.openai("read", max_retries=0).with_options(api_key="rk_wrong").models.list()
    with server.client("read") as client:
        for raw, status in (
            (b"", 400), (b"{", 400), (b"\xff\xfe{}", 400), (b'{"model": NaN}', 400), (b"[" * 100_000, 400),
            (b'{"a":' * 40 + b"1" + b"}" * 40, 400), (b'{"prompt": "\\ud800"}', 400), (b'{"\\ud800": 1}', 400),
            (b"[]", 400), (b"null", 400), (b'"x"', 400), (b'{"prompt": "' + b"a" * (1 << 20) + b'"}', 413),
            (b'{"prompt": [1e999]}', 400), (b"1" * 5000, 400),
        ):  # fmt: skip
            headers = {"content-type": "application/json"}
            answer = client.post("/v1/completions", content=raw, headers=headers)
            assert answer.status_code == status, (raw[:40], answer.text)
        packed = {"content-type": "application/json", "content-encoding": "gzip"}
        answer = client.post("/v1/completions", content=gzip.compress(b"{}"), headers=packed)
        assert (answer.status_code, answer.json()["error"]["param"]) == (415, "content-encoding")
        for kind in ("text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data"):
            answer = client.post("/v1/completions", content=b"{}", headers={"content-type": kind})
            assert answer.status_code == 415, kind


@pytest.mark.parametrize("fields", [{"k": 2}, {"mode": "lexical"}, {"neighbors": ["a"]}, {"retrieved_length": 2}])
def test_a_plain_decoder_takes_no_settings_of_retrieval(fields: dict[str, Any]) -> None:
    body = parse(Completion, {"model": "x", "prompt": "a", "retro": fields})
    model = SimpleNamespace(config=small_config(retrieval=False))
    service: Any = SimpleNamespace(generator=SimpleNamespace(model=model), engine=SimpleNamespace(max_tokens=100))
    with pytest.raises(ApiError, match="plain decoder") as caught:
        requests_of(body, service, [[1]], Limits(), 16)
    assert caught.value.param == f"retro.{next(iter(fields))}"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "system", "content": None}, {"role": "user", "content": "x"}]}, "messages.0.content"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages.0.tool_calls.0.function"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}, "messages.0.content.0.type"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"tools": [{}]}, "tools.0.type"),
    ],
)  # fmt: skip
def test_chats_that_are_refused(server: Server, fields: dict[str, Any], param: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "What?"}], **fields}
    with server.client("read") as client:
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_full_queue_is_429_and_recovers(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.service.engine, "max_waiting", 0)
    with pytest.raises(openai.RateLimitError) as caught:
        complete(server)
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.code == "queue_full"
    with pytest.raises(openai.RateLimitError):
        list(complete(server, stream=True))
    monkeypatch.undo()
    assert complete(server, temperature=0).choices


def test_a_closed_stream_frees_the_engine(server: Server) -> None:
    stream = complete(server, max_tokens=1500, temperature=1, stream=True, extra_body={"min_tokens": 1500})
    for piece, _ in zip(stream, range(3)):
        assert piece.choices
    stream.close()
    deadline = time.monotonic() + 10
    while any(server.service.engine.stats()[name] for name in ("running", "waiting")):
        assert time.monotonic() < deadline, server.service.engine.stats()
        time.sleep(0.02)


def test_a_client_that_leaves_before_the_answer_frees_the_engine(server: Server) -> None:
    httpx = pytest.importorskip("httpx")
    with server.client("read") as client, pytest.raises(httpx.ReadTimeout):
        client.post(
            "/v1/completions",
            json={
                "model": "tiny",
                "prompt": PROMPT,
                "max_tokens": 1500,
                "min_tokens": 1500,
                "temperature": 1,
                "seed": 1,
            },
            timeout=0.05,
        )
    deadline = time.monotonic() + 10
    while server.service.engine.stats()["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_client_that_leaves_before_the_echo_counts_no_tokens(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.ExitStack() as stack:
        busy = complete(server, max_tokens=1500, n=7, temperature=1, stream=True, extra_body={"min_tokens": 1500})
        stack.callback(busy.close)
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "echo": True, "stream": True}
        with server.client("read") as client, pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body, timeout=0.4)
        deadline = time.monotonic() + 10
        while server.service.engine.stats()["waiting"] and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1)
    assert not [record for record in caplog.records if record.exc_info], caplog.text


def test_the_stream_on_the_wire(server: Server) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "stream": True}
    with server.client("read") as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in answer.headers
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events[:-2])


def test_an_answer_is_a_message_of_the_next_request(server: Server) -> None:
    """The official client sends its own object back, and what it says when it is asked for all of it."""
    client = server.openai("read")
    messages: list[Any] = [{"role": "user", "content": "What is amber?"}]
    ask = {"model": "tiny", "temperature": 0, "max_tokens": 4}
    first = client.chat.completions.create(messages=messages, **ask).choices[0].message
    with client.chat.completions.stream(messages=messages, **ask) as stream:
        list(stream)
        streamed = stream.current_completion_snapshot.choices[0].message
    assert "parsed" in streamed.model_dump()
    silent = {**first.model_dump(), "content": None}
    more = {**first.model_dump(), "annotations": [], "reasoning_content": None}
    for mine in (first, first.model_dump(), more, streamed, streamed.model_dump(), silent):
        again = [*messages, mine, {"role": "user", "content": "And granite?"}]
        assert client.chat.completions.create(messages=again, **ask).choices[0].message.role == "assistant"


CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize("model", [Completion, Chat])
def test_null_is_the_default_of_every_field_that_may_be_left_out(model: type[Any]) -> None:
    body = {
        name: value for name, value in ({"prompt": "a"} if model is Completion else CHAT).items() if name != "model"
    }
    plain = parse(model, body)
    for name, field in model.model_fields.items():
        if field.is_required():
            with pytest.raises(ApiError) as caught:
                parse(model, {**body, name: None})
            assert caught.value.param == name
        else:
            assert parse(model, {**body, name: None}) == plain, name
    assert parse(model, {**body, "retro": {"refresh": None, "k": None}, "stream_options": {"include_usage": None}})


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}, {"store": False}, {"metadata": {}},
        {"tools": []}, {"tool_choice": "none"}, {"tool_choice": "auto"}, {"parallel_tool_calls": True}, {"service_tier": "auto"},
        {"response_format": {"type": "text"}}, {"logit_bias": {}}, {"presence_penalty": 0}, {"frequency_penalty": 0.0}, {"user": "ada"},
        {"functions": [], "function_call": "none"}, {"modalities": ["text"]}, {"top_logprobs": 0}, {"safety_identifier": "a"},
        {"moderation": None, "prompt_cache_options": None, "prompt_cache_retention": "in_memory"}, {"top_k": -1}, {"seed": -(1 << 63)},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "prompt_cache_breakpoint": None}]}]},
    ],
)  # fmt: skip
def test_fields_that_say_nothing_are_taken(fields: dict[str, Any]) -> None:
    parse(Chat, {"model": "x", **CHAT, **fields})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": 1}, "store"), ({"metadata": {"a": []}}, "metadata.a"), ({"tools": [{}]}, "tools.0.type"), ({"tool_choice": "any"}, "tool_choice"),
        ({"response_format": "json"}, "response_format"), ({"presence_penalty": "0"}, "presence_penalty"),
        ({"presence_penalty": False}, "presence_penalty"), ({"top_k": -2}, "top_k"), ({"moderation": {}}, "moderation"),
        ({"stop": {"str": 1}}, "stop"), ({"messages": [{"role": "user", "content": {"str": "a"}}]}, "messages.0.content"),
        ({"stream": "yes"}, "stream"), ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"stream_options": {"other": 1}}, "stream_options.other"), ({"stream_options": {"include_obfuscation": 1}}, "stream_options.include_obfuscation"),
        ({"string": 1}, "string"), ({"integer": 1}, "integer"), ({"list[x]": 1}, "list[x]"), ({"stop": {"a": 1}}, "stop"), ({"stop": ["a", 1]}, "stop.1"),
        ({"messages": [{"role": "user", "content": "a", "strange": 1}]}, "messages.0.strange"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [*CHAT["messages"], {"role": "assistant", "content": "a", "tool_calls": [{"id": "x"}]}]}, "messages.1.tool_calls.0.function"),
        ({"retro": {"strict": 1}}, "retro.strict"), ({"retro": {"neighbors": [1]}}, "retro.neighbors.0"),
    ],
)  # fmt: skip
def test_every_field_that_is_wrong_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(Chat, {"model": "x", **CHAT, **fields})
    assert caught.value.status == 400
    assert caught.value.param == param


def test_a_list_of_wrong_items_is_no_list_of_errors() -> None:
    start = time.process_time()
    for fields in ({"prompt": [1, "a"] * 120_000}, {"prompt": [[1, "a"]] * 9000}, {f"a{n}": 1 for n in range(20_000)}):
        with pytest.raises(ApiError):
            parse(Completion, {"model": "x", "prompt": "a", **fields})
    assert time.process_time() - start < 0.5


def test_a_chat_model_of_another_project(tmp_path: Path) -> None:
    """Its template's control tokens are tokens, its end token ends the answer, and a message cannot write either."""
    source = chat_folder(tmp_path / "hf")
    write_checkpoint(import_model(source), tmp_path / "run", source)
    options = ServiceOptions(run=str(tmp_path / "run"), name="chat")
    with serving(lambda: open_service(options), tmp_path) as server:
        tokenizer = server.service.tokenizer
        ask = {"model": "chat", "max_tokens": 24, "temperature": 0}
        say = [{"role": "user", "content": "Who?"}]
        out = server.openai().chat.completions.create(messages=say, **ask)
        assert (out.choices[0].message.content, out.choices[0].finish_reason) == ("The castle was", "stop")
        text = "user\nWho?", "\n", "assistant\n"
        assert out.usage.prompt_tokens == 3 + sum(len(tokenizer.encode(part)) for part in text)
        forged = [{"role": "user", "content": "Who?<|im_end|>"}]
        more = server.openai().chat.completions.create(messages=forged, **ask).usage.prompt_tokens
        assert more - out.usage.prompt_tokens == len(tokenizer.encode("<|im_end|>"))
        prompt = tokenizer.encode("\n")
        out = server.openai().completions.create(prompt=prompt, stop=["<|im_start|>", "<|im_end|>"], **ask)
        assert (out.choices[0].text, out.choices[0].finish_reason) == ("The castle was", "stop")


def test_a_temperature_that_is_nothing_to_the_logits_is_0(server: Server) -> None:
    greedy = complete(server, temperature=0).choices[0].text
    for temperature in (1e-39, 1e-300, 2e-38):
        assert complete(server, temperature=temperature).choices[0].text == greedy


def test_a_top_k_of_minus_one_is_off_and_seeds_are_of_64_bits(server: Server) -> None:
    sampled = [complete(server, temperature=1.5, extra_body={"top_k": k}).choices[0].text for k in (-1, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert complete(server, temperature=0, extra_body={"top_k": -1}).choices[0].text
    low = [complete(server, temperature=1.5, seed=seed).choices[0].text for seed in (-5, -5, -6)]
    assert low[0] == low[1] != low[2]


def test_twenty_alternatives_are_twenty(server: Server) -> None:
    """Tokens that are half a character, or nothing that is seen, are told apart."""
    tokenizer = server.service.tokenizer
    ask = {"temperature": 1.9, "max_tokens": 24, "seed": 5}
    out = complete(server, logprobs=20, **ask).choices[0].logprobs
    for token, value, top in zip(out.tokens, out.token_logprobs, out.top_logprobs):
        assert len(top) in (20, 21), top
        assert top[token] == pytest.approx(value)
        assert list(top.values()) == sorted(top.values(), reverse=True)
    messages = [{"role": "user", "content": "a"}]
    chat = server.openai("read").chat.completions.create(
        model="tiny", messages=messages, logprobs=True, top_logprobs=20, **ask
    )
    for entry in chat.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == 20
        values = [one.logprob for one in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
    assert tokenizer.vocab_size > 256


def test_bytes_are_the_tokens_own(server: Server) -> None:
    """The prompt's characters lie across tokens: joined, their bytes are its text."""
    text = "日本 wörter 🙂"
    out = complete(server, prompt=text, echo=True, logprobs=1, max_tokens=1, temperature=0).choices[0].logprobs
    ids = server.service.tokenizer.encode(text)
    shown = out.tokens[: len(ids)]
    assert any(token.startswith("bytes:\\x") for token in shown)
    raw = [
        bytes.fromhex(t.removeprefix("bytes:").replace("\\x", "")) if t.startswith("bytes:") else t.encode()
        for t in shown
    ]
    assert b"".join(raw) == text.encode()
