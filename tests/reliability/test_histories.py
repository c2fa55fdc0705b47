"""Clients that write to a server over HTTP while it is killed and started again: each document's history is linearizable.

Two histories here; 100 with RETRO_CAMPAIGN=1, which prints what is counted. RETRO_SEED draws other ones; what two clients do
at the same time is the machine's matter.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from reliability.linearizable import DELETE, READ, WRITE, Operation, is_linearizable
from reliability.runs import CAMPAIGN, SEED, TESTS, counted

HISTORIES, CLIENTS, REQUESTS, RESTARTS = (100, 4, 25, 2) if CAMPAIGN else (2, 4, 8, 1)
IDS = ("a", "b", "c")


class Servers:
    """Forks of one process (history_server.py), one at a time for a folder."""

    def __init__(self, run: Path):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
            "TOKENIZERS_PARALLELISM": "false",
            "NUMBA_THREADING_LAYER": "workqueue",  # GNU OpenMP does not outlive a fork
            "OMP_NUM_THREADS": "1",
        }
        program = [sys.executable, str(TESTS / "reliability" / "history_server.py"), str(run)]
        self.process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, folder: Path) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert "pid" in found, found["failed"]
        return found


def kill(server: dict[str, Any]) -> None:
    """It is gone when this returns: until then it holds the lock of its library, which a busy machine lets it do for long."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(server["pid"], signal.SIGKILL)
        while True:
            os.kill(server["pid"], 0)
            time.sleep(0.001)


@pytest.fixture(scope="module")
def servers(small_run: Path) -> Iterator[Servers]:
    found = Servers(small_run)
    yield found
    assert found.process.stdin is not None
    found.process.stdin.close()
    found.process.wait()


class History:
    """What clients ask of one library, whose server is replaced under them."""

    def __init__(self, seed: str):
        self.seed = seed
        self.server: dict[str, Any] = {}
        self.is_up = threading.Event()
        self.operations: dict[str, list[Operation]] = defaultdict(list)
        self.num_errors = self.num_answered = 0

    def client(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        for step in range(REQUESTS):
            self.is_up.wait(60)
            url, headers = self.server["url"], {"authorization": f"Bearer {self.server['key']}"}
            with httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False) as client:
                self._ask(client, rng, f"{number} {step}")

    def _ask(self, client: httpx.Client, rng: random.Random, mark: str) -> None:
        kind, names = rng.choice([READ, READ, WRITE, WRITE, DELETE]), rng.sample(IDS, rng.choice([1, 1, 2]))
        names = names if kind == WRITE else names[:1]
        text = f"amber {mark}" if kind == WRITE else None
        begin = time.monotonic()
        try:
            if kind == WRITE:
                documents = [{"id": name, "text": text} for name in names]
                client.post("/v1/documents", json={"documents": documents}).raise_for_status()
            else:
                answer = client.request("GET" if kind == READ else "DELETE", f"/v1/documents/{names[0]}")
                assert answer.status_code in (200, 404), answer.text
                is_there = answer.status_code == 200
                text = answer.json()["text"] if kind == READ and is_there else None
                text = ("yes" if is_there else "no") if kind == DELETE else text
            is_sure = True
        except httpx.TransportError:
            is_sure, self.num_errors = False, self.num_errors + 1
        self.num_answered += is_sure
        if is_sure or kind != READ:
            operation = Operation(begin, time.monotonic(), kind, text, is_sure)
            for name in names:
                self.operations[name].append(operation)

    def read_all(self) -> None:
        with httpx.Client(base_url=self.server["url"], timeout=60, trust_env=False) as client:
            for name in IDS:
                begin, headers = time.monotonic(), {"authorization": f"Bearer {self.server['key']}"}
                answer = client.get(f"/v1/documents/{name}", headers=headers)
                text = answer.json()["text"] if answer.status_code == 200 else None
                self.operations[name].append(Operation(begin, time.monotonic(), READ, text))


def run_history(servers: Servers, folder: Path, seed: str) -> History:
    history, rng, failures = History(seed), random.Random(seed), list[BaseException]()

    def caught(number: int) -> None:
        try:
            history.client(number)
        except BaseException as error:
            failures.append(error)

    history.server = servers.start(folder)
    history.is_up.set()
    threads = [threading.Thread(target=caught, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for restart in range(RESTARTS):
        enough = (restart + rng.random()) * CLIENTS * REQUESTS / (RESTARTS + 1)
        while history.num_answered + history.num_errors < enough and any(thread.is_alive() for thread in threads):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.01)
        history.is_up.clear()
        kill(history.server)
        history.server = servers.start(folder)
        history.is_up.set()
    for thread in threads:
        thread.join()
    history.read_all()
    kill(history.server)
    if failures:
        raise failures[0]
    return history


def test_histories_of_clients_are_linearizable(
    servers: Servers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answered = errors = 0
    for number in range(HISTORIES):
        folder = tmp_path / str(number)
        folder.mkdir()
        history = run_history(servers, folder, f"{SEED} {number}")
        for name, operations in history.operations.items():
            assert is_linearizable(operations), f"seed {SEED}, history {number}, document {name}: {operations}"
        answered, errors = answered + history.num_answered, errors + history.num_errors
    assert answered
    with capsys.disabled():
        if CAMPAIGN:
            said = f"{HISTORIES} with {answered} answered and {errors} broken requests, {HISTORIES * RESTARTS} kills"
            print(counted(f"histories over HTTP: {said}, all linearizable"))
