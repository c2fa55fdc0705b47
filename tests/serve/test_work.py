"""What is computed beside the engine: refused before it begins, in turn, ended when nobody waits, never on the loop."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from serve_helpers import Letters, Server

from retro_engine.generate.fair import BusyError
from retro_engine.serve import explain, nemo, tokens
from retro_engine.serve.api_error import ClientLeft
from retro_engine.serve.service import Service
from retro_engine.serve.work import Work

EXPLAIN = {"prompt": "Document doc7. river", "text": " stone amber", "neighbors": ["river stone amber", "winter"]}
COMPLETE = {"model": "tiny", "prompt": "river", "max_tokens": 4}


async def stays() -> dict[str, str]:
    await asyncio.sleep(60)
    return {"type": "http.disconnect"}


async def leaves() -> dict[str, str]:
    await asyncio.sleep(0.05)
    return {"type": "http.disconnect"}


def until(check: Callable[[], None], ended: threading.Event) -> None:
    """Work that goes on as long as somebody waits."""
    try:
        while True:
            check()
            time.sleep(0.005)
    finally:
        ended.set()


def test_long_work_ends_with_its_client_and_with_the_server() -> None:
    work = Work()
    for receive, does_close in ((leaves, False), (stays, True)):
        ended = threading.Event()

        async def ask(ended: threading.Event = ended, receive: Any = receive) -> None:
            await work.long("key a", receive, lambda check: until(check, ended))

        closing = threading.Timer(0.1, work.close)
        if does_close:
            closing.start()
        with pytest.raises(ClientLeft):
            asyncio.run(ask())
        assert ended.wait(5)
    closing.join()


def test_work_that_is_given_up_while_it_waits_is_never_done() -> None:
    work, gate, done = Work(), threading.Event(), list[int]()

    async def ask() -> None:
        first = asyncio.create_task(work.long("key a", stays, lambda check: gate.wait(20)))
        second = asyncio.create_task(work.long("key a", leaves, lambda check: done.append(1)))
        with pytest.raises(ClientLeft):
            await second
        assert work.stats() == {"waiting": 0}
        gate.set()
        await first

    asyncio.run(ask())
    work.close()
    assert done == []


def test_a_full_queue_is_refused_and_another_caller_is_not() -> None:
    work, gate = Work(max_waiting=2), threading.Event()

    async def ask() -> None:
        tasks = []
        for _ in range(3):
            tasks.append(asyncio.create_task(work.long("key a", stays, lambda check: gate.wait(20))))
            await asyncio.sleep(0.05)  # the first is at it, two wait
        with pytest.raises(BusyError):
            await work.long("key a", stays, lambda check: None)
        other = asyncio.create_task(work.long("key b", stays, lambda check: 7))
        await asyncio.sleep(0.05)
        gate.set()
        assert await other == 7
        await asyncio.gather(*tasks)

    asyncio.run(ask())
    work.close()


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("POST", "/v1/explain", EXPLAIN, "text"),
        ("POST", "/v1/explain", {**EXPLAIN, "neighbors": ["amber"] * 30}, "neighbors"),
        ("POST", "/v1/explain", {**EXPLAIN, "neighbors": None, "k": 32}, "k"),
        ("POST", "/v1/completions", {**COMPLETE, "n": 20}, "n"),
        ("POST", "/v1/completions", {**COMPLETE, "prompt": ["river"] * 20}, "prompt"),
        ("POST", "/v1/completions", {**COMPLETE, "max_tokens": 900}, "max_tokens"),
        ("POST", "/v1/completions", {**COMPLETE, "retro": {"neighbors": ["a"] * 8}, "max_tokens": 40}, "max_tokens"),
        ("POST", "/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "n": 20}, "n"),
        ("POST", "/v1/embeddings", {"model": "tiny", "input": ["river " * 90] * 5}, "input"),
        ("PUT", "/generate", {"sentences": ["river"] * 20, "tokens_to_generate": 20}, "sentences"),
        ("PUT", "/knn", {"sentences": ["river"] * 100, "neighbors": 900}, "neighbors"),
    ],
)  # fmt: skip
def test_what_would_be_too_much_is_refused_before_any_work(
    server: Server, monkeypatch: pytest.MonkeyPatch, method: str, path: str, body: dict[str, Any], param: str
) -> None:
    """Sizes that are each allowed, whose product is not."""
    monkeypatch.setattr(server.state, "limits", replace(server.state.limits, work_tokens=300))
    monkeypatch.setattr(Service, "embedder", property(lambda self: Letters()))
    for module, name in ((explain, "_explain"), (tokens, "embed_texts"), (nemo, "_search")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("it was begun"))
    monkeypatch.setattr(server.service.engine, "submit_all", lambda *_: pytest.fail("it was begun"))
    with server.client("read") as client:
        answer = client.request(method, path, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "too_much_work"
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("limit", "body", "param"),
    [
        ({"logprobs": 100}, {"logprobs": 20, "max_tokens": 8}, "logprobs"),
        ({"logprobs": 100}, {"logprobs": 0, "echo": True, "prompt": "amber " * 120}, "logprobs"),
        ({"sent_bytes": 1000}, {"n": 3, "retro": {"neighbors": ["amber " * 80]}}, "retro.neighbors"),
    ],
)
def test_an_answer_that_would_be_too_large_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch, limit: dict[str, int], body: dict[str, Any], param: str
) -> None:
    monkeypatch.setattr(server.state, "limits", replace(server.state.limits, **limit))
    with server.client("read") as client:
        answer = client.post("/v1/completions", json={**COMPLETE, **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_an_explanation_that_nobody_waits_for_ends(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = threading.Event(), threading.Event()

    def endless(*_: Any, check: Callable[[], None], **named: Any) -> None:
        begun.set()
        until(check, ended)

    monkeypatch.setattr(explain, "explain_text", endless)
    with server.client("read") as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/explain", json=EXPLAIN, timeout=0.3)
    assert begun.wait(10)
    assert ended.wait(10)


def test_nothing_is_encoded_on_the_event_loop(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, threads = server.service.tokenizer, set[str]()

    def noted(method: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            threads.add(threading.current_thread().name)
            return method(*arguments, **named)

        return call

    monkeypatch.setattr(Service, "embedder", property(lambda self: Letters()))
    monkeypatch.setattr(type(tokenizer), "encode_batch", noted(type(tokenizer).encode_batch))
    asked: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/v1/completions", {**COMPLETE, "n": 3, "retro": {"neighbors": ["amber", "granite"]}}),
        ("POST", "/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}),
        ("POST", "/v1/embeddings", {"model": Letters.name, "input": "river"}),
        ("POST", "/v1/explain", EXPLAIN),
        ("POST", "/v1/retrieve", {"query": "river"}),
        ("POST", "/tokenize", {"prompt": "river"}),
        ("PUT", "/generate", {"sentences": ["river"], "tokens_to_generate": 2}),
        ("PUT", "/knn", {"sentences": ["river"], "neighbors": 2}),
    ]
    with server.client("read") as client:
        for method, path, body in asked:
            assert client.request(method, path, json=body).status_code == 200, path
    assert threads
    assert all(name.startswith(("brief", "long", "engine", "retrieval")) for name in threads), threads


def test_one_key_does_not_hold_up_another(server: Server) -> None:
    """A key that fills what it may of queue and rows; the other is answered long before its work is done."""
    engine = server.service.engine
    hog = {**COMPLETE, "max_tokens": 1000, "min_tokens": 1000, "n": 16, "temperature": 1.0, "stream": True}
    with (
        server.client("read") as client,
        server.client("write") as other,
        client.stream("POST", "/v1/completions", json=hog) as first,
    ):
        assert first.status_code == 200
        answer = other.post("/v1/completions", json=COMPLETE)
        assert answer.status_code == 200
        assert engine.stats()["waiting"] >= 8  # the first are still at it
    deadline = time.monotonic() + 20
    while engine.stats()["running"] or engine.stats()["waiting"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
