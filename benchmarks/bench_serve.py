"""What the service costs over the engine that it wraps, what stalled readers cost the others, whether memory grows.

The server is a process of its own (`retro serve` on loopback), the engine alone runs in this one, with the same run: a
tiny model, so that the service shows. The client is a plain socket. Sides take turns; differences are of medians.
REQUESTS sets how many the memory is looked at over (10,000), ROUNDS how many a side takes.
"""

import concurrent.futures
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from helpers import write_corpus
from serve_helpers import Process, make_run, started

from retro_engine.bench.frame import Measured, Options, Spread, at_most, compared, time_in_turns
from retro_engine.bench.machine import resident_mib
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.generate.engine import Engine, Request
from retro_engine.generate.sampling import Sampling
from retro_engine.retrieval.neighbors import build_neighbors
from retro_engine.serve.accounts import Accounts
from retro_engine.serve.service import ServiceOptions, open_service

REQUESTS = int(os.environ.get("REQUESTS", 10_000))
ROUNDS = int(os.environ.get("ROUNDS", 200))
PROMPT = "river stone amber lantern"


def run(options: Options) -> Measured:
    measured = Measured([])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = prepare([write_corpus(folder / "c.jsonl", 40)], folder / "store", vocab_size=300, chunk_size=16)
        build_neighbors(store, [store], "bm25", num_neighbors=6)
        make_run(Store(folder / "store"), folder / "run")
        key = Accounts(folder / "accounts.sqlite").add_key("bench", "write")
        (folder / "alone").mkdir()
        service = open_service(ServiceOptions(run=str(folder / "run"), library=str(folder / "alone" / "library")))
        try:
            with started(folder / "run", folder, "--max-waiting", "200") as server:
                measure_requests(measured, Client(server, key), service.engine)
                measure_streams(measured, server, Client(server, key), service.engine)
                measure_stalled(measured, server, key)
                measure_memory(measured, server, Client(server, key))
        finally:
            service.close()
    return measured


class Client:
    """One connection that is kept."""

    def __init__(self, server: Process, key: str):
        self.host, _, port = server.url.removeprefix("http://").partition(":")
        self.key = key
        self.socket = socket.create_connection((self.host, int(port)))
        self.file = self.socket.makefile("rb")

    def send(self, path: str, body: dict[str, object] | None = None) -> None:
        raw = b"" if body is None else json.dumps(body).encode()
        head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {self.key}\r\n"
        self.socket.sendall(
            f"{head}content-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw
        )

    def receive(self) -> bytes:
        """An answer's body, whole or in chunks."""
        status = self.file.readline()
        assert b" 200 " in status, status + self.file.read(500)
        length = None
        while (line := self.file.readline()) != b"\r\n":
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        if length is not None:
            return self.file.read(length)
        parts = []
        while size := int(self.file.readline(), 16):
            parts.append(self.file.read(size))
            self.file.readline()
        self.file.readline()
        return b"".join(parts)

    def ask(self, path: str, body: dict[str, object] | None = None) -> bytes:
        self.send(path, body)
        return self.receive()


def body(tokens: int, **more: object) -> dict[str, object]:
    retro = {"neighbors": []}
    return {
        "model": "tiny",
        "prompt": PROMPT,
        "max_tokens": tokens,
        "min_tokens": tokens,
        "temperature": 0,
        "retro": retro,
        **more,
    }


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def request(engine: Engine, tokens: int) -> Request:
    ids = engine.generator.tokenizer.encode(PROMPT)
    return Request(ids, tokens, sampling=Sampling(min_tokens=tokens), neighbors=[])


def measure_requests(measured: Measured, client: Client, engine: Engine) -> None:
    works = {
        "served": lambda: client.ask("/v1/completions", body(1)),
        "engine alone": lambda: engine.submit(request(engine, 1)).result(),
        "/health": lambda: client.ask("/health"),
    }
    for work in works.values():
        for _ in range(20):
            work()
    rows = compared("a request of one token", time_in_turns(works, rounds=ROUNDS), ours=["served"])
    measured.rows += rows
    cost = rows[0].median_s - rows[1].median_s
    measured.targets.append(at_most("a request: ms that the service costs", 1e3 * cost, 3))


