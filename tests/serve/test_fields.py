"""Fields of OpenAI's, vLLM's and llama.cpp's clients: what each does, asked by OpenAI's own client."""

import json
from typing import Any

import pytest
from serve_helpers import Server

from retro_engine.generate.request import Request
from retro_engine.generate.sampling import Sampling
from retro_engine.serve.api_error import ApiError
from retro_engine.serve.bounds import Limits
from retro_engine.serve.fields import HARMLESS, Chat, Completion
from retro_engine.serve.limits import parse
from retro_engine.serve.openai import requests_of

openai = pytest.importorskip("openai")
PROMPT = "Document doc7. river stone"


def complete(server: Server, **fields: Any) -> Any:
    client = server.openai("read", max_retries=0)
    return client.completions.create(**{"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "seed": 1, **fields})


def generated(server: Server, **sampling: Any) -> list[int]:
    """What the engine says to the prompt."""
    return server.service.engine.submit(Request(PROMPT, 24, sampling=Sampling(**sampling))).result().tokens


def test_penalties_and_biases_reach_the_sampler(server: Server) -> None:
    tokenizer = server.service.tokenizer
    plain = generated(server)
    for fields in (
        {"presence_penalty": 2.0},
        {"frequency_penalty": 1.5},
        {"presence_penalty": -2, "frequency_penalty": 0.5},
    ):
        text = complete(server, temperature=0, **fields).choices[0].text
        assert text == tokenizer.decode(generated(server, **fields)), fields
    assert len(set(generated(server, frequency_penalty=2.0))) > len(set(plain))
    (wanted,) = tokenizer.encode("q")
    out = complete(server, temperature=0, max_tokens=4, logit_bias={str(wanted): 100})
    assert out.choices[0].text == "qqqq"
    banned = complete(server, temperature=0, logit_bias={str(plain[0]): -100})
    assert tokenizer.encode(banned.choices[0].text)[:1] != plain[:1]
    chat = server.openai("read").chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "a"}],
        max_tokens=3,
        temperature=0,
        logit_bias={str(wanted): 100},
    )
    assert chat.choices[0].message.content == "qqq"


def test_min_p_leaves_out_what_is_unlikely(server: Server) -> None:
    greedy = complete(server, temperature=0).choices[0].text
    assert complete(server, temperature=1.5, extra_body={"min_p": 1.0}).choices[0].text == greedy
    assert complete(server, temperature=1.5, extra_body={"min_p": 0}).choices[0].text != greedy


def test_stop_token_ids_end_the_text_before_them(server: Server) -> None:
    tokens = generated(server, greedy=False, temperature=1.5, seed=1)
    place = next(number for number, token in enumerate(tokens) if number > 1 and token not in tokens[:number])
    stops = {"stop_token_ids": [tokens[place]]}
    out = complete(server, temperature=1.5, logprobs=0, extra_body=stops)
    assert len(out.choices[0].logprobs.tokens) == out.usage.completion_tokens == place
    assert out.choices[0].finish_reason == "stop"
    more = complete(server, temperature=1.5, extra_body={**stops, "ignore_eos": True})
    assert (more.choices[0].finish_reason, more.usage.completion_tokens) == ("length", 24)


@pytest.mark.parametrize("extra", [{}, {"retro": {"neighbors": []}}])
def test_no_new_tokens_score_the_prompt(server: Server, extra: dict[str, Any]) -> None:
    ask: dict[str, Any] = {"temperature": 0, "echo": True, "logprobs": 2, "extra_body": extra}
    out = complete(server, max_tokens=0, **ask)
    choice, ids = out.choices[0], server.service.tokenizer.encode(PROMPT)
    assert (choice.text, choice.finish_reason) == (PROMPT, "length")
    assert (out.usage.completion_tokens, out.usage.prompt_tokens) == (0, len(ids))
    longer = complete(server, max_tokens=3, **ask).choices[0]
    assert choice.logprobs.token_logprobs == pytest.approx(longer.logprobs.token_logprobs[: len(ids)], abs=1e-4)
    assert choice.logprobs.tokens == longer.logprobs.tokens[: len(ids)]
    pieces = list(complete(server, max_tokens=0, stream=True, **ask))
    assert "".join(piece.choices[0].text for piece in pieces) == PROMPT
    many = complete(server, prompt=[PROMPT, "amber lantern"], max_tokens=0, n=2, **ask)
    assert [one.text for one in many.choices] == [PROMPT, PROMPT, "amber lantern", "amber lantern"]
    assert complete(server, max_tokens=0, temperature=0, echo=True).choices[0].logprobs is None
    with pytest.raises(openai.BadRequestError, match="without echo"):
        complete(server, max_tokens=0)


