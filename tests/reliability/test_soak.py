"""Many requests, of which some are cancelled and some read slowly, over restarts: descriptors, threads and memory stay as they are.

A few here; 10,000 requests with RETRO_CAMPAIGN=1, which prints what is counted.
"""

import contextlib
import gc
import json
import os
import random
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
from reliability.runs import CAMPAIGN, SEED, counted
from serve_helpers import Server, serving_run

from retro_engine.bench.machine import resident_mib

REQUESTS, LIVES = (2_500, 4) if CAMPAIGN else (25, 2)  # of each life of the server
MORE_MIB = 30.0  # what the later lives may add to the first


def completion(tokens: int, **more: object) -> dict[str, object]:
    return {"model": "tiny", "prompt": "river stone", "max_tokens": tokens, "temperature": 0, **more}


def stream(server: Server, stack: contextlib.ExitStack, tokens: int) -> socket.socket:
    """A stream of which nothing was read yet."""
    body = json.dumps(completion(tokens, stream=True)).encode()
    client = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {server.keys['read']}\r\n"
    head += f"connection: close\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


def request(server: Server, client: httpx.Client, rng: random.Random) -> str:
    """One of them; returns its kind."""
    kind = rng.choices(["whole", "cancelled", "slow", "add", "delete", "search"], [20, 20, 10, 20, 10, 20])[0]
    name = f"/v1/documents/d{rng.randrange(20)}"
    if kind == "whole":
        assert client.post("/v1/completions", json=completion(2)).status_code == 200
    elif kind == "add":
        text = f"amber {rng.randrange(100)} " * rng.randint(1, 30)
        client.post("/v1/documents", json={"id": name.rpartition("/")[2], "text": text}).raise_for_status()
    elif kind == "delete":
        assert client.delete(name).status_code in (200, 404)
    elif kind == "search":
        client.post("/v1/retrieve", json={"query": "amber", "k": 3}).raise_for_status()
    else:
        with contextlib.ExitStack() as stack:
            one = stream(server, stack, 200 if kind == "cancelled" else 4)
            assert one.recv(12) == b"HTTP/1.1 200"
            while kind == "slow" and one.recv(64):
                time.sleep(0.001)
    return kind


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def settles(count: object, most: int) -> bool:
    """Whether it comes down to that: what was cancelled ends a little later."""
    deadline = time.monotonic() + 10
    while count() > most and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.02)
    return bool(count() <= most)  # type: ignore[operator]


def test_a_soak(small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system does not list descriptors")
    rng, kinds = random.Random(SEED), dict[str, int]()
    before, memory = (0, 0), list[float]()
    for life in range(LIVES):
        with serving_run(small_run, tmp_path) as server, server.client() as client:
            for number in range(REQUESTS):
                kind = request(server, client, rng)
                kinds[kind] = kinds.get(kind, 0) + 1
                if number == 20:
                    inside = num_descriptors(), threading.active_count()
            assert settles(num_descriptors, inside[0] + 4), (
                "descriptors grow"
            )  # pools of readers fill as they are needed
            assert settles(threading.active_count, inside[1] + 4), "threads grow"
        gc.collect()  # of a model, whose modules know each other
        memory.append(resident_mib())
        if not life:
            before = num_descriptors(), threading.active_count()
        assert settles(num_descriptors, before[0]), "a server that has ended holds descriptors"
        assert settles(threading.active_count, before[1]), "a server that has ended leaves threads"
    if CAMPAIGN:
        assert memory[-1] - memory[0] < MORE_MIB, memory
        with capsys.disabled():
            said = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            print(
                counted(
                    f"soak: {sum(kinds.values())} requests ({said}) in {LIVES} lives, {memory[0]:.0f} to {memory[-1]:.0f} MiB"
                )
            )