def cpu_s(pid: int) -> float:
    """Processor seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_streams(measured: Measured, server: Process, client: Client, engine: Engine) -> None:
    tokens = 256
    seconds: dict[str, list[float]] = {"served": [], "engine alone": [], "the service's processor time": []}
    for _ in range(max(3, ROUNDS // 20)):
        begin = cpu_s(server.process.pid)
        served = timed(lambda: client.ask("/v1/completions", body(tokens, stream=True)))
        middle, mine = cpu_s(server.process.pid), time.process_time()
        alone = timed(lambda: list(engine.submit(request(engine, tokens))))
        work = middle - begin - (time.process_time() - mine)
        for side, value in zip(seconds.values(), (served, alone, work)):
            side.append(value / tokens)
    times = {side: Spread.of(values) for side, values in seconds.items()}
    rows = compared("a streamed token", times, ours=["served"])
    measured.rows += rows
    cost = rows[0].median_s - rows[1].median_s
    measured.targets.append(at_most("a streamed token: ms that the service costs", 1e3 * cost, 0.5))


def measure_stalled(measured: Measured, server: Process, key: str) -> None:
    """64 streams, all read or four of them not; none of the other 60 may be lost."""

    def stream(_: int) -> float:
        client = Client(server, key)

        def work() -> None:
            answer = client.ask("/v1/completions", body(32, stream=True))
            assert answer.endswith(b"data: [DONE]\n\n"), answer[-200:]
            assert answer.count(b'"text"') >= 1

        return timed(work)

    worst: dict[str, list[float]] = {"all read": [], "4 stalled": []}
    for _ in range(6):
        for side, values in worst.items():
            stalled = [Client(server, key) for _ in range(4)]
            for client in stalled:
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                client.send("/v1/completions", body(64, stream=True, logprobs=20))
                if side == "all read":
                    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            with concurrent.futures.ThreadPoolExecutor(64) as pool:
                readers = [pool.submit(client.receive) for client in stalled] if side == "all read" else []
                seconds = sorted(pool.map(stream, range(60)))
                for reader in readers:
                    reader.result()
            values.append(seconds[int(0.99 * len(seconds))])
            for client in stalled:
                client.socket.close()
    times = {side: Spread.of(values) for side, values in worst.items()}
    measured.rows += compared("64 streams, p99 of 60", times, ours=["4 stalled"])
    change = Spread.of([a / b - 1 for a, b in zip(worst["4 stalled"], worst["all read"])]).median
    measured.targets.append(at_most("64 streams, 4 stalled: change of the others' p99", change, 0.2))


def measure_memory(measured: Measured, server: Process, client: Client) -> None:
    """After each tenth of many requests: searches, adds, streams, new connections."""
    sizes, times = [], []
    for turn in range(REQUESTS):
        start = time.perf_counter()
        if turn % 10 == 0:
            client.ask("/v1/retrieve", {"query": f"amber {turn}"})
            client = Client(server, client.key)
        elif turn % 10 == 1:
            client.ask("/v1/documents", {"id": f"d{turn % 50}", "text": f"granite {turn % 100} " * 20})
        elif turn % 10 == 2:
            client.ask("/v1/completions", body(2, prompt=f"river {turn % 100} stone", stream=True))
        else:
            client.ask("/v1/completions", body(1, prompt=f"amber {turn % 100}", retro={}))
        times.append(time.perf_counter() - start)
        if turn % (REQUESTS // 10) == REQUESTS // 10 - 1:
            sizes.append(resident_mib(pid=server.process.pid))
    (row,) = compared(f"{REQUESTS:,} requests of all kinds", {"served": Spread.of(times)})
    row.peak_mib, row.note = max(sizes), f"MiB after each tenth: {' '.join(f'{size:.0f}' for size in sizes)}"
    measured.rows.append(row)
