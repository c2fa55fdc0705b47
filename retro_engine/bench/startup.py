"""How soon the first token of a run comes, how soon its server answers, and what memory serving one sequence takes.

Every command is a process of its own on warm files; beside it, in turns, the import of PyTorch alone, which is the floor.
Reads a run or a checkpoint (`--run`); the server's accounts are in a temporary folder.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from retro_engine.bench.frame import Measured, Options, Row, Spread, Target, at_most, compared
from retro_engine.bench.machine import resident_mib
from retro_engine.errors import UsageError
from retro_engine.generate.open_model import open_model

DTYPES = {"fp32": 4, "bf16": 2, "int8": 1}  # bytes of a weight
ROUNDS = 5
PROMPT = "The capital of France is"
LENGTH, NEW = 2048, 64  # tokens of the sequence that is served, and how many of them are new
FIRST_TOKEN_S = 1.0
MOST_WEIGHTS, MOST_MIB = 1.3, 150e6 / 2**20  # resident: that often the weights, and so much beside
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def run(options: Options) -> Measured:
    if options.run is None:
        raise UsageError("startup has no model", "it starts a run that is there", "--run RUN")
    opened = open_model(options.run)
    weights, most = opened.model.num_parameters, opened.model.config.most_tokens or LENGTH
    reads = opened.model.config.retrieval  # else there is no library: a search takes memory of its own
    del opened
    rows, targets = _first_token(options.run)
    for dtype, item in DTYPES.items():
        row, found = _serving(options.run, dtype, min(LENGTH, most), weights * item / 2**20, reads)
        rows.append(row)
        targets += found
    return Measured(rows, targets)


def _first_token(run: str) -> tuple[list[Row], list[Target]]:
    """Seconds from the start of `retro generate` to its first byte."""
    retro = [sys.executable, "-m", "retro_engine.cli", "generate", run, PROMPT, "--max-new-tokens", "1", "--quiet"]
    commands = {dtype: [*retro, "--dtype", dtype] for dtype in DTYPES}
    commands["import torch"] = [sys.executable, "-c", "import torch; print()"]
    times: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(ROUNDS + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
                assert process.stdout is not None
                process.stdout.read(1)
                seconds = time.perf_counter() - start
                process.stdout.read()
            if process.returncode:
                raise UsageError(f"{' '.join(command)} failed", f"exit code {process.returncode}", "see above")
            if number:
                times[name].append(seconds)
    rows = compared("first token", {name: Spread.of(values) for name, values in times.items()}, ours=list(DTYPES))
    return rows, [
        at_most(f"{row.implementation}: seconds to the first token", row.median_s, FIRST_TOKEN_S) for row in rows[:-1]
    ]


def _serving(run: str, dtype: str, length: int, weights_mib: float, reads: bool) -> tuple[Row, list[Target]]:
    """The first request of a server that says it is ready, others, and its memory after a sequence of `length` tokens."""
    with tempfile.TemporaryDirectory() as folder, _server(run, dtype, Path(folder), reads) as (url, key, pid, ready_s):
        times = [_ask(url, key, f"{number}. {PROMPT}", 1) for number in range(ROUNDS + 1)]
        before = resident_mib(pid=pid)
        _ask(url, key, [5] * (length - NEW), NEW)
        after, peak = resident_mib(pid=pid), resident_mib(is_peak=True, pid=pid)
    usual = Spread.of(times[1:])
    (row,) = compared(f"a request, {dtype}", {"served": usual})
    row.peak_mib = peak
    row.note = (
        f"ready after {ready_s:.1f} s, the first request takes {times[0]:.3f} s; {before:.0f} MiB then, {after:.0f} after "
        f"{length:,} tokens, weights {weights_mib:.0f}"
    )
    targets = [at_most(f"{dtype}: the first request against the others", times[0] / usual.median, 2.0)]
    if dtype == "int8":
        most = MOST_WEIGHTS * weights_mib + MOST_MIB
        targets.append(at_most(f"{dtype}: MiB resident after {length:,} tokens", after, round(most)))
    return row, targets


@contextlib.contextmanager
def _server(run: str, dtype: str, folder: Path, reads: bool) -> Iterator[tuple[str, str, int, float]]:
    """`retro serve` for one sequence: its address, a key, its process and the seconds until it was ready."""
    from retro_engine.serve.accounts import Accounts

    accounts = folder / "accounts.sqlite"
    key = Accounts(accounts).add_key("bench", "read")
    command = [sys.executable, "-m", "retro_engine.cli", "serve", run, "--port", "0", "--json", "--max-batch", "1"]
    command += ["--dtype", dtype, "--accounts", str(accounts)]
    command += ["--library", str(folder / "library")] if reads else []
    start, url = time.perf_counter(), ""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            url = url or line.partition("listening on ")[2].partition('"')[0].strip()
            if "ready: model" in line:
                break
        else:
            raise UsageError("the server did not start", "".join(said), "see above")
        try:
            yield url, key, process.pid, time.perf_counter() - start
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def _ask(url: str, key: str, prompt: str | list[int], tokens: int) -> float:
    """Seconds of a completion."""
    body = {"model": "", "prompt": prompt, "max_tokens": tokens, "min_tokens": tokens, "temperature": 0}
    head = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    models = json.load(opener.open(urllib.request.Request(f"{url}/v1/models", headers=head)))
    body["model"] = models["data"][0]["id"]
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), head)
    start = time.perf_counter()
    with opener.open(request) as answer:
        answer.read()
    return time.perf_counter() - start
