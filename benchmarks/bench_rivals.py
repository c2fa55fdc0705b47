"""Is there a reason to take llama.cpp instead? The same GGUF (SmolLM2-135M) as each runs it, in turns on the same threads.

Ours is what a user calls: `Generator.generate_all` for speed (drafts off, since the rival has none), `retro serve` for
memory, `retro generate` for the start; from what `retro import` wrote, and where this version reads a GGUF as it is, from the
rival's own file too. A prompt of 512 random tokens for each sequence, then 128 new ones; ours is timed
with one new token and with 129, so that what is between them is the new tokens alone. `--parts` and `--weights` take less
at a time; ROUNDS sets how often (3).
"""

import contextlib
import importlib.util
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import llama_cpp
import peers
import torch
from llama_cpp import TYPES, Speed
from serve_helpers import started

from retro_engine.bench.frame import Measured, Options, Row, Spread, at_least, at_most, compared
from retro_engine.bench.machine import resident_mib
from retro_engine.errors import UsageError, nearest
from retro_engine.model.quantize import WEIGHTS
from retro_engine.threads import started_to_wait_shortly

ROUNDS = int(os.environ.get("ROUNDS", 3))
PROMPT, NEW = 512, 128
PROMPT_TAKEN, NEW_TAKEN = 128, 32  # with a core taken: what collapses takes minutes
LEAST = {1: 1.0, 8: 1.3}  # times the rival's tokens/s, by batch
LEAST_PROMPT, LEAST_TAKEN = 1.3, 0.9
CAPACITY = 2048  # tokens of a server's one sequence
FIRST_ID, LAST_ID = 1000, 40_000  # of a prompt: no token that ends a text


def run(options: Options) -> Measured:
    """Raises UsageError for a part or weights that it does not know, MissingInputError without the rival."""
    for asked, known in ((options.parts, PARTS), (options.weights, TYPES)):
        if wrong := [name for name in asked or () if name not in known]:
            raise UsageError(f"{wrong[0]} is not of bench rivals", nearest(wrong[0], list(known)), ", ".join(known))
    llama_cpp.program("llama-batched-bench")
    measured, threads = Measured([]), torch.get_num_threads()
    for weights in options.weights or TYPES:
        if weights not in WEIGHTS:
            print(f"{weights} is left out: ours has {', '.join(WEIGHTS)}")
            continue
        for part in options.parts or PARTS:
            PARTS[part](measured, weights, threads)
    return measured


def _prompts(batch: int, length: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randint(FIRST_ID, LAST_ID) for _ in range(length)] for _ in range(batch)]


def imported() -> Path:
    """What `retro import` makes of the GGUF, made once."""
    source, path = llama_cpp.gguf(), peers.FOLDER / "smollm2"
    if not path.is_dir():
        unfinished = path.with_suffix(".unfinished")
        _retro("import", source, "--out", unfinished)
        unfinished.rename(path)
    return path


class Form(NamedTuple):
    """What ours is opened from, and in which weights; None = the file's own."""

    path: Path
    dtype: str | None

    @property
    def flags(self) -> list[str]:
        return [] if self.dtype is None else ["--dtype", self.dtype]


def forms(weights: str) -> dict[str, Form]:
    """Ours, by name; the last one is what serves the rival's file."""
    found = {"ours": Form(imported(), weights)}
    if weights != "bf16" and importlib.util.find_spec("retro_engine.interop.in_place"):
        found["ours, its GGUF"] = Form(llama_cpp.converted(weights), None)
    return found


