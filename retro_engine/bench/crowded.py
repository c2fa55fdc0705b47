"""Decoding where it may fall off a cliff: more rows than a tile holds, and a core that another process takes.

Ours alone, fp32, batches of 16, 17 and 32; and eight sequences on two cores, beside a process that takes all of one that it can,
against the same on one thread with nothing beside. Of a decoding step: the prompt's time is taken off.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import replace

from retro_engine.bench.contestants import SHAPES, Contestant, Inputs, M
from retro_engine.bench.frame import Row, Spread, Target, at_least, compared
from retro_engine.threads import started_to_wait_shortly

ROWS, SEQUENCES, NEW, ROUNDS = (16, 17, 32), 8, 64, 3


def run(size: str, threads: int) -> tuple[list[Row], list[Target]]:
    """Rows and targets of one size."""
    rows, found = _many_rows(size, threads)
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        print("the row beside a busy process is left out: it takes Linux and two cores")
        return rows, found
    busy, targets = _beside_a_busy_process(size)
    return rows + busy, found + targets


def _many_rows(size: str, threads: int) -> tuple[list[Row], list[Target]]:
    with _contestant(size, threads) as ours:
        times: dict[int, list[float]] = {count: [] for count in ROWS}
        for _ in range(ROUNDS):
            for count, measured in times.items():
                measured.append(_step_s(ours, size, count))
    case = f"decode {size}, rows"
    rows = compared(case, {f"ours, {count} rows": Spread.of(measured) for count, measured in times.items()})
    rates = {count: count / row.median_s for count, row in zip(ROWS, rows)}
    for row, rate in zip(rows, rates.values()):
        row.note = f"{rate:.1f} tokens/s"
    targets = [
        at_least(f"{case}: tokens/s of 17 against 16", rates[17] / rates[16], 1),
        at_least(f"{case}: tokens/s of 32 against 17", rates[32] / rates[17], 1),
    ]
    return rows, targets


def _beside_a_busy_process(size: str) -> tuple[list[Row], list[Target]]:
    with _two_cores(), _contestant(size, 1) as alone, _contestant(size, 2) as ours:
        times: dict[str, list[float]] = {"ours, one thread alone": [], "ours, two threads, a core taken": []}
        for _ in range(ROUNDS):
            first, second = times.values()
            first.append(_step_s(alone, size, SEQUENCES))
            with _busy_process():
                second.append(_step_s(ours, size, SEQUENCES))
    case = f"decode {size}, batch {SEQUENCES}, beside a busy process"
    rows = compared(case, {name: Spread.of(measured) for name, measured in times.items()}, ours=times)
    for row in rows:
        row.note = f"{SEQUENCES / row.median_s:.1f} tokens/s"
    ratio = rows[1].ratios["ours, one thread alone"]
    return rows, [at_least(f"{case}: times as fast as one thread alone", ratio, 0.9)]


def _step_s(contestant: Contestant, size: str, count: int) -> float:
    """Seconds of one step of `count` rows."""
    inputs = Inputs.draw(replace(SHAPES[size], batch=count, length=M + NEW))
    prompts = inputs.tokens[:, :M]
    whole = contestant.decode(prompts, inputs.neighbors, NEW)
    return (whole - contestant.decode(prompts, inputs.neighbors, 1)) / (NEW - 1)


@contextlib.contextmanager
def _contestant(size: str, threads: int) -> Iterator[Contestant]:
    with started_to_wait_shortly():
        contestant = Contestant("ours", SHAPES[size], threads)
    try:
        _step_s(contestant, size, 1)
        yield contestant
    finally:
        contestant.close()


@contextlib.contextmanager
def _two_cores() -> Iterator[None]:
    """Processes that are started in the block have two cores between them."""
    all_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(all_cores)[:2])
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_cores)


@contextlib.contextmanager
def _busy_process() -> Iterator[None]:
    process = multiprocessing.get_context("spawn").Process(target=_spin, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _spin() -> None:
    while True:
        pass
