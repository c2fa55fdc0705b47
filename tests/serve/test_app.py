"""The application as a whole: while it loads, and under bodies that nobody would send: never a 5xx."""

import asyncio
import copy
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from reliability.runs import CAMPAIGN, SEED, counted
from serve_helpers import Server, serving, serving_run, with_letters

from retro_engine.serve.accounts import Accounts
from retro_engine.serve.app import _load, make_app
from retro_engine.serve.bounds import Limits
from retro_engine.serve.service import Service, ServiceOptions, open_service
from retro_engine.serve.start import Address, make_state

EXAMPLES = 700 if CAMPAIGN else 12
BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/v1/completions"): {
        "model": "tiny", "prompt": "river", "max_tokens": 2, "n": 1, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"],
        "logprobs": 1, "echo": True, "stream": True, "stream_options": {"include_usage": True}, "min_tokens": 1, "top_k": 3,
        "retro": {"k": 1, "mode": "lexical", "refresh": "chunk", "retrieved_length": 4},
    },
    ("POST", "/v1/chat/completions"): {
        "model": "tiny", "messages": [{"role": "user", "content": "What?"}], "max_tokens": 2, "logprobs": True, "top_logprobs": 1,
        "retro": {"neighbors": ["amber"]},
    },
    ("POST", "/v1/responses"): {
        "model": "tiny", "input": [{"role": "user", "content": [{"type": "input_text", "text": "What?"}]}], "max_output_tokens": 2,
        "instructions": "a", "temperature": 0.5, "store": True, "text": {"format": {"type": "text"}}, "metadata": {"a": "b"},
    },
    ("POST", "/v1/messages"): {
        "model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}]}], "max_tokens": 2, "system": "a",
        "stop_sequences": ["x"], "tools": [{"name": "a", "input_schema": {"type": "object"}}], "tool_choice": {"type": "auto"},
    },
    ("POST", "/v1/rerank"): {"query": "river", "documents": ["a", {"text": "b"}], "top_n": 1},
    ("POST", "/v1/vector_stores/default/search"): {"query": ["river"], "max_num_results": 2},
    ("POST", "/v1/embeddings"): {"model": "tiny", "input": ["river"], "encoding_format": "float"},
    ("POST", "/tokenize"): {"prompt": "river"},
    ("POST", "/detokenize"): {"tokens": [40, 41]},
    ("POST", "/v1/retrieve"): {"query": "river", "k": 2, "mode": "hybrid", "weights": [1.0, 2.0]},
    ("POST", "/v1/explain"): {"prompt": "river", "text": " stone", "neighbors": ["amber"]},
    ("POST", "/v1/documents"): {"documents": [{"id": "a", "title": "A", "text": "amber"}]},
    ("POST", "/v1/documents/reset"): {"confirm": True},
    ("POST", "/auth/login"): {"name": "ada", "password": "correct horse battery", "setup": "x"},
    ("PUT", "/generate"): {"sentences": ["river"], "tokens_to_generate": 2, "greedy": False, "top_k": 2, "end_strings": ["x"], "neighbors": 1},
    ("PUT", "/knn"): {"sentences": ["river"], "neighbors": 1},
}  # fmt: skip
TEXT = st.text(max_size=20) | st.sampled_from(
    ["", " ", "\0", "a\0b", "\u2028", "é" * 300, "../../etc/passwd", "http://127.0.0.1/", "' OR 1=1"]
)
ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def small(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = Limits(new_tokens=6, prompt_tokens=300, choices=4)
    with with_letters(), serving_run(small_run, tmp_path_factory.mktemp("app"), limits, has_nemo=True) as server:
        yield server


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a body that can hold something else."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in pairs for place in places(part, (*path, key)))]


def replaced(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    body = copy.deepcopy(body)
    inner = body
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return body


@pytest.mark.parametrize(("method", "path"), BODIES, ids=lambda part: str(part).strip("/"))
def test_no_body_is_a_5xx(small: Server, method: str, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    whole = BODIES[method, path]
    told = []

    @seed(SEED)
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(places(whole)), ANY, st.booleans())
    def run(place: tuple[Any, ...], value: Any, is_added: bool) -> None:
        body = {**whole, "extra": value} if is_added and not place else replaced(whole, place, value)
        small.state.throttle.forget_all()
        answer = client.request(method, path, content=json.dumps(body), headers={"content-type": "application/json"})
        assert answer.status_code < 500, (body, answer.text)
        told.append(answer.status_code >= 400)
        if told[-1]:
            assert set(json.loads(answer.text)["error"]) == {"message", "type", "param", "code"}

    with small.client("admin") as client:
        answer = client.request(method, path, json=whole)
        assert answer.status_code == (401 if path == "/auth/login" else 200), answer.text
        run()
    with capsys.disabled():
        if CAMPAIGN:
            print(counted(f"hostile requests, {method} {path}: {len(told)}, {sum(told)} refused, none a 5xx"))


@given(path=st.text(st.characters(codec="utf-8", exclude_characters="?#\0"), min_size=1, max_size=30))
@settings(max_examples=EXAMPLES * 4, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_path_is_a_5xx(small: Server, path: str) -> None:
    from urllib.parse import quote

    with small.client("admin") as client:
        for prefix in ("/", "/v1/documents/", "/v1/models/", "/v1/jobs/"):
            for method in ("GET", "DELETE"):
                assert client.request(method, f"{prefix}{quote(path, safe='')}").status_code < 500


def test_while_the_model_loads(small: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    service = small.service
    with small.client("admin") as client:
        assert client.get("/health").json() == {"status": "ok"}
        small.state.service = None
        try:
            assert client.get("/health").status_code == 503
            answer = client.post("/v1/completions", json=BODIES["POST", "/v1/completions"])
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "2"
            assert client.get("/auth/me").status_code == 200
            assert client.get("/metrics").status_code == 200
        finally:
            small.state.service = service


def test_nobody_is_answered_before_it_is_warm(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the first tokens are generated 503 says why; whoever ends it then does not wait for more."""
    begun, goes_on, warm_up = threading.Event(), threading.Event(), Service.warm_up

    def slowly(service: Service) -> None:
        begun.set()
        assert goes_on.wait(30)
        warm_up(service)

    monkeypatch.setattr(Service, "warm_up", slowly)
    asked: list[httpx.Response] = []

    def ask(url: str) -> None:
        assert begun.wait(30)
        asked.append(httpx.get(f"{url}/health", trust_env=False))
        goes_on.set()

    options = ServiceOptions(run=str(small_run), library=str(tmp_path / "library"))
    with serving(lambda: open_service(options), tmp_path, beside=ask) as server:
        assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200
        stats = server.service.engine.stats()
    assert asked[0].status_code == 503
    assert "warming up" in asked[0].json()["why"]
    assert (stats["prefix_bytes"], stats["neighbors_encoded"], stats["running"]) == (0, 0, 0), "it counts as no request"


def test_ready_is_said_once_requests_are_answered(small: Server, tmp_path: Path) -> None:
    """Who waits for the line gets no 503; what the process settles is done before."""
    service, said = small.service, list[str]()
    state = make_state(Accounts(tmp_path / "accounts.sqlite"), Limits(), Address())

    def settled() -> None:
        said.append("settled" if state.service is None else "settled late")

    def ready(_: Service) -> None:
        said.append("ready" if state.service is service else "ready early")

    async def warm(_: Service, settle: Callable[[], None]) -> None:
        settle()

    async def begins() -> None:
        await _load(state, lambda: service, None, settled, ready, warm)

    asyncio.run(begins())
    assert said == ["settled", "ready"]


def test_a_server_that_ends_while_it_loads_is_not_warmed(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []
    close = Service.close
    monkeypatch.setattr(Service, "warm_up", lambda service: pytest.fail("nobody will ask"))
    monkeypatch.setattr(Service, "close", lambda service: (close(service), closed.append(True)))
    options = ServiceOptions(run=str(small_run), library=str(tmp_path / "library"))

    async def ends() -> None:
        state = make_state(Accounts(tmp_path / "accounts.sqlite"), Limits(), Address())

        def load() -> Service:
            opened.set()
            assert leaves.wait(30)
            return open_service(options)

        app = make_app(state, load)
        opened, leaves = threading.Event(), threading.Event()
        context = app.app.router.lifespan_context(app.app)
        await context.__aenter__()
        await asyncio.to_thread(opened.wait, 30)
        asyncio.get_running_loop().call_later(0.1, leaves.set)
        await context.__aexit__(None, None, None)

    asyncio.run(ends())
    assert closed == [True]


def test_a_bug_says_nothing_of_itself(
    small: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("the secret is 42")

    monkeypatch.setattr(small.service.library, "entries", broken)
    with small.client("admin") as client:
        answer = client.get("/v1/documents")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"
    assert "nosniff" in answer.headers["x-content-type-options"]