def test_the_best_of_several_is_the_likeliest(server: Server) -> None:
    ask: dict[str, Any] = {"temperature": 1.5, "max_tokens": 6, "prompt": [PROMPT, "amber lantern"]}
    every = complete(server, n=5, logprobs=0, **ask)
    texts = []
    for first in (0, 5):
        group = every.choices[first : first + 5]
        means = {c.text: sum(c.logprobs.token_logprobs) / len(c.logprobs.tokens) for c in group}
        texts += sorted((c.text for c in group), key=means.__getitem__, reverse=True)[:2]
    for more in ({}, {"echo": True}, {"logprobs": 1}):
        best = complete(server, best_of=5, n=2, **ask, **more)
        begun = ["", "", "", ""] if "echo" not in more else [PROMPT, PROMPT, "amber lantern", "amber lantern"]
        assert [choice.text for choice in best.choices] == [a + b for a, b in zip(begun, texts)]
        assert [choice.index for choice in best.choices] == [0, 1, 2, 3]
        assert (best.choices[0].logprobs is None) == ("logprobs" not in more)
        assert best.usage.completion_tokens == every.usage.completion_tokens, "all that were generated are counted"
        assert {segment["choice"] for segment in best.retro["segments"]} == {0, 1, 2, 3}


def test_what_is_remembered_of_a_prompt_is_counted(server: Server) -> None:
    prompt = "granite tide copper ember " * 3
    first = complete(server, prompt=prompt, max_tokens=1)
    again = complete(server, prompt=prompt, max_tokens=1, n=3)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens == first.usage.prompt_tokens
    *_, last = complete(server, prompt=prompt, max_tokens=1, stream=True, stream_options={"include_usage": True})
    assert last.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens


WITHOUT_EFFECT: dict[str, Any] = {
    "user": "ada", "safety_identifier": "a", "prompt_cache_key": "k", "metadata": {"a": "b"}, "store": True,
    "service_tier": "flex",
}  # fmt: skip
OF_A_PAGE = {
    "return_progress",
    "sse_ping_interval",
    "reasoning_format",
    "samplers",
    "backend_sampling",
    "priority",
    "cache_prompt",
}
PAGE: dict[str, Any] = {  # what llama.cpp's page sends
    "messages": [{"role": "user", "content": "Hi"}], "stream": True, "return_progress": True, "reasoning_format": "auto", "temperature": 0.8,
    "dynatemp_range": 0, "dynatemp_exponent": 1, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "xtc_probability": 0, "xtc_threshold": 0.1, "typ_p": 1,
    "max_tokens": -1, "repeat_last_n": 64, "repeat_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "dry_multiplier": 0, "dry_base": 1.75,
    "dry_allowed_length": 2, "dry_penalty_last_n": -1, "samplers": ["top_k", "top_p", "min_p", "temperature"], "timings_per_token": True,
    "sse_ping_interval": 1, "backend_sampling": False, "stream_options": {"include_usage": True}, "chat_template_kwargs": {"enable_thinking": False}, "reasoning_control": True,
}  # fmt: skip
OF_OPEN_WEBUI: dict[str, Any] = {  # what may be left in a body that Open WebUI sends on
    "session_id": "s1", "chat_id": "c1", "id": "m1", "message_id": "m2", "features": {"web_search": False},
    "variables": {"{{USER_NAME}}": "Ada"}, "background_tasks": {"title_generation": True, "tags_generation": True},
}  # fmt: skip
OF_CHATS: dict[str, Any] = {"reasoning_effort": "high", "verbosity": "low", "prompt_cache_retention": "24h"}


