"""Users and keys over HTTP: an admin who is signed in manages them, a key does not, and nobody shuts himself out."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_helpers import PASSWORD, Server, serving_run


@pytest.fixture(scope="module")
def managed(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving_run(small_run, tmp_path_factory.mktemp("managed")) as server:
        server.state.accounts.add_user("ada", PASSWORD, "admin")
        server.state.accounts.add_user("writer", PASSWORD, "write")
        yield server


@contextlib.contextmanager
def signed_in(server: Server, name: str, password: str = PASSWORD) -> Iterator[httpx.Client]:
    with server.client(None) as client:
        assert client.post("/auth/login", json={"name": name, "password": password}).status_code == 200
        yield client


def code(answer: Any) -> tuple[int, str | None]:
    return answer.status_code, answer.json()["error"]["code"]


def test_keys_are_made_used_and_removed(managed: Server) -> None:
    with signed_in(managed, "ada") as admin, managed.client(None) as nobody:
        made = admin.post("/auth/keys", json={"name": "ci", "scope": "read", "days": 1}).json()
        assert (made["name"], made["scope"]) == ("ci", "read")
        headers = {"authorization": f"Bearer {made['key']}"}
        assert nobody.get("/v1/models", headers=headers).status_code == 200
        assert nobody.post("/v1/documents", json={"text": "a"}, headers=headers).status_code == 403
        (listed,) = [one for one in admin.get("/auth/keys").json()["data"] if one["name"] == "ci"]
        assert set(listed) == {"id", "name", "scope", "expires"} and made["key"] not in str(listed)
        assert admin.delete(f"/auth/keys/{listed['id']}").json()["deleted"]
        assert nobody.get("/v1/models", headers=headers).status_code == 401
        assert code(admin.delete(f"/auth/keys/{listed['id']}")) == (404, "key_not_found")


def test_users_are_made_changed_and_removed(managed: Server) -> None:
    with signed_in(managed, "ada") as admin:
        assert admin.post("/auth/users", json={"name": "bo", "password": PASSWORD}).json() == {
            "name": "bo",
            "scope": "read",
        }
        assert {"name": "bo", "scope": "read"} in admin.get("/auth/users").json()["data"]
        assert admin.post("/auth/users", json={"name": "bo", "password": PASSWORD}).status_code == 400, "it is taken"
        with signed_in(managed, "bo") as reader:
            other = "another long password"
            assert admin.post("/auth/users/bo", json={"password": other, "scope": "write"}).json()["scope"] == "write"
            assert reader.get("/v1/models").status_code == 401, "his session has ended"
        with signed_in(managed, "bo", other) as writer:
            assert admin.delete("/auth/users/bo").json()["deleted"]
            assert writer.get("/v1/models").status_code == 401
        for gone in (admin.delete("/auth/users/bo"), admin.post("/auth/users/bo", json={"password": PASSWORD})):
            assert code(gone) == (404, "user_not_found")
        log = (managed.state.accounts.path.with_name("audit.jsonl")).read_text()
        assert '"users.remove"' in log and '"users.change"' in log and PASSWORD not in log and other not in log


def test_nobody_shuts_himself_out_and_no_key_manages(managed: Server) -> None:
    with signed_in(managed, "ada") as admin:
        assert code(admin.delete("/auth/users/ada")) == (400, "own_access")
        assert code(admin.post("/auth/users/ada", json={"password": PASSWORD, "scope": "read"})) == (400, "own_access")
    with managed.client("admin") as key, signed_in(managed, "writer") as writer:
        for client, why in ((key, "session"), (writer, "scope")):
            assert code(client.get("/auth/users")) == code(client.get("/auth/keys")) == (403, why)
            assert code(client.post("/auth/keys", json={"name": "x", "scope": "admin"})) == (403, why)
            assert code(client.post("/auth/users", json={"name": "x", "password": PASSWORD})) == (403, why)
            assert code(client.delete("/auth/users/writer")) == (403, why)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/auth/users", {"name": "a b", "password": PASSWORD}, None), ("/auth/users", {"name": "x", "password": "short"}, None),
        ("/auth/users", {"name": "x", "password": PASSWORD, "scope": "owner"}, "scope"), ("/auth/users", {"name": "x"}, "password"),
        ("/auth/keys", {"name": "x", "days": 0}, "days"), ("/auth/keys", {"name": "", "scope": "read"}, None), ("/auth/keys", {"name": "x", "key": "y"}, "key"),
    ],
)  # fmt: skip
def test_what_is_refused(managed: Server, path: str, body: dict[str, Any], param: str | None) -> None:
    token = managed.state.accounts.sign_in("ada", PASSWORD)
    cookie = {"cookie": f"retro_session_{managed.port}={token}"}
    with managed.client(None) as client:
        answer = client.post(path, json=body, headers=cookie)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
        foreign = client.post(path, json=body, headers={**cookie, "origin": "http://evil.example"})
        assert code(foreign) == (403, "origin")
