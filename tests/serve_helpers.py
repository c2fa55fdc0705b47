"""A server on a free port of loopback, in a thread of the test's process, and a run for it to serve."""

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import training_helpers

from retro_engine.data.store import Store
from retro_engine.progress import Reporter
from retro_engine.serve.accounts import Accounts
from retro_engine.serve.app import make_app
from retro_engine.serve.bounds import Limits
from retro_engine.serve.connection import bind, make_server
from retro_engine.serve.gate import Gate
from retro_engine.serve.request_context import ServerState
from retro_engine.serve.service import Service, ServiceOptions, open_service
from retro_engine.serve.start import Address, make_state
from retro_engine.train.loop import train

PASSWORD = "correct horse battery"


class Letters:
    """An embedder of a name, as one that reads meaning has: unit vectors of how often each letter is there."""

    name = "letters-small"

    def encode(self, texts: list[str]) -> np.ndarray:
        rows = np.array([[text.count(chr(97 + letter)) for letter in range(26)] for text in texts], np.float32) + 1e-3
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


@contextlib.contextmanager
def with_letters() -> Iterator[None]:
    """Services have that embedder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Service, "embedder", property(lambda self: Letters()))
        yield


class Server:
    """A server that runs, with a key for each scope."""

    def __init__(
        self,
        url: str,
        gate: Gate,
        state: ServerState,
        keys: dict[str, str],
        process: Any = None,
        said: Sequence[str] = (),
    ):
        """`process`: what listens; `said`: its words on stopping."""
        self.url, self.gate, self.state, self.keys = url, gate, state, keys
        self.process, self.said = process, said
        self.port = int(url.rpartition(":")[2])

    @property
    def service(self) -> Service:
        assert self.state.service is not None
        return self.state.service

    def client(self, scope: str | None = "admin", **more: Any) -> httpx.Client:
        headers = {} if scope is None else {"authorization": f"Bearer {self.keys[scope]}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False, **more)

    def openai(self, scope: str = "admin", **more: Any) -> Any:
        openai = pytest.importorskip("openai")
        http = httpx.Client(trust_env=False)
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.keys[scope], http_client=http, **more)


def post(server: Server, path: str, **body: Any) -> Any:
    with server.client("read") as client:
        return client.post(path, json=body)


@pytest.fixture(scope="session")
def small_run(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(small_store, tmp_path_factory.mktemp("run") / "run")


def make_run(store: Store, out: Path) -> Path:
    """A run of three steps on a store of tests."""
    train(training_helpers.config(store, out, "trainer.max_steps=3"), Reporter("quiet"))
    return out


@contextlib.contextmanager
def serving(
    load: Callable[[], Service],
    folder: Path,
    limits: Limits | None = None,
    beside: Callable[[str], None] | None = None,
    settle: Callable[[], None] = lambda: None,
    **address: Any,
) -> Iterator[Server]:
    """A server whose service `load` opens, ready when the block begins; `beside`, a thread's, gets its address before, and
    `settle` is called when it is warm.
    """
    accounts = Accounts(folder / "accounts.sqlite")
    keys = {scope: accounts.add_key(scope, scope) for scope in ("read", "write", "admin")}
    about = Address(**address)
    state = make_state(accounts, limits or Limits(), about)
    failures: list[BaseException] = []
    said: list[str] = []
    app = make_app(state, load, about.allowed_hosts, about.has_nemo, failures.append, settle)
    listener = bind("127.0.0.1", 0)
    server = make_server(app, state.limits, about.is_behind_proxy, state.end_requests, said.append)
    thread = threading.Thread(target=server.run, args=([listener],), name="server", daemon=True)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread.start()
    if beside is not None:
        threading.Thread(target=beside, args=(url,), daemon=True).start()
    try:
        deadline = time.monotonic() + 60
        while state.service is None:
            assert not failures and time.monotonic() < deadline, failures
            time.sleep(0.01)
        yield Server(url, app, state, keys, server, said)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
        accounts.close()


@contextlib.contextmanager
def serving_run(run: Path, folder: Path, limits: Limits | None = None, **address: Any) -> Iterator[Server]:
    """A server of a run, with a library of its own."""
    options = ServiceOptions(run=str(run), library=str(folder / "library"), name="tiny")
    with serving(lambda: open_service(options), folder, limits, **address) as server:
        yield server


class Process:
    """A server in a process of its own, once it is ready."""

    def __init__(self, run: Path, folder: Path, *flags: str):
        command = [
            sys.executable,
            "-m",
            "retro_engine.cli",
            "serve",
            str(run),
            "--port",
            "0",
            "--json",
            "--name",
            "tiny",
        ]
        command += ["--library", str(folder / "library"), "--accounts", str(folder / "accounts.sqlite"), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdout is not None
        self.lines: list[str] = []
        for line in self.process.stdout:
            self.lines.append(line)
            if "ready: model" in line:
                break
        text = "".join(self.lines)
        self.url = text.partition("listening on ")[2].partition('"')[0].strip()
        self.setup = text.partition("#setup=")[2].partition('"')[0].strip()

    def end(self, number: int, timeout_s: float = 20) -> tuple[int, str]:
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, rest


@contextlib.contextmanager
def started(run: Path, folder: Path, *flags: str) -> Iterator[Process]:
    server = Process(run, folder, *flags)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate()


def client_of(server: Process, key: str | None = None, **more: Any) -> httpx.Client:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=server.url, headers=headers, timeout=30, trust_env=False, **more)
