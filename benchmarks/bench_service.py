"""What the service costs over the engine that it wraps, how soon the first answer after "ready" comes, what stalled readers
cost the others, and whether memory grows over many requests of which a third is cancelled.

The server is a process of its own (`retro serve` on loopback), the engine alone runs in this one, with the same run: a
tiny model, so that the service shows. The client is a plain socket. Sides take turns; differences are of medians.
`--requests` sets how many the memory is looked at over; with fewer than the default, sides take fewer turns too.
"""

import concurrent.futures
import json
import os
import re
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

REQUESTS = 10_000
SETTLED = 500  # requests after which memory is looked at first
ROUNDS = 200
PROMPT = "river stone amber lantern"
CANCELLED_TOKENS = 256  # asked for by what is cancelled: more than are made before the server sees it


def run(options: Options) -> Measured:
    requests = REQUESTS if options.requests is None else options.requests
    rounds = min(ROUNDS, max(20, ROUNDS * requests // REQUESTS))
    measured = Measured([], facts={"requests": requests, "rounds": rounds})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = prepare([write_corpus(folder / "c.jsonl", 40)], folder / "store", vocab_size=300, chunk_size=16)
        build_neighbors(store, [store], "bm25", num_neighbors=6)
        make_run(Store(folder / "store"), folder / "run")
        key = Accounts(folder / "accounts.sqlite").add_key("bench", "write")
        measure_first(measured, folder, key, starts=max(3, rounds // 40))
        (folder / "alone").mkdir()
        service = open_service(ServiceOptions(run=str(folder / "run"), library=str(folder / "alone" / "library")))
        try:
            with started(folder / "run", folder, "--max-waiting", "200") as server:
                measure_requests(measured, Client(server, key), service.engine, rounds)
                measure_streams(measured, server, Client(server, key), service.engine, rounds)
                measure_stalled(measured, server, key)
                measure_memory(measured, server, Client(server, key), requests)
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

    def first_event(self) -> bytes:
        """Of a stream, whose rest stays unread."""
        status = self.file.readline()
        assert b" 200 " in status, status + self.file.read(500)
        while not (line := self.file.readline()).startswith(b"data: "):
            assert line, "the stream ended without an event"
        return line

    def until_done(self) -> None:
        """The rest of a stream whose first event was read."""
        while (line := self.file.readline()) and not line.startswith(b"data: [DONE]"):
            pass

    def leave(self) -> None:
        """Close the connection at once, as a client that is gone."""
        self.file.close()
        self.socket.close()

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


def measure_first(measured: Measured, folder: Path, key: str, starts: int) -> None:
    """The first event of a stream: of the first request after a server says that it is ready, and of later ones."""

    def first(server: Process, number: int) -> float:
        client = Client(server, key)

        def work() -> None:
            client.send("/v1/completions", body(8, prompt=f"{number} {PROMPT}", stream=True, retro={}))
            client.first_event()

        seconds = timed(work)
        client.until_done()
        client.leave()
        return seconds

    times: dict[str, list[float]] = {"the first after ready": [], "later ones": []}
    for _ in range(starts):
        with started(folder / "run", folder) as server:
            times["the first after ready"].append(first(server, 0))
            later = [first(server, number) for number in range(1, 10)]
            times["later ones"].append(Spread.of(later).median)
    spreads = {side: Spread.of(values) for side, values in times.items()}
    measured.rows += compared("the first event of a stream", spreads, ours=["the first after ready"])
    share = spreads["the first after ready"].median / spreads["later ones"].median
    measured.targets.append(at_most("the first event: of the first request against later ones", share, 1.2))


def measure_requests(measured: Measured, client: Client, engine: Engine, rounds: int) -> None:
    works = {
        "served": lambda: client.ask("/v1/completions", body(1)),
        "engine alone": lambda: engine.submit(request(engine, 1)).result(),
        "/health": lambda: client.ask("/health"),
    }
    for work in works.values():
        for _ in range(20):
            work()
    rows = compared("a request of one token", time_in_turns(works, rounds=rounds), ours=["served"])
    measured.rows += rows
    cost = rows[0].median_s - rows[1].median_s
    measured.targets.append(at_most("a request: ms that the service costs", 1e3 * cost, 3))


def cpu_s(pid: int) -> float:
    """Processor seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_streams(measured: Measured, server: Process, client: Client, engine: Engine, rounds: int) -> None:
    tokens = 256
    seconds: dict[str, list[float]] = {"served": [], "engine alone": [], "the service's processor time": []}
    for _ in range(max(3, rounds // 20)):
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
    measured.targets.append(at_most("a streamed token: ms that the service costs", 1e3 * cost, 0.3))


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


def measure_memory(measured: Measured, server: Process, client: Client, requests: int) -> None:
    """After each tenth of many requests, and after the first ones: searches, adds, answers, streams; a third of all is
    cancelled after its first event, each with a connection of its own.
    """
    settled_at, sizes, times, settled = min(SETTLED, requests // 2), [], [], 0.0
    for turn in range(requests):
        start = time.perf_counter()
        _one_of_all_kinds(server, client, turn)
        times.append(time.perf_counter() - start)
        if turn + 1 == settled_at:
            settled = resident_mib(pid=server.process.pid)
        if (turn + 1) * 10 % requests < 10:
            sizes.append(resident_mib(pid=server.process.pid))
    left = still_running(client)
    (row,) = compared(f"{requests:,} requests of all kinds, a third cancelled", {"served": Spread.of(times)})
    row.peak_mib = max(sizes)
    row.note = f"MiB after {settled_at:,}: {settled:.0f}; after each tenth: {' '.join(f'{size:.0f}' for size in sizes)}"
    measured.rows.append(row)
    after = f"memory: at the end against after the first {settled_at:,}"
    measured.targets.append(at_most(after, sizes[-1] / settled, 1.05))
    measured.targets.append(at_most("sequences of cancelled requests that still run", left, 0))


def _one_of_all_kinds(server: Process, client: Client, turn: int) -> None:
    """What a client does at a turn; every third leaves."""
    if turn % 3 == 2:
        gone = Client(server, client.key)
        gone.send("/v1/completions", body(CANCELLED_TOKENS, prompt=f"granite {turn % 100}", stream=True, retro={}))
        if turn % 2:  # the others leave before anything came
            gone.first_event()
        gone.leave()
    elif turn % 10 == 0:
        client.ask("/v1/retrieve", {"query": f"amber {turn}"})
    elif turn % 10 == 1:
        client.ask("/v1/documents", {"id": f"d{turn % 50}", "text": f"granite {turn % 100} " * 20})
    elif turn % 10 == 3:
        client.ask("/v1/completions", body(2, prompt=f"river {turn % 100} stone", stream=True))
    else:
        client.ask("/v1/completions", body(1, prompt=f"amber {turn % 100}", retro={}))


def still_running(client: Client, wait_s: float = 5.0) -> int:
    """Sequences in the engine, once those that were left have had time to be noticed."""
    end = time.perf_counter() + wait_s
    while True:
        found = re.search(rb"^retro_engine_running ([0-9.]+)$", client.ask("/metrics"), re.MULTILINE)
        assert found is not None, "/metrics does not say how many run"
        if not float(found[1]) or time.perf_counter() > end:
            return int(float(found[1]))
        time.sleep(0.05)