def test_what_has_no_effect_is_said(server: Server) -> None:
    out = complete(server, temperature=0, max_tokens=1, extra_body=WITHOUT_EFFECT)
    assert out.retro["notes"] == [f"taken, without effect here: {', '.join(WITHOUT_EFFECT)}"]
    client, messages = server.openai("read"), [{"role": "user", "content": "a"}]
    every = {**WITHOUT_EFFECT, **OF_CHATS, **OF_OPEN_WEBUI}
    options = {"include_usage": True, "include_obfuscation": True}
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=2, stream=True, stream_options=options, extra_body=every
        )
    )
    notes = [note for chunk in chunks for note in (getattr(chunk, "retro", None) or {}).get("notes", ())]
    assert notes == [f"taken, without effect here: {', '.join(every)}, stream_options.include_obfuscation"]
    assert set(HARMLESS) == {*every, "parallel_tool_calls", "thinking_budget_tokens", *OF_A_PAGE}


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"metadata": {}, "store": False, "service_tier": "auto"}, {"parallel_tool_calls": True, "verbosity": "medium"},
        {"reasoning_effort": "none", "prompt_cache_retention": "in_memory"}, {"stream_options": {"include_usage": True}},
    ],
)  # fmt: skip
def test_what_asks_for_nothing_is_not_said(fields: dict[str, Any]) -> None:
    assert parse(Chat, {"model": "x", "messages": [{"role": "user", "content": "a"}], **fields}).without_effect == []
    assert parse(Completion, {"model": "x", "prompt": "a"}).without_effect == []


def test_a_page_of_llama_cpp_asks(server: Server) -> None:
    """What the server is, then an answer: without a model's name, for as many tokens as there is room for."""
    body = parse(Chat, PAGE)
    assert body.without_effect == ["return_progress", "samplers", "sse_ping_interval"]
    with server.client("read") as client:
        about = client.get("/props").json()
        known = about["default_generation_settings"]
        assert (known["n_ctx"], about["total_slots"], about["modalities"]) == (
            server.service.engine.max_tokens,
            8,
            {"vision": False, "audio": False},
        )
        sent = {name: value for name, value in known["params"].items() if name in Chat.model_fields}
        assert parse(Chat, {"messages": PAGE["messages"], **sent}).temperature == 0, "its own defaults are taken"
        assert client.get("/props", params={"model": "other"}).status_code == 404
        out = client.post("/v1/chat/completions", json={**PAGE, "stop": ["e", " ", "a"], "ignore_eos": False})
    assert out.status_code == 200 and out.text.endswith("data: [DONE]\n\n")
    pieces = [json.loads(line[6:]) for line in out.text.splitlines() if line.startswith("data: {")]
    timings, usage = [piece["timings"] for piece in pieces if "timings" in piece], pieces[-1]["usage"]
    assert len(timings) == 1 and "timings" in pieces[-2], "with the last piece"
    assert timings[0]["predicted_n"] == usage["completion_tokens"]
    assert timings[0]["prompt_n"] + timings[0]["cache_n"] == usage["prompt_tokens"]
    assert timings[0]["prompt_ms"] > 0 and timings[0]["prompt_per_second"] > 0
    for name, value in (
        ("repeat_penalty", 1.1), ("xtc_probability", 0.5), ("typ_p", 0.9), ("mirostat", 2), ("dry_multiplier", 0.8),
        ("dynatemp_range", 0.1), ("length_penalty", 2), ("use_beam_search", True), ("skip_special_tokens", False), ("bad_words", ["a"]),
    ):  # fmt: skip
        with pytest.raises(ApiError) as caught:
            parse(Chat, {**PAGE, name: value})
        assert caught.value.param == name


def test_open_webui_asks(server: Server) -> None:
    """Its list of models; a chat; the title and tags that it asks for beside it."""
    people = {
        "X-OpenWebUI-User-Name": "Ada%20L",
        "X-OpenWebUI-User-Id": "u",
        "X-OpenWebUI-User-Role": "user",
        "X-OpenWebUI-Chat-Id": "c",
    }
    with server.client("read") as client:
        client.headers.update(people)
        listed = client.get("/v1/models", headers={"content-type": "application/json"}).json()
        assert [(one["id"], one["object"], one["owned_by"]) for one in listed["data"]] == [
            ("tiny", "model", "retro-engine")
        ]
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "What?"}]},
        ]
        chat = {"model": "tiny", "messages": messages, "max_tokens": 3, "temperature": 0, **OF_OPEN_WEBUI}
        out = client.post(
            "/v1/chat/completions", json={**chat, "stream": True, "stream_options": {"include_usage": True}}
        )
        assert out.status_code == 200 and out.text.endswith("data: [DONE]\n\n")
        assert '"usage":{"prompt_tokens":' in out.text
        for task in ("Generate a concise, 3-5 word title", "Generate 1-3 broad tags"):
            ask = {"model": "tiny", "messages": [{"role": "user", "content": f"### Task:\n{task}"}], "stream": False}
            found = client.post("/v1/chat/completions", json={**ask, "max_completion_tokens": 4}).json()
            assert isinstance(found["choices"][0]["message"]["content"], str)
        assert client.get("/api/tags").status_code == 404, "Ollama's probe is told that this is none"


