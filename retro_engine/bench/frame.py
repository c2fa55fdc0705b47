"""What every bench is made of: options in, rows and targets out, and fair timing of alternatives.

A bench is a function `run(options) -> Measured`. Alternatives are timed in turns, so that a change of the machine's pace
meets all of them; a row is the median with the 20 and 80 % quantiles. Rates are shares of ceilings of the same run.
"""

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from retro_engine.bench import gpu_time

CPU = torch.device("cpu")
Work = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says; a bench takes what concerns it."""

    sizes: Sequence[str] = ("5M", "30M")
    implementations: Sequence[str] | None = None  # None = all
    text: str | None = None  # a file; None = generated facts
    run: str | None = None  # a run's folder, or a checkpoint's
    device: torch.device = CPU
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
    weights: Sequence[str] | None = None  # of what is served; None = all
    parts: Sequence[str] | None = None  # of a bench; None = all
    requests: int | None = None  # to a server; None = as many as the bench's figures are of
    compiles: bool = False  # also alternatives that torch.compile makes, half a minute each
    out: Path = Path("runs/bench")


class Spread(NamedTuple):
    """Of one quantity measured several times; the 20 and 80 % quantiles, of three and fewer the least and the most."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Collection[float]) -> "Spread":
        low, *_, high = statistics.quantiles(values, n=5) if len(values) > 3 else (min(values), max(values))
        return cls(statistics.median(values), low, high)


@dataclass(kw_only=True)
class Row:
    """One measurement. Times in seconds; `ceiling_share` of the ceiling that `bound` names; `ratios`: how many times
    as long each alternative took.
    """

    case: str
    implementation: str
    median_s: float
    low_s: float
    high_s: float
    gb_s: float | None = None
    gflop_s: float | None = None
    bound: str = ""
    ceiling_share: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    error: float | None = None
    peak_mib: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a page says must be reached. `value` None: not measured here, so it does not hold."""

    row: str
    value: float | None
    target: float
    is_at_most: bool

    @property
    def holds(self) -> bool:
        if self.value is None:
            return False
        return self.value <= self.target if self.is_at_most else self.value >= self.target


def at_least(row: str, value: float | None, target: float) -> Target:
    return Target(row=row, value=value, target=target, is_at_most=False)


def at_most(row: str, value: float | None, target: float) -> Target:
    return Target(row=row, value=value, target=target, is_at_most=True)


@dataclass
class Measured:
    """What a bench returns; `facts` are written beside its rows."""

    rows: list[Row]
    targets: list[Target] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def compared(case: str, times: dict[str, Spread], ours: Collection[str] = ("ours",)) -> list[Row]:
    """A row for each that was timed; those of `ours` say how many times as long the others took."""
    rows = []
    for name, (median, low, high) in times.items():
        row = Row(case=case, implementation=name, median_s=median, low_s=low, high_s=high)
        if name in ours:
            row.ratios = {other: spread.median / median for other, spread in times.items() if other != name}
        rows.append(row)
    return rows


def time_in_turns(
    works: dict[str, Work], device: torch.device = CPU, rounds: int = 9, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Spread]:
    """Seconds of each by a clock, after a round that is not counted. On a GPU those of the GPU, of 20 rounds
    (bench/gpu_time.py).
    """
    if device.type == "cuda":
        return {name: Spread.of(values) for name, values in gpu_time.in_turns(works, gpu_time.Clock(device)).items()}
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            start = clock()
            work()
            if number:
                times[name].append(clock() - start)
    return {name: Spread.of(values) for name, values in times.items()}


class Rotation:
    """Calls `function` on sets of inputs that take turns; every rotation begins elsewhere, so that no alternative finds
    in the cache what the one before it has just read.
    """

    _begun = 0

    def __init__(self, function: Callable[..., Any], sets: Sequence[Any]):
        self.function, self.sets = function, sets
        Rotation._begun += 1
        self.next = Rotation._begun * 3

    def __call__(self) -> Any:
        self.next += 1
        return self.function(self.sets[self.next % len(self.sets)])
