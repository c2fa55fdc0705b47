"""Pages of other origins, and a path before every address."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serve_helpers import PASSWORD, Server, serving_run

from retro_engine.errors import UsageError
from retro_engine.serve.origins import check_origins, check_root_path

PAGE, OTHER = "https://chat.example.org", "https://evil.example"
ASK = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, x-stainless-os"}


@pytest.fixture(scope="module")
def open_to(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that one page elsewhere may ask, behind a proxy's path."""
    folder = tmp_path_factory.mktemp("origins")
    with serving_run(small_run, folder, allowed_origins=[PAGE], root_path="/retro") as server:
        yield server


def test_an_allowed_page_asks_with_a_key(open_to: Server) -> None:
    with open_to.client("read") as client:
        answer = client.post("/tokenize", json={"prompt": "a"}, headers={"origin": PAGE})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answer.headers
        assert "origin" in answer.headers["vary"].lower()
        wrong = client.post("/tokenize", json={}, headers={"origin": PAGE})
        assert (wrong.status_code, wrong.headers["access-control-allow-origin"]) == (400, PAGE), "it can read why"
    with open_to.client(None) as client:
        denied = client.get("/v1/models", headers={"origin": PAGE})
        assert (denied.status_code, denied.headers["access-control-allow-origin"]) == (401, PAGE)


@pytest.mark.parametrize(
    "origin", [OTHER, "null", "http://chat.example.org", "https://chat.example.org:444", "https://chat.example.org.evil.example", "https://CHAT.example.org"]
)  # fmt: skip
def test_other_pages_are_refused(open_to: Server, origin: str) -> None:
    with open_to.client("read") as client:
        answer = client.get("/v1/models", headers={"origin": origin})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin")
        assert "access-control-allow-origin" not in answer.headers
        before = client.options("/v1/models", headers={"origin": origin, **ASK})
        assert before.status_code == 403
        assert "access-control-allow-origin" not in before.headers


def test_a_browser_asks_before(open_to: Server, server: Server) -> None:
    with open_to.client(None) as client:
        for path in ("/v1/chat/completions", "/retro/v1/chat/completions"):
            answer = client.options(path, headers={"origin": PAGE, **ASK})
            assert (answer.status_code, answer.content) == (204, b"")
            assert answer.headers["access-control-allow-origin"] == PAGE
            assert "POST" in answer.headers["access-control-allow-methods"]
            assert answer.headers["access-control-allow-headers"] == ASK["access-control-request-headers"]
        assert client.options("/v1/models", headers={"origin": PAGE}).status_code == 401, "that is no preflight"
        bad = {"origin": PAGE, **ASK, "access-control-request-headers": "a: b"}
        assert "access-control-allow-headers" not in client.options("/v1/models", headers=bad).headers
        evil = {"origin": PAGE, **ASK, "host": "evil.example"}
        assert client.options("/v1/models", headers=evil).status_code == 421
    with server.client(None) as client:
        assert client.options("/v1/models", headers={"origin": PAGE, **ASK}).status_code == 403, "nobody is by default"


def test_an_allowed_page_does_not_get_the_readers_session(open_to: Server) -> None:
    open_to.state.accounts.add_user("ada", PASSWORD)
    with open_to.client(None) as client:
        client.post("/auth/login", json={"name": "ada", "password": PASSWORD}).raise_for_status()
        assert client.get("/retro/v1/models").status_code == 200
        assert client.get("/retro/v1/models", headers={"origin": PAGE}).status_code == 401


def test_a_path_before_every_address(open_to: Server) -> None:
    """Whether the proxy takes it off or not."""
    for prefix in ("", "/retro"):
        with open_to.client("read") as client:
            assert client.get(f"{prefix}/v1/models").status_code == 200
            assert client.get(f"{prefix}/").status_code == 200
            assert client.get(f"{prefix}/v1/documents/some%2Fid").json()["error"]["code"] == "document_not_found"
        with open_to.client(None) as client:
            assert client.get(f"{prefix}/health").status_code == 200
            assert client.get(f"{prefix}/v1/models").status_code == 401
    with open_to.client(None, follow_redirects=False) as client:
        answer = client.get("/retro")
        assert (answer.status_code, answer.headers["location"]) == (307, "/retro/")
        for path in ("/retro/retro/v1/models", "/retrograde/v1/models", "/other/health"):
            assert client.get(path).status_code == 401
        login = client.post("/retro/auth/login", json={"name": "ada", "password": PASSWORD})
        assert all("Path=/retro;" in cookie for cookie in login.headers.get_list("set-cookie"))


@pytest.mark.parametrize("origin", ["*", "null", "chat.example.org", "https://", "https://a.b/", "https://a.b/c", "HTTPS://a.b", "https://a.b,https://c.d", "https://u@a.b", ""])  # fmt: skip
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(UsageError, match="--allow-origin"):
        check_origins([origin])


@pytest.mark.parametrize(
    "path", ["retro", "/", "/retro/", "//retro", "/a//b", "/a b", "/a?b", "/../a", "/a/.", "http://a"]
)
def test_what_is_no_root_path(path: str) -> None:
    with pytest.raises(UsageError, match="--root-path"):
        check_root_path(path)


def test_what_is() -> None:
    good = [
        "https://a.example",
        "http://localhost:3000",
        "app://obsidian.md",
        "http://[::1]:8080",
        "chrome-extension://abc",
    ]
    assert check_origins(good) == frozenset(good)
    assert [check_root_path(path) for path in ("", "/retro", "/a/b-c_d.e")] == ["", "/retro", "/a/b-c_d.e"]


def test_the_ids_of_addresses_do_not_leak_between_hosts(open_to: Server) -> None:
    answer = httpx.get(f"{open_to.url}/retro/health", headers={"host": "evil.example"}, trust_env=False)
    assert answer.status_code == 421
