"""Clients that are slow, half open, idle or gone, and requests that are not HTTP: raw sockets against short limits."""

import contextlib
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serve_helpers import Server, serving_run

from retro_engine.errors import UsageError
from retro_engine.serve.bounds import Limits
from retro_engine.serve.connection import bind

CAMPAIGN = bool(os.environ.get("RETRO_CAMPAIGN"))
WAIT_S = 1.0  # every limit of the server below
SHORT = Limits(header_s=WAIT_S, progress_s=WAIT_S, idle_s=WAIT_S, request_s=6.0, shutdown_s=2.0, connections=300)


@pytest.fixture(scope="module")
def short(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving_run(small_run, tmp_path_factory.mktemp("short"), SHORT) as server:
        yield server


def head(server: Server, method: str = "POST", path: str = "/v1/completions", **headers: object) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", f"authorization: Bearer {server.keys['read']}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def ask(max_tokens: int = 4, **fields: object) -> bytes:
    body = {"model": "tiny", "prompt": "river", "max_tokens": max_tokens, "temperature": 1, "seed": 3, **fields}
    return json.dumps(body).encode()


@contextlib.contextmanager
def connected(server: Server, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    client = socket.socket()
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(20)
    client.connect(("127.0.0.1", server.port))
    with client:
        yield client


def read_all(client: socket.socket) -> bytes:
    """Everything until the server closes."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def is_alive(server: Server) -> None:
    with server.client("read") as client:
        assert client.get("/v1/models").status_code == 200


def waits_for_an_idle_engine(server: Server, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while any(server.service.engine.stats()[name] for name in ("running", "waiting")):
        assert time.monotonic() < deadline, server.service.engine.stats()
        time.sleep(0.02)


def flood(client: socket.socket) -> None:
    for _ in range(200):
        client.sendall(b"x" * 65536)


JSON = {"content_type": "application/json"}


@pytest.mark.parametrize("sent", ["nothing", "half headers", "dripping headers", "half a body", "after an answer", "half a second request"])  # fmt: skip
def test_a_client_that_stops_is_let_go(short: Server, sent: str) -> None:
    with connected(short) as client:
        start = time.monotonic()
        if sent == "half headers":
            client.sendall(head(short)[:40])
        elif sent == "dripping headers":
            with contextlib.suppress(ConnectionError):
                for byte in head(short, a="b" * 200):
                    client.sendall(bytes([byte]))
                    time.sleep(0.05)
                    assert time.monotonic() - start < WAIT_S + 3
        elif sent == "half a body":
            client.sendall(head(short, content_length=1000, **JSON) + b'{"model"')
        elif sent in ("after an answer", "half a second request"):
            client.sendall(head(short, "GET", "/v1/models"))
            assert b"200 OK" in client.recv(65536)
            start = time.monotonic()
            if sent == "half a second request":
                client.sendall(head(short)[:40])
        answer = read_all(client)
        assert time.monotonic() - start < WAIT_S + 3
        if sent == "half a body":
            assert b" 408 " in answer
    is_alive(short)


def test_a_body_that_drips_is_ended_by_the_time_of_a_request(short: Server) -> None:
    with connected(short) as client:
        client.sendall(head(short, content_length=1000, **JSON))
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - start < 15:
                client.sendall(b" ")
                time.sleep(0.2)
        assert time.monotonic() - start < SHORT.request_s + 4


def test_a_body_that_drips_after_the_answer_is_ended(short: Server) -> None:
    with connected(short) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n")
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - start < 15:
                client.sendall(b" ")
                time.sleep(0.2)
        assert time.monotonic() - start < WAIT_S + 4


def test_a_client_that_vanishes_in_a_stream_frees_the_engine(short: Server) -> None:
    for linger in (False, True):
        with connected(short) as client:
            body = ask(1500, stream=True)
            client.sendall(head(short, content_length=len(body), **JSON) + body)
            assert b"data: " in client.recv(65536) + client.recv(65536)
            if linger:  # a reset instead of an end
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        waits_for_an_idle_engine(short)


def test_a_client_that_does_not_read_is_cut_and_others_are_served(short: Server) -> None:
    """Its answer is larger than what the sockets hold; the connection is gone soon after nothing is taken."""
    texts = [f"amber {number} " * 500 for number in range(100)]
    with short.client("admin") as client:
        rows = [{"id": f"r{number}", "text": text} for number, text in enumerate(texts)]
        client.post("/v1/documents", json={"documents": rows}).raise_for_status()
        body = json.dumps({"query": "amber", "k": 1000}).encode()
        with connected(short, receive_buffer=4096) as stalled:
            for _ in range(40):  # pipelined
                stalled.sendall(head(short, path="/v1/retrieve", content_length=len(body), **JSON) + body)
            assert client.get("/v1/models").status_code == 200
            time.sleep(WAIT_S + 2)
            stalled.settimeout(3)  # a connection that is still open takes nothing, and this is a TimeoutError
            with pytest.raises(ConnectionError):
                flood(stalled)
        client.post("/v1/documents/reset", json={"confirm": True}).raise_for_status()


def test_a_client_that_asks_and_hangs_up_its_side_gets_no_work_done_for_it(short: Server) -> None:
    with connected(short) as client:
        body = ask(1500)
        client.sendall(head(short, content_length=len(body), **JSON) + body)
        time.sleep(0.2)
        client.shutdown(socket.SHUT_WR)
        read_all(client)
    waits_for_an_idle_engine(short)


@pytest.mark.parametrize(
    "raw",
    [
        b"\r\n\r\n", b"\0" * 100, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * (20 << 10) + b"\r\n\r\n",
        b"GET /" + b"a" * (20 << 10) + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"POST /auth/login HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
        b"POST /auth/login HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"POST /auth/login HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
        b"POST /auth/login HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx : y\r\n\r\n", b"GET http://evil.example/ HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: localhost\r\n\r\n", b"GET /%ff%00 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    ],
)  # fmt: skip
def test_what_is_not_a_request_is_no_5xx(short: Server, raw: bytes) -> None:
    with connected(short) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(raw)
        answer = read_all(client)
    assert not answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 2")), answer[:200]
    is_alive(short)


def test_hostile_connections_do_not_starve_the_others(short: Server) -> None:
    """Many half-open connections at once; meanwhile every good request is answered, and at last all are closed."""
    count = 2000 if CAMPAIGN else 200
    rng = random.Random(0)
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(min(count, 250)):
            client = stack.enter_context(connected(short))
            whole = head(short, content_length=500, **JSON) + ask()
            with contextlib.suppress(ConnectionError):
                client.sendall(whole[: rng.randrange(len(whole))])
            clients.append(client)
        with short.client("read") as good:
            for _ in range(20):
                assert good.get("/v1/models").status_code == 200
        deadline = time.monotonic() + WAIT_S + 8
        for client in clients:
            client.settimeout(max(0.1, deadline - time.monotonic()))
            read_all(client)


def test_too_many_connections_are_told(small_run: Path, tmp_path: Path) -> None:
    with serving_run(small_run, tmp_path, Limits(connections=5)) as server, contextlib.ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(connected(server))
        time.sleep(0.2)
        with server.client("read") as client:
            assert client.get("/v1/models").status_code == 503


def test_stopping_is_quick_with_half_a_body_waiting(small_run: Path, tmp_path: Path) -> None:
    limits = Limits(shutdown_s=1)
    with contextlib.ExitStack() as stack:
        with serving_run(small_run, tmp_path, limits) as server:
            client = stack.enter_context(connected(server))
            client.sendall(head(server, content_length=1000, **JSON) + b"{")
            stream = stack.enter_context(connected(server))
            body = ask(1500, stream=True)
            stream.sendall(head(server, content_length=len(body), **JSON) + body)
            stream.recv(100)
            start = time.monotonic()
        assert time.monotonic() - start < 8


def test_many_requests_on_one_connection_and_pipelined(short: Server) -> None:
    with connected(short) as client:
        client.sendall(head(short, "GET", "/health") * 20)
        seen = b""
        while seen.count(b"HTTP/1.1 200 OK") < 20:
            seen += client.recv(65536)


def test_parallel_streams_all_end_as_they_should(short: Server) -> None:
    """16 at once, some of which vanish: the others get what they get alone."""

    def run(number: int) -> str:
        with short.client("read") as client:
            body = json.loads(ask(12, stream=True, seed=number, temperature=1))
            with client.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.status_code == 200
                text = ""
                for count, line in enumerate(answer.iter_lines()):
                    if number % 4 == 3 and count > 2:
                        return ""
                    if line.startswith("data: {"):
                        text += json.loads(line[6:])["choices"][0]["text"]
                return text

    alone = [run(number) for number in range(8)]
    together: dict[int, str] = {}
    threads = [threading.Thread(target=lambda n=n: together.__setitem__(n, run(n % 8))) for n in range(16)]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {n: text for n, text in together.items()} == {n: alone[n % 8] for n in range(16)}
    waits_for_an_idle_engine(short)


def test_an_address_that_cannot_be_listened_on() -> None:
    with contextlib.closing(bind("127.0.0.1", 0)) as taken:
        for host, port in (
            ("127.0.0.1", taken.getsockname()[1]),
            ("192.0.2.1", 0),
            ("no such host", 0),
            ("127.0.0.1", 70000),
        ):
            with pytest.raises(UsageError, match="cannot be listened on"):
                bind(host, port)


def test_the_client_sees_a_504_when_an_answer_takes_too_long(short: Server) -> None:
    with short.client("read") as client:
        start = time.monotonic()
        with contextlib.suppress(httpx.HTTPError):
            answer = client.post("/v1/completions", content=ask(2000, min_tokens=1900), headers={"content-type": "application/json"})  # fmt: skip
            assert answer.status_code in (200, 504)
        assert time.monotonic() - start < SHORT.request_s + 5
    waits_for_an_idle_engine(short)


def test_small_answers_are_not_held_back(short: Server) -> None:
    """Head and body are two writes: with Nagle's algorithm the second waits 40 ms for a delayed acknowledgement."""
    with connected(short) as client:
        times = []
        for _ in range(12):
            start = time.perf_counter()
            client.sendall(head(short, "GET", "/health"))
            seen = b""
            while b'"ok"' not in seen:
                seen += client.recv(65536)
            times.append(time.perf_counter() - start)
    assert sorted(times)[4] < 0.03, times


def sent(server: Server, raw: bytes) -> bytes:
    with connected(server) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(raw)
        return read_all(client)


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * (20 << 10) + b"\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"".join(b"x%d: %s\r\n" % (n, b"a" * 900) for n in range(20)) + b"\r\n", 431),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * (20 << 10), 431),
        (b"GET /" + b"a" * (20 << 10) + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", 414),
        (b"GET /health?" + b"a" * (9 << 10) + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", 414),
        (b"GET /" + b"a" * (60 << 10), 414),
    ],
)  # fmt: skip
def test_heads_that_are_too_large(short: Server, raw: bytes, status: int) -> None:
    answer = sent(short, raw)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


LOGIN = b"POST /auth/login HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize(
    "raw",
    [
        LOGIN + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        LOGIN + b"transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n0\r\n\r\n",
        LOGIN + b"content-length: 2\r\ncontent-length: 2\r\n\r\n{}", LOGIN + b"content-length: 2, 2\r\n\r\n{}",
        LOGIN + b"content-length: 2\r\nContent-Length: 2\r\n\r\n{}",
        LOGIN + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        LOGIN + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", LOGIN + b"transfer-encoding: identity\r\n\r\n",
        LOGIN + b"x: a\r\n b\r\ncontent-length: 2\r\n\r\n{}", LOGIN + b"x: a\r\n\tb\r\ncontent-length: 2\r\n\r\n{}",
        LOGIN + b"x: a\rb\r\ncontent-length: 2\r\n\r\n{}", LOGIN + b"x: a\r\rcontent-length: 2\r\n\r\n{}",
        LOGIN + b"content-length : 2\r\n\r\n{}", LOGIN + b"content-length: +2\r\n\r\n{}", LOGIN + b"content-length: 0x2\r\n\r\n{}",
        LOGIN + b"content-length: " + b"1" * 5000 + b"\r\n\r\n{}",
    ],
)  # fmt: skip
def test_heads_that_a_proxy_may_read_differently(short: Server, raw: bytes) -> None:
    assert sent(short, raw).startswith(b"HTTP/1.1 400 "), raw


def test_a_second_request_on_a_connection_is_looked_at_too(short: Server) -> None:
    first = head(short, "GET", "/health")
    for second, status in (
        (LOGIN + b"content-length: 2\r\ncontent-length: 2\r\n\r\n{}", 400),
        (b"GET /" + b"a" * 9000, 414),
    ):
        answer = sent(short, first + second)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert b"HTTP/1.1 %d " % status in answer
    body = ask(2)
    answer = sent(short, head(short, content_length=len(body), connection="close", **JSON) + body)
    assert answer.startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("is_told_again", [False, True])
def test_a_stop_says_what_it_waits_for_and_ends_streams_as_answers_end(
    small_run: Path, tmp_path: Path, is_told_again: bool
) -> None:
    limits = Limits(shutdown_s=60 if is_told_again else 0.5)
    with serving_run(small_run, tmp_path, limits) as server:
        body = {"model": "tiny", "prompt": "river", "max_tokens": 1900, "min_tokens": 1900, "temperature": 1.0}
        with (
            server.client("read") as client,
            client.stream("POST", "/v1/completions", json={**body, "stream": True}) as out,
        ):
            lines = out.iter_lines()
            next(lines)
            server.process.handle_exit(signal.SIGINT, None)
            if is_told_again:
                server.process.handle_exit(signal.SIGINT, None)
            start = time.monotonic()
            *_, error, _, done = [line for line in lines][:-1]
        assert json.loads(error.removeprefix("data: "))["error"]["message"] == "the server is stopping"
        assert done == "data: [DONE]"
        assert time.monotonic() - start < 20
        assert "waiting for an answer" in server.said[0]
        assert len(server.said) == 2
