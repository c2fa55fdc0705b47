"""Signing in and out over HTTP: cookies, throttling, the one-time link."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serve_helpers import PASSWORD, Server, serving_run

from retro_engine.serve.gate import COOKIE


@pytest.fixture(scope="module")
def site(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving_run(small_run, tmp_path_factory.mktemp("site")) as server:
        server.state.accounts.add_user("ada", PASSWORD, "write")
        yield server


@pytest.fixture
def client(site: Server) -> Iterator[httpx.Client]:
    site.state.throttle.forget_all()
    with site.client(None) as client:
        yield client


def login(client: httpx.Client, name: str = "ada", password: str = PASSWORD, **more: str) -> httpx.Response:
    return client.post("/auth/login", json={"name": name, "password": password, **more})


def test_a_session(client: httpx.Client) -> None:
    assert client.get("/auth/me").json() == {"user": None, "needs_setup": False}
    answer = login(client)
    assert answer.json() == {"user": {"name": "ada", "scope": "write", "kind": "user"}}
    cookie = answer.headers["set-cookie"]
    for part in ("HttpOnly", "SameSite=strict", "Path=/", "Max-Age=43200"):
        assert part in cookie
    assert PASSWORD not in cookie
    assert client.get("/v1/models").status_code == 200
    assert client.post("/v1/documents/reset", json={"confirm": True}).status_code == 403
    first = client.cookies[COOKIE]
    login(client)
    assert client.cookies[COOKIE] != first
    assert httpx.get(f"{client.base_url}/v1/models", cookies={COOKIE: first}, trust_env=False).status_code == 401
    second = client.cookies[COOKIE]
    assert client.post("/auth/logout").json() == {"user": None}
    assert client.get("/v1/models").status_code == 401
    assert httpx.get(f"{client.base_url}/v1/models", cookies={COOKIE: second}, trust_env=False).status_code == 401


def test_another_site_cannot_use_the_cookie(client: httpx.Client) -> None:
    login(client)
    for headers in ({"origin": "http://evil.example"}, {"origin": "null"}, {"host": "evil.example"}):
        answer = client.post("/v1/documents", json={"text": "planted"}, headers=headers)
        assert answer.status_code in (403, 421)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = client.post("/v1/documents", content=b'{"text": "planted"}', headers={"content-type": kind})
        assert answer.status_code == 415
    assert client.get("/v1/documents").json()["data"] == []


def test_a_key_that_is_wrong_is_not_saved_by_a_cookie_that_is_right(client: httpx.Client) -> None:
    login(client)
    assert client.get("/v1/models", headers={"authorization": "Bearer rk_wrong"}).status_code == 401


def test_guessing_is_throttled_before_any_hashing(
    client: httpx.Client, site: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses = [login(client, password=f"guess number {n}").status_code for n in range(12)]
    assert statuses == [401] * 10 + [429] * 2
    answer = login(client)
    assert answer.status_code == 429
    assert 0 < int(answer.headers["retry-after"]) <= 300
    called: list[str] = []
    monkeypatch.setattr(site.state.accounts, "sign_in", lambda *_: called.append("hashed"))
    assert login(client, name="somebody").status_code == 429  # the same client, another name
    assert called == []
    monkeypatch.undo()
    site.state.throttle.forget_all()
    assert login(client).status_code == 200


def test_tries_at_the_same_time_count_too(client: httpx.Client, site: Server) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda n: login(client, password=f"guess {n} ...").status_code, range(20)))
    assert answers.count(401) <= 10
    assert answers.count(429) >= 10


@pytest.mark.parametrize("cookie", ["", "x", f"{COOKIE}=", f"{COOKIE}=%00", f"{COOKIE}={'a' * 4000}", f'{COOKIE}="', "=;;;", f"{COOKIE}=' OR 1=1 --"])  # fmt: skip
def test_cookies_that_are_nonsense(client: httpx.Client, cookie: str) -> None:
    assert client.get("/v1/models", headers={"cookie": cookie}).status_code == 401
    assert client.post("/auth/logout", headers={"cookie": cookie}).status_code == 200


def test_a_large_body_is_refused_before_anybody_is_known(client: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    for raw in (b"[" + b"[]," * 300_000 + b"[]]", b'{"name": "ada", "password": "' + b"x" * 20_000 + b'"}'):
        assert client.post("/auth/login", content=raw, headers=headers).status_code == 413
    raw = b"[" + b"[]," * 5000 + b"[]]"
    assert client.post("/auth/login", content=raw, headers=headers).status_code == 400


def test_bodies_that_are_refused(client: httpx.Client, site: Server) -> None:
    for body in ({}, {"name": "ada"}, {"name": "ada", "password": ""}, {"name": ["ada"], "password": "x"}, {"name": "ada", "password": "x" * 2000}, {"name": "ada", "password": PASSWORD, "scope": "admin"}):  # fmt: skip
        assert client.post("/auth/login", json=body).status_code == 400, body
    assert login(client, setup="guess").status_code == 401
    assert site.state.accounts.users() == [("ada", "write")]


def test_the_set_up_link_over_http(small_run: Path, tmp_path: Path) -> None:
    with serving_run(small_run, tmp_path) as server:
        for row in server.state.accounts.list_keys():
            server.state.accounts.remove_key(row["id"])
        token = server.state.accounts.begin_setup()
        assert token is not None
        with server.client(None) as client:
            assert client.get("/auth/me").json()["needs_setup"]
            assert login(client, "eve", PASSWORD, setup=token + "x").status_code == 401
            assert login(client, "ada", "short", setup=token).status_code == 400
            assert login(client, "ada", PASSWORD, setup=token).json()["user"]["scope"] == "admin"
            assert login(client, "eve", PASSWORD, setup=token).status_code == 401
            assert client.get("/auth/me").json() == {
                "user": {"name": "ada", "scope": "admin", "kind": "user"},
                "needs_setup": False,
            }
        assert server.state.accounts.users() == [("ada", "admin")]


def test_the_cookie_is_secure_behind_a_proxy_with_tls(small_run: Path, tmp_path: Path) -> None:
    with serving_run(small_run, tmp_path, is_behind_proxy=True) as server, server.client(None) as client:
        server.state.accounts.add_user("ada", PASSWORD)
        headers = {"x-forwarded-proto": "https", "x-forwarded-for": "203.0.113.9"}
        answer = client.post("/auth/login", json={"name": "ada", "password": PASSWORD}, headers=headers)
        assert "Secure" in answer.headers["set-cookie"]
        log = server.state.accounts.path.with_name("audit.jsonl").read_text()
        assert "203.0.113.9" in log
