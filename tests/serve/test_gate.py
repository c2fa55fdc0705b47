"""The gate: every route is walked without credentials and with too small ones; hosts, origins, headers."""

import json
from typing import Any

import httpx
import pytest
from serve_helpers import Server
from starlette.routing import Route

from retro_engine.serve.accounts import SCOPES
from retro_engine.serve.app import NEMO_ROUTES, ROUTES
from retro_engine.serve.gate import OWN_CHECK, PUBLIC

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def routes(server: Server) -> list[Route]:
    return list(server.gate.routes)


def filled(path: str) -> str:
    return path.replace("{id:path}", "some/id").replace("{id:int}", "1")


def test_every_route_is_denied_without_credentials_unless_it_is_public(server: Server) -> None:
    denied = set()
    with server.client(None) as client:
        for route in routes(server):
            for method in METHODS:
                answer = client.request(method, filled(route.path))
                asked = ("GET" if method == "HEAD" else method, route.path)
                if asked in PUBLIC or asked == OWN_CHECK:
                    assert answer.status_code != 403, asked
                    continue
                assert answer.status_code == 401, (asked, answer.text)
                denied.add(asked)
            for wrong in ("Bearer", "Bearer rk_wrong", "Basic YTpi", server.keys["admin"]):
                if not any(path == route.path for _, path in [*PUBLIC, OWN_CHECK]):
                    answer = client.request("GET", filled(route.path), headers={"authorization": wrong})
                    assert answer.status_code == 401, (route.path, wrong)
    assert {(method, path) for method, path, _, _ in [*ROUTES, *NEMO_ROUTES]} <= denied
    assert len(denied) > 100


def test_paths_that_do_not_exist_say_nothing_without_credentials(server: Server) -> None:
    paths = ["/docs", "/openapi.json", "/redoc", "/admin", "/v1", "/v1/", "/%00", "/..%2f..%2fetc/passwd", "/app.js/", "/web/app.js", "/v1/documents/", "/V1/models"]  # fmt: skip
    with server.client(None) as client:
        for path in paths:
            assert client.get(path).status_code == 401, path
    with server.client("read") as client:
        assert client.get("/docs").status_code == 404
        assert client.get("/docs").json()["error"]["type"] == "not_found_error"
        assert client.put("/v1/models").status_code == 405
        assert client.get("/..%2f..%2fetc/passwd").status_code == 404


def test_each_scope_opens_what_it_should(server: Server) -> None:
    for method, path, _, needed in [*ROUTES, *NEMO_ROUTES]:
        for scope in SCOPES:
            with server.client(scope) as client:
                answer = client.request(method, filled(path), content=b"x", headers={"content-type": "text/plain"})
            may = SCOPES.index(scope) >= SCOPES.index(needed) and not path.startswith("/auth/")  # those take a session
            assert (answer.status_code == 403) == (not may), (method, path, scope, answer.text)
            if not may:
                assert answer.json()["error"]["type"] == "permission_error"


def test_the_public_list_is_the_design(server: Server) -> None:
    """The page's files, health, signing in and out: nothing else may slip in."""
    apart_from_files = {asked for asked in PUBLIC if not asked[1].endswith((".js", ".css", ".svg"))}
    assert apart_from_files == {
        ("GET", "/health"), ("GET", "/"), ("POST", "/auth/login"), ("POST", "/auth/logout"), ("GET", "/auth/me"),
    }  # fmt: skip
    with server.client(None) as client:
        for method, path in PUBLIC:
            if method == "GET":
                assert client.get(path).status_code == 200, path


@pytest.mark.parametrize(
    ("host", "is_known"),
    [
        ("127.0.0.1:1", True), ("localhost", True), ("LOCALHOST:80", True), ("[::1]:80", True), ("10.0.0.7", True),
        ("evil.example", False), ("evil.example:80", False), ("localhost.evil.example", False), ("", False),
        ("127.0.0.1.evil.example", False), ("127.0.0.1@evil.example", False), ("a:b:c", False), ("[::1", True),
    ],
)  # fmt: skip
def test_host(server: Server, host: str, is_known: bool) -> None:
    with server.client("read") as client:
        answer = client.get("/v1/models", headers={"host": host})
    assert answer.status_code == (200 if is_known else 421), answer.text
    with server.client(None) as client:
        assert client.get("/health", headers={"host": host}).status_code == (200 if is_known else 421)