def _retro(*words: object) -> None:
    command = [sys.executable, "-m", "retro_engine.cli", *map(str, words), "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def work_on(connection: Connection, path: Path, dtype: str | None) -> None:
    """Ours, in a process of its own: answers a `Speed` to (batch, prompt, new, threads)."""
    from retro_engine.api import Retro
    from retro_engine.generate.generator import Generator
    from retro_engine.generate.request import Request
    from retro_engine.generate.sampling import Sampling

    retro = Retro.from_pretrained(path, dtype)
    generator = Generator(retro.model, retro.tokenizer, drafts=False)

    def seconds(prompts: Sequence[list[int]], new: int) -> float:
        requests = [Request(ids, new, sampling=Sampling(min_tokens=new), neighbors=[]) for ids in prompts]
        start = time.perf_counter()
        generator.generate_all(requests)
        return time.perf_counter() - start

    while (asked := connection.recv()) is not None:
        batch, prompt, new, threads = asked
        torch.set_num_threads(threads)
        prompts = _prompts(batch, prompt)
        first = seconds(prompts, 1)
        connection.send(Speed(first, seconds(prompts, 1 + new) - first))


Ask = Callable[[int, int, int, int], Speed]


@contextlib.contextmanager
def ours(form: Form) -> Iterator[Ask]:
    context = multiprocessing.get_context("spawn")
    connection, other = context.Pipe()
    process = context.Process(target=work_on, args=(other, *form), daemon=True)
    with started_to_wait_shortly():
        process.start()
    other.close()

    def ask(batch: int, prompt: int, new: int, threads: int) -> Speed:
        connection.send((batch, prompt, new, threads))
        try:
            answer: Speed = connection.recv()
        except EOFError as error:
            raise RuntimeError("ours failed; its traceback is above") from error
        return answer

    ask(2, 64, 4, torch.get_num_threads())  # what is made once: not counted
    try:
        yield ask
    finally:
        connection.send(None)
        process.join(10)
        process.kill()


def _rival_name(weights: str) -> str:
    return f"llama.cpp {TYPES[weights]}"


def in_turns(works: dict[str, Callable[[], Speed]], rounds: int) -> dict[str, list[Speed]]:
    speeds: dict[str, list[Speed]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            speeds[name].append(work())
    return speeds


def compared_rows(case: str, batch: int, sizes: tuple[int, int], speeds: dict[str, list[Speed]]) -> list[Row]:
    """Of the prompts, and of the new tokens; ours say how many times as long the others took."""
    rows = []
    for number, (what, length) in enumerate(zip(("prompt", "new tokens"), sizes)):
        times = {name: Spread.of([speed[number] for speed in found]) for name, found in speeds.items()}
        rows += compared(f"{case}, {what}", times, ours=[name for name in times if name.startswith("ours")])
        for row in rows[-len(times) :]:
            row.note = f"{batch * length / row.median_s:,.0f} tokens/s"
    return rows


def measure_batch(measured: Measured, weights: str, threads: int, batch: int) -> None:
    rival, model = _rival_name(weights), llama_cpp.converted(weights)
    size = (batch, PROMPT, NEW, threads)
    with contextlib.ExitStack() as stack:
        asks = {name: stack.enter_context(ours(form)) for name, form in forms(weights).items()}
        works: dict[str, Callable[[], Speed]] = {name: partial(ask, *size) for name, ask in asks.items()}
        speeds = in_turns(works | {rival: lambda: llama_cpp.measure(model, *size)}, ROUNDS)
    case = f"{weights}, batch {batch}"
    rows = compared_rows(case, batch, (PROMPT, NEW), speeds)
    measured.rows += rows
    for what, target in (("prompt", LEAST_PROMPT), ("new tokens", LEAST[batch])):
        best = max(row.ratios[rival] for row in rows if row.ratios and row.case == f"{case}, {what}")
        if batch == 1 or what != "prompt":
            measured.targets.append(at_least(f"{case}, {what}: times {rival}'s", best, target))


def measure_taken(measured: Measured, weights: str, threads: int) -> None:
    """Eight sequences while another process has a core, and ours on one thread less with all cores its own."""
    rival, model = _rival_name(weights), llama_cpp.converted(weights)
    sizes = (8, PROMPT_TAKEN, NEW_TAKEN)
    form = list(forms(weights).values())[-1]
    with ours(form) as ask:
        fewer = in_turns({"ours, one thread less": lambda: ask(*sizes, max(1, threads - 1))}, ROUNDS)
        with _core_taken():
            taken = in_turns({"ours": lambda: ask(*sizes, threads)}, ROUNDS)
            theirs = in_turns({rival: lambda: llama_cpp.measure(model, *sizes, threads)}, 1)
    rows = compared_rows(f"{weights}, batch 8, a core taken", 8, (PROMPT_TAKEN, NEW_TAKEN), taken | fewer | theirs)
    measured.rows += rows
    alone = rows[3].ratios["ours, one thread less"]  # of `taken`, new tokens
    name = f"{rows[3].case}: times one thread less with all cores free"
    measured.targets.append(at_least(name, alone, LEAST_TAKEN))


@contextlib.contextmanager
def _core_taken() -> Iterator[None]:
    """Another process computes on the last core."""
    core = max(os.sched_getaffinity(0))
    code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure_memory(measured: Measured, weights: str, threads: int) -> None:
    """Servers that have filled their one sequence; seconds until they are ready."""
    from retro_engine.serve.accounts import Accounts

    rival, model = _rival_name(weights), llama_cpp.converted(weights)
    (prompt,) = _prompts(1, CAPACITY - NEW)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.closing(Accounts(folder / "accounts.sqlite")) as accounts:
            key = accounts.add_key("bench", "read")
        form = list(forms(weights).values())[-1]
        start = time.perf_counter()
        with started(form.path, folder, *form.flags, "--max-batch", "1") as server:
            ready = time.perf_counter() - start
            body = {"model": "tiny", "prompt": prompt, "max_tokens": NEW, "min_tokens": NEW, "temperature": 0}
            llama_cpp.post(f"{server.url}/v1/completions", body, key)
            resident = resident_mib(pid=server.process.pid)
    theirs = llama_cpp.serve(model, prompt, NEW, threads)
    case = f"{weights}, a server of one sequence of {CAPACITY}"
    rows = compared(case, {"ours": Spread.of([ready]), rival: Spread.of([theirs.ready_s])})
    for row, mib in zip(rows, (resident, theirs.resident_mib)):
        row.peak_mib, row.note = mib, f"{mib:,.0f} MiB resident; the time is until it is ready"
    measured.rows += rows
    most = 1.3 * model.stat().st_size / 2**20 + 150
    measured.targets.append(at_most(f"{case}: resident MiB (1.3 x {TYPES[weights]} + 150)", resident, round(most)))


def measure_start(measured: Measured, weights: str, threads: int) -> None:
    """What a new user waits for: the conversion, then the first token of every start (warm files)."""
    rival, model = _rival_name(weights), llama_cpp.converted(weights)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mine = _seconds(lambda: _retro("import", llama_cpp.gguf(), "--out", folder / "ours"))
        theirs = _seconds(lambda: llama_cpp.convert(weights, folder / "theirs.gguf"))
        rows = compared(f"{weights}, conversion", {"ours": Spread.of([mine]), rival: Spread.of([theirs])})
        for row, written in zip(rows, ("ours", "theirs.gguf")):
            row.note = f"{_bytes_in(folder / written) / 1e6:,.0f} MB written"
    measured.rows += rows
    words = ("Once upon a time", "--max-new-tokens", 1, "--no-retrieval")
    times: dict[str, list[float]] = {name: [] for name in (*forms(weights), rival)}
    for _ in range(ROUNDS):
        for name, form in forms(weights).items():
            times[name].append(_seconds(partial(_retro, "generate", form.path, *words, *form.flags)))
        times[rival].append(_seconds(lambda: llama_cpp.first_token(model, threads)))
    rows = compared(
        f"{weights}, one token and the end", {name: Spread.of(found) for name, found in times.items()}, forms(weights)
    )
    measured.rows += rows


def _bytes_in(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


PARTS: dict[str, Callable[[Measured, str, int], None]] = {
    "batch1": lambda measured, weights, threads: measure_batch(measured, weights, threads, 1),
    "batch8": lambda measured, weights, threads: measure_batch(measured, weights, threads, 8),
    "taken": measure_taken,
    "memory": measure_memory,
    "start": measure_start,
}
