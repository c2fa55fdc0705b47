"""What every bench shares: fair timing of alternatives, ceilings of the same run, rows, files and the table.

Alternatives are timed in turns, so that a change of the machine's pace meets all of them; a row is the median with
the 20 and 80 % quantiles. Rates are shares of ceilings measured in the same run: copying and matrix products.
"""

import csv
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], Any]


@dataclass
class Row:
    """One measurement. Times in seconds; `ceiling_share` of the ceiling that `bound` names; `ratios`: how many times
    as long each alternative took.
    """

    bench: str
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


@dataclass
class Ceilings:
    """What the device can do at best, by measurement: GB/s of copying (read + write), GFLOP/s of matrix products."""

    copy_gb_s: float
    matmul_gflop_s: dict[str, float]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turns(
    works: dict[str, Work], device: torch.device, rounds: int = 9
) -> dict[str, tuple[float, float, float]]:
    """(median, 20 %, 80 %) seconds of each, after a round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            if number:
                times[name].append(time.perf_counter() - start)
    out = {}
    for name, values in times.items():
        low, *_, high = statistics.quantiles(values, n=5) if len(values) > 1 else (values[0], values[0])
        out[name] = (statistics.median(values), low, high)
    return out


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


def measure_ceilings(device: torch.device, dtypes: Sequence[torch.dtype]) -> Ceilings:
    size = 1 << (30 if device.type == "cuda" else 26)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copy_s = time_in_turns({"copy": lambda: target.copy_(source)}, device)["copy"][1]
    n = 8192 if device.type == "cuda" else 2048
    rates = {}
    for dtype in dtypes:
        a = torch.randn(n, n, device=device).to(dtype)
        work = partial(torch.matmul, a, a)
        rates[name_of(dtype)] = 2e-9 * n**3 / time_in_turns({"matmul": work}, device, 5)["matmul"][1]
    return Ceilings(2e-9 * size / copy_s, rates)


def name_of(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def peak_of(work: Work, device: torch.device) -> float | None:
    """MiB that `work` adds at its peak; on a GPU only."""
    if device.type != "cuda":
        return None
    work()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def free_memory() -> int | None:
    """Bytes that processes can still take; None where the system does not say."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return None
    return next(
        1024 * int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("MemAvailable")
    )


def resident_mib(is_peak: bool = False) -> float:
    """Of this process; the peak since `forget_peak`. Linux."""
    name = "VmHWM" if is_peak else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def environment(device: torch.device) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return names[0] if names else platform.machine()


def write(rows: list[Row], out: Path, about: dict[str, Any]) -> None:
    """OUT.json and OUT.csv."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        for row in rows:
            writer.writerow(asdict(row) | {"ratios": json.dumps(row.ratios)})


def table(rows: list[Row]) -> str:
    lines = [
        f"{'case':46}{'implementation':22}{'median':>11}{'GB/s':>8}{'GFLOP/s':>9}{'share':>8}{'error':>9}  slower by"
    ]
    for row in rows:
        unit = f"{row.median_s * 1e3:.3f} ms" if row.median_s > 1e-4 else f"{row.median_s * 1e6:.1f} us"
        cells = [f"{x:.0f}" if x is not None else "" for x in (row.gb_s, row.gflop_s)]
        share = f"{row.ceiling_share:.0%}" if row.ceiling_share is not None else ""
        error = f"{row.error:.0e}" if row.error is not None else ""
        ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row.ratios.items())
        lines.append(
            f"{row.case:46}{row.implementation:22}{unit:>11}{cells[0]:>8}{cells[1]:>9}{share:>8}{error:>9}  {ratios or row.note}"
        )
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Bars of the time of every implementation relative to ours, a group a case. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [row for row in rows if row.ratios]
    figure, axes = pyplot.subplots(figsize=(9, 0.5 + 0.7 * len(cases)), layout="constrained")
    places = []
    for number, row in enumerate(cases):
        for i, (name, ratio) in enumerate(row.ratios.items()):
            place = number + 0.8 * i / len(row.ratios)
            axes.barh(place, ratio, 0.7 / len(row.ratios), color=f"C{i}")
            axes.text(ratio, place, f" {name} {ratio:.1f}x", va="center", fontsize=7)
        places.append(number + 0.3)
    axes.set_yticks(places, [row.case for row in cases], fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("time of the alternative / time of this project's")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