@pytest.mark.parametrize(
    ("origin", "is_own"),
    [("", True), ("null", False), ("http://evil.example", False), ("http://127.0.0.1", False), ("HOST", True), ("https:HOST", True)],
)  # fmt: skip
def test_origin(server: Server, origin: str, is_own: bool) -> None:
    host = server.url.removeprefix("http://")
    scheme = "https" if origin.startswith("https:") else "http"
    headers = {"origin": origin if "HOST" not in origin else f"{scheme}://{host}"} if origin else {}
    with server.client("read") as client:
        answer = client.post("/tokenize", json={"prompt": "a"}, headers=headers)
    assert answer.status_code == (200 if is_own else 403)
    if not is_own:
        assert answer.json()["error"]["code"] == "origin"


def test_headers_are_on_every_answer(server: Server) -> None:
    with server.client("read") as client:
        answers = [
            client.get("/"), client.get("/v1/models"), client.get("/nothing"), client.get("/", headers={"host": "x.y"}),
            client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"}),
            httpx.get(f"{server.url}/v1/models", trust_env=False),
        ]  # fmt: skip
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "server" not in answer.headers
        assert answer.headers["cache-control"] in ("no-store", "no-cache")
        assert "access-control-allow-origin" not in answer.headers


def test_errors_have_the_form_that_the_official_client_reads(server: Server) -> None:
    with server.client("read") as client:
        for answer in (client.get("/nothing"), client.post("/v1/completions", json={}), client.delete("/v1/models")):
            body: dict[str, Any] = json.loads(answer.text)
            assert set(body) == {"error"}
            assert set(body["error"]) == {"message", "type", "param", "code"}


def test_metrics(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with server.client(None) as client:
        text = client.get("/metrics").text
        for name in (
            "retro_requests_total",
            "retro_request_seconds_bucket",
            "retro_engine_waiting",
            "retro_index_version",
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            "vllm:prefix_cache_queries_total",
            "vllm:prefix_cache_hits_total",
            "retro_neighbor_cache_queries_total",
            "retro_neighbor_cache_hits_total",
        ):
            assert name in text
        assert "rk_" not in text
        monkeypatch.setattr(server.state, "is_behind_proxy", True)
        assert client.get("/metrics").status_code == 401
        monkeypatch.setattr(server.state, "metrics_token", "m" * 20)
        for token, status in (("m" * 20, 200), ("m" * 19, 401), ("é", 401), ("x", 401)):
            answer = client.get("/metrics", headers={"authorization": f"Bearer {token}".encode()})
            assert answer.status_code == status


def test_times_are_under_the_names_that_dashboards_know(server: Server) -> None:
    def read() -> dict[str, float]:
        with server.client(None) as client:
            lines = client.get("/metrics").text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    before = read()
    body = {"model": "tiny", "prompt": "granite ember tide " * 4, "max_tokens": 8, "min_tokens": 8, "temperature": 1.0}
    with server.client("read") as client:
        for stream in (False, True):
            assert client.post("/v1/completions", json={**body, "n": 2, "stream": stream}).status_code == 200
    after = read()
    label = '{model_name="tiny"}'
    for name in (
        "time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time",
    ):  # fmt: skip
        count = f"vllm:{name}_seconds_count{label}"
        assert after[count] - before.get(count, 0) == 4, name
    parts = [after[f"vllm:{name}_seconds_sum{label}"] for name in ("request_queue_time", "request_prefill_time", "request_decode_time")]  # fmt: skip
    assert sum(parts) == pytest.approx(after[f"vllm:e2e_request_latency_seconds_sum{label}"])
    between = f"vllm:inter_token_latency_seconds_count{label}"
    assert after[between] - before.get(between, 0) > 4
    for name, count in (
        ("generation_tokens", 32),
        ("prompt_tokens", 2 * len(server.service.tokenizer.encode(body["prompt"]))),
    ):
        name = f"vllm:{name}_total{label}"
        assert after[name] - before.get(name, 0) == count
    ended = 'vllm:request_success_total{finished_reason="length",model_name="tiny"}'
    assert after[ended] - before.get(ended, 0) == 4
    assert after[f"vllm:prefix_cache_queries_total{label}"] > after[f"vllm:prefix_cache_hits_total{label}"] > 0