def test_what_open_webui_asked(server: Server) -> None:
    """The bodies of version 0.12.4, recorded while its page was driven in Chromium (its texts are left out): a chat with three dozen
    tools of its own, 26 kB of them, and beside it a title, tags and what may be asked next.
    """
    described = {"description": "Of a page's own. " * 35, "parameters": {"properties": {}, "type": "object"}}
    tools = [{"type": "function", "function": {"name": f"tool_{number}", **described}} for number in range(36)]
    messages = [{"role": "user", "content": "What is the harbor?"}]
    with server.client("read") as client:
        assert client.get("/v1/models").status_code == 200
        for _ in range(2):
            body = {"stream": True, "model": "tiny", "messages": messages, "tools": tools}
            out = client.post("/v1/chat/completions", json=body)
            assert out.status_code == 200 and out.text.endswith("data: [DONE]\n\n"), out.text
            assert "36 tools have no room in the prompt" in out.text
            messages += [{"role": "assistant", "content": "A harbor."}, {"role": "user", "content": "And the river?"}]
        for task in ("a concise title", "3-5 useful messages", "1-3 broad tags"):
            asked = [{"role": "user", "content": f"### Task:\nGenerate {task}."}]
            body = {"model": "tiny", "messages": asked, "stream": False, "max_tokens": 1000}
            assert client.post("/v1/chat/completions", json=body).json()["choices"][0]["finish_reason"]


def test_the_notebook_of_llama_cpps_page(server: Server) -> None:
    """Its own form of completions, whole and streamed, as many tokens as there is room for unless it says how many."""
    sent = {name: value for name, value in PAGE.items() if name in Completion.model_fields and name != "stream_options"}
    ask = {
        **sent,
        "prompt": PROMPT,
        "cache_prompt": True,
        "typical_p": 1,
        "max_tokens": 6,
        "ignore_eos": True,
        "seed": 3,
    }
    with server.client("read") as client:
        lines = client.post("/completion", json=ask).text.split("\n\n")
        pieces = [json.loads(line.removeprefix("data: ")) for line in lines if line]
        assert [piece["stop"] for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        last = pieces[-1]
        assert (last["tokens_predicted"], last["stop_type"], last["model"]) == (6, "limit", "tiny")
        assert last["timings"]["predicted_n"] == 6 and last["tokens_evaluated"] > 0
        whole = client.post("/completion", json={**ask, "stream": False}).json()
        assert whole["content"] == "".join(piece["content"] for piece in pieces) and whole["stop"]
        assert len(whole["tokens"]) == 6 and whole["retro"]["neighbors"]
        stopped = client.post(
            "/completion", json={**ask, "stream": False, "n_predict": 6, "stop": [whole["content"][:1]]}
        )
        assert (stopped.json()["content"], stopped.json()["stop_type"]) == ("", "word")
        for more, param in (({"n_predict": 7}, "n_predict"), ({"n": 2}, "n"), ({"n_probs": 3}, "n_probs")):
            answer = client.post("/completion", json={**ask, **more})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert (
            client.post("/tokenize", json={"content": "a"}).json()
            == client.post("/tokenize", json={"prompt": "a"}).json()
        )
        assert client.post("/tokenize", json={}).status_code == 400
        thinks = {**PAGE, "max_tokens": 1, "stream": False, "chat_template_kwargs": {"enable_thinking": True}}
        thinks |= {"thinking_budget_tokens": 512, "stream_options": None}
        notes = client.post("/v1/chat/completions", json=thinks).json()["retro"]["notes"]
        assert notes[0].endswith("thinking_budget_tokens, chat_template_kwargs.enable_thinking")


@pytest.mark.parametrize(("name", "value"), [("reasoning", False), ("messages", "x"), ("tools", True)])
def test_variables_that_no_template_reads_are_refused(server: Server, name: str, value: Any) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {name: value}}
    with server.client("read") as client:
        answer = client.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, f"chat_template_kwargs.{name}")


def test_as_many_tokens_as_there_is_room_for(server: Server) -> None:
    service: Any = server.service
    body = parse(Completion, {"prompt": "a", "max_tokens": -1})
    for length, limit, most in ((10, 2048, service.engine.max_tokens - 16), (10, 100, 100)):
        asked = requests_of(body, service, [[40] * length], Limits(new_tokens=limit), 16)
        assert asked[0].max_new_tokens == most
