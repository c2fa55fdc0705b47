"""Ids of requests and their lines: what is in them, and what never is."""

import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_helpers import Server, serving_run

from retro_engine.errors import UsageError
from retro_engine.serve.request_log import SANE, RequestLog, request_id

SECRET = "quetzalcoatl"


@pytest.fixture(scope="module")
def logged(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving_run(small_run, tmp_path_factory.mktemp("log"), log="json") as server:
        yield server


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_a_line_has_who_asked_for_what_and_no_word_of_it(logged: Server, capfd: pytest.CaptureFixture[str]) -> None:
    with logged.client("write") as client:
        client.post("/v1/documents", json={"id": SECRET, "text": f"{SECRET} amber"}).raise_for_status()
        client.get(f"/v1/documents/{SECRET}?after={SECRET}")
        body = {"model": "tiny", "prompt": SECRET, "max_tokens": 3, "temperature": 0, "user": SECRET}
        whole = client.post("/v1/completions", json=body, headers={"x-request-id": "mine-1"})
        client.post("/v1/completions", json={**body, "stream": True})
        client.get(f"/{SECRET}")
    with logged.client(None) as client:
        client.get("/v1/models", headers={"authorization": f"Bearer {SECRET}"})
    said, deadline = "", time.monotonic() + 10
    while len(rows(said)) < 6 and time.monotonic() < deadline:  # a line comes after its answer
        time.sleep(0.01)
        said += capfd.readouterr().err
    assert SECRET not in said
    found = rows(said)
    assert [row["route"] for row in found] == [
        "/v1/documents", "/v1/documents/{id:path}", "/v1/completions", "/v1/completions", "other", "/v1/models",
    ]  # fmt: skip
    assert [row["status"] for row in found] == [200, 200, 200, 200, 404, 401]
    assert [row["caller"] for row in found] == ["key:write"] * 5 + [None]
    usage = whole.json()["usage"]
    for row in found[2:4]:
        assert (row["prompt_tokens"], row["completion_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert found[2]["id"] == whole.headers["x-request-id"] == "mine-1"
    assert all(row["event"] == "request" and row["client"] == "127.0.0.1" and row["seconds"] >= 0 for row in found)


@pytest.mark.parametrize(
    ("sent", "is_kept"),
    [("abc-1.2:3", True), ("a" * 128, True), ("a" * 129, False), ("", False), ("a b", False), ("é", False), ('a"b', False), ("a{}", False)],
)  # fmt: skip
def test_an_id_that_can_be_written_anywhere_is_kept(server: Server, sent: str, is_kept: bool) -> None:
    with server.client("read") as client:
        found = client.get("/v1/models", headers={"x-request-id": sent.encode()}).headers["x-request-id"]
    assert (found == sent) == is_kept
    assert SANE.fullmatch(found)
    assert request_id(sent) == sent or not is_kept


def test_every_answer_has_an_id(server: Server) -> None:
    seen = set()
    with server.client("read") as client, server.client(None) as nobody:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 1, "stream": True}
        for answer in (
            client.get("/"), client.get("/nothing"), nobody.get("/v1/models"), client.post("/v1/completions", json={}),
            client.get("/health", headers={"host": "evil.example"}), client.post("/v1/completions", json=body),
        ):  # fmt: skip
            seen.add(answer.headers["x-request-id"])
    assert len(seen) == 6
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n folded: x\r\n\r\n")
        assert b"x-request-id: req_" in raw.recv(4096).lower()


def test_a_bug_names_its_request(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(type(server.service.tokenizer), "encode", broken)
    with caplog.at_level(logging.ERROR), server.client("read") as client:
        answer = client.post("/tokenize", json={"prompt": "a"}, headers={"x-request-id": "bug-7"})
        end = time.monotonic() + 5  # the server's thread may say it after it has answered
        while not any("bug-7" in record.getMessage() for record in caplog.records):
            assert time.monotonic() < end, caplog.records
            time.sleep(0.01)
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "bug-7")


def test_lines_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    about = {"id": "a", "method": "GET", "route": "/", "status": 200, "caller": None}
    RequestLog("none").write(about)
    RequestLog("text").write(about)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("id=a method=GET route=/ status=200")
    with pytest.raises(UsageError, match="--log 'loud'"):
        RequestLog("loud")  # type: ignore[arg-type]
