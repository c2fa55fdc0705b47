"""The machine that measures: what it is, whether other work is on it, how much memory a process takes."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, where there is one
MAX_TAKEN = 0.3  # of a processor, by others
MIN_FREE = 4 << 30  # bytes


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure is worth nothing without. `busy`: other work runs, or memory is short."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    is_checkout = (ROOT / ".git").exists()  # else a repository that only holds the installed package would answer
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip() if is_checkout else ""
    taken, free = processors_taken(), free_memory()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "load_1min": round(os.getloadavg()[0], 2),
        "taken": None if taken is None else round(taken, 2),
        "free_gib": None if free is None else round(free / 2**30, 1),
        "busy": (taken is not None and taken > MAX_TAKEN) or (free is not None and free < MIN_FREE),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), platform.machine())


def name_of(dtype: torch.dtype) -> str:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}
    return names[dtype]


def peak_of(work: Callable[[], Any], device: torch.device) -> float | None:
    """MiB that `work` adds at its peak; on a GPU only."""
    if device.type != "cuda":
        return None
    work()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def processors_taken(seconds: float = 0.5) -> float | None:
    """Processors that are busy while this process waits; None where the system does not say. A load of the last minute
    would hold what this process itself has done.
    """
    path = Path("/proc/stat")
    if not path.is_file():
        return None

    def used() -> int:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, path.read_text().split()[1:9])
        return user + nice + system + irq + softirq + steal

    before, start = used(), time.perf_counter()
    time.sleep(seconds)
    return (used() - before) / os.sysconf("SC_CLK_TCK") / (time.perf_counter() - start)


def free_memory() -> int | None:
    """Bytes that processes can still take; None where the system does not say."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return None
    return next(
        1024 * int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("MemAvailable")
    )


def resident_mib(is_peak: bool = False, pid: int | str = "self") -> float:
    """Of a process; the peak since its start or `forget_peak`. Linux."""
    name = "VmHWM" if is_peak else "VmRSS"
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def forget_peak() -> None:
    """Of this process."""
    Path("/proc/self/clear_refs").write_text("5")
