"""What a device can do at best, measured in the run whose rates are shares of it."""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from retro_kernels.products import has_onednn, onednn_product

from retro_engine.bench.frame import Work, time_in_turns
from retro_engine.bench.machine import name_of


@dataclass
class Ceilings:
    """GB/s of copying (read + write), GFLOP/s of matrix products by dtype: in fp32 on a CPU of the better library."""

    copy_gb_s: float
    matmul_gflop_s: dict[str, float]


def measure_ceilings(device: torch.device, dtypes: Sequence[torch.dtype]) -> Ceilings:
    size = 1 << (30 if device.type == "cuda" else 26)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copy_s = time_in_turns({"copy": lambda: target.copy_(source)}, device)["copy"].low
    n = 8192 if device.type == "cuda" else 2048
    rates = {}
    for dtype in dtypes:
        a = torch.randn(n, n, device=device).to(dtype)
        works: dict[str, Work] = {"matmul": partial(torch.matmul, a, a)}
        if dtype == torch.float32 and device.type == "cpu" and has_onednn():
            works["oneDNN"] = partial(onednn_product, a, a, None)
        fastest = min(spread.low for spread in time_in_turns(works, device, 5).values())
        rates[name_of(dtype)] = 2e-9 * n**3 / fastest
    return Ceilings(2e-9 * size / copy_s, rates)


def read_gb_s() -> float:
    """How fast this processor reads memory, over 256 MiB (in large pages, where there are any, as our weights are)."""
    memory = mmap.mmap(-1, 1 << 28)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    source = torch.frombuffer(memory, dtype=torch.float32).fill_(1.0)
    return 4e-9 * source.numel() / time_in_turns({"read": source.sum})["read"].low
