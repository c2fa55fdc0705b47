"""Signing in and out over HTTP: cookies, throttling, the one-time link."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from serve_helpers import PASSWORD, Server, serving_run

from retro_engine.serve.accounts import Accounts
from retro_engine.serve.gate import COOKIE
from retro_engine.serve.sign_in import network_of


@pytest.fixture(scope="module")
def site(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving_run(small_run, tmp_path_factory.mktemp("site")) as server:
        server.state.accounts.add_user("ada", PASSWORD, "write")
        yield server


@pytest.fixture
def client(site: Server) -> Iterator[httpx.Client]:
    site.state.throttle.forget_all()
    site.state.names.forget_all()
    with site.client(None) as client:
        yield client


def session_cookie(client: httpx.Client) -> str:
    return f"{COOKIE}_{client.base_url.port}"


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
    first = client.cookies[session_cookie(client)]
    login(client)
    assert client.cookies[session_cookie(client)] != first
    assert (
        httpx.get(f"{client.base_url}/v1/models", cookies={session_cookie(client): first}, trust_env=False).status_code
        == 401
    )
    second = client.cookies[session_cookie(client)]
    assert client.post("/auth/logout").json() == {"user": None}
    assert client.get("/v1/models").status_code == 401
    assert (
        httpx.get(f"{client.base_url}/v1/models", cookies={session_cookie(client): second}, trust_env=False).status_code
        == 401
    )


def test_another_site_cannot_use_the_cookie(client: httpx.Client) -> None:
    login(client)
    for headers in ({"origin": "http://evil.example"}, {"origin": "null"}, {"host": "evil.example"}):
        answer = client.post("/v1/documents", json={"text": "planted"}, headers=headers)
        assert answer.status_code in (403, 421)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = client.post("/v1/documents", content=b'{"text": "planted"}', headers={"content-type": kind})
        assert answer.status_code == (403 if kind.startswith("multipart") else 415)
    form = {"files": {"file": ("a.txt", b"planted")}, "data": {"id": "a"}}
    assert client.post("/v1/documents", **form).status_code == 403
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
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda n: login(client, password=f"guess {n} ...").status_code, range(20)))
    assert answers.count(401) <= 10
    assert answers.count(429) >= 10


@pytest.mark.parametrize("cookie", ["", "x", f"{COOKIE}_PORT=", f"{COOKIE}_PORT=%00", f"{COOKIE}_PORT={'a' * 4000}", f'{COOKIE}_PORT="', "=;;;", f"{COOKIE}_PORT=' OR 1=1 --"])  # fmt: skip
def test_cookies_that_are_nonsense(client: httpx.Client, cookie: str) -> None:
    cookie = cookie.replace("PORT", str(client.base_url.port))
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


@pytest.fixture
def proxied(small_run: Path, tmp_path: Path) -> Iterator[Server]:
    with serving_run(small_run, tmp_path, is_behind_proxy=True) as server:
        server.state.accounts.add_user("ada", PASSWORD)
        yield server


def login_from(client: httpx.Client, address: str, name: str = "ada", password: str = PASSWORD) -> int:
    headers = {"x-forwarded-for": address}
    return client.post("/auth/login", json={"name": name, "password": password}, headers=headers).status_code


def test_who_guesses_at_a_name_does_not_lock_its_user_out(proxied: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxied.state.names, "count", 25)
    monkeypatch.setattr(proxied.state.accounts, "sign_in", quick(proxied.state.accounts))
    with proxied.client(None) as known, proxied.client(None) as attacker, proxied.client(None) as new:
        assert login_from(known, "198.51.100.1") == 200
        found = [login_from(attacker, "203.0.113.9", password=f"guess {n}") for n in range(12)]
        assert found == [401] * 10 + [429] * 2
        assert login_from(new, "198.51.100.2") == 200  # another address: the name is not shut
        new.cookies.clear()
        for number in range(30):  # from many addresses the name is, for browsers that nobody knows
            login_from(attacker, f"203.0.113.{number}", password="guess")
        assert login_from(new, "198.51.100.3") == 429
        assert login_from(known, "198.51.100.4") == 200
        assert login_from(known, "203.0.113.9") == 200  # behind the attacker's own address too
        assert [login_from(known, "198.51.100.1", password="guess") for _ in range(11)] == [401] * 10 + [429]


def quick(accounts: Accounts) -> Callable[[str, str], str | None]:
    """`sign_in` without the time that hashing takes."""
    return lambda name, password: accounts._new_token("sessions", name, 60) if password == PASSWORD else None


def test_an_account_of_ones_own_does_not_open_the_next_guesses(
    proxied: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxied.state.accounts.add_user("eve", PASSWORD)
    monkeypatch.setattr(proxied.state.accounts, "sign_in", quick(proxied.state.accounts))
    with proxied.client(None) as client:
        for _ in range(3):
            found = [login_from(client, "203.0.113.9", password=f"guess {n}") for n in range(4)]
            client.cookies.clear()
            mine = login_from(client, "203.0.113.9", "eve")
            client.cookies.clear()
    assert (found, mine) == ([401] * 2 + [429] * 2, 429)


def test_a_device_is_its_users_alone_and_ends_with_the_password(proxied: Server) -> None:
    accounts = proxied.state.accounts
    token = accounts.add_device("ada")
    assert token is not None
    assert accounts.device_of(token, "ada")
    assert accounts.device_of(token, "eve") is None
    assert accounts.device_of("", "ada") is None
    accounts.change_user("ada", PASSWORD + "2")
    assert accounts.device_of(token, "ada") is None
    assert accounts.add_device("nobody") is None


@pytest.mark.parametrize(
    ("client", "network"),
    [
        ("203.0.113.9", "203.0.113.9"), ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"), ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("::ffff:203.0.113.9", "203.0.113.9"), ("unknown", "unknown"),
    ],
)  # fmt: skip
def test_one_host_has_a_network_of_addresses(client: str, network: str) -> None:
    assert network_of(client) == network


def test_two_servers_on_one_host_keep_two_sessions(small_run: Path, site: Server, tmp_path: Path) -> None:
    """Browsers send the cookies of a host to all of its ports."""
    site.state.throttle.forget_all()
    with serving_run(small_run, tmp_path) as other, httpx.Client(trust_env=False, timeout=60) as browser:
        other.state.accounts.add_user("ada", PASSWORD)
        for server in (site, other):
            body = {"name": "ada", "password": PASSWORD}
            assert browser.post(f"{server.url}/auth/login", json=body).status_code == 200
        for server in (site, other):
            assert browser.get(f"{server.url}/v1/models").status_code == 200
        browser.post(f"{other.url}/auth/logout")
        assert browser.get(f"{other.url}/v1/models").status_code == 401
        assert browser.get(f"{site.url}/v1/models").status_code == 200


def test_many_sign_in_at_once(site: Server) -> None:
    """Sessions are read by the loop while threads write them."""
    site.state.throttle.forget_all()
    accounts = site.state.accounts
    token = accounts.sign_in("ada", PASSWORD)
    assert token is not None
    with ThreadPoolExecutor(16) as pool:
        made = [pool.submit(accounts._new_token, "sessions", "ada", 60) for _ in range(60)]
        read = [pool.submit(accounts.of_session, token) for _ in range(200)]
        assert all(future.result() for future in made)
        for future in read:
            future.result()  # 64 sessions of one user are kept: it may have gone, but nothing failed
