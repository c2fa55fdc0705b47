"""Products of a few rows, as a step of decoding has them: GB/s of weights read, as a share of what summing memory reads.

About 230 MB of matrices a type, so that none is in a cache; PyTorch's product of the same weights beside it where it has
one. RETRO_CPU=avx2 takes another instruction set, OMP_NUM_THREADS another number of threads.
"""

from collections.abc import Callable

import pytest
import torch
from retro_kernels.linear import linear
from torch import Tensor

from retro_engine.bench.frame import time_in_turns

OUTPUTS, INPUTS, BYTES = 3072, 768, 230_000_000


@pytest.mark.benchmark(group="products of a few rows")
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_products(benchmark, kind: torch.dtype, rows: int) -> None:
    count = BYTES // (OUTPUTS * INPUTS * kind.itemsize)
    weights = [(20 * torch.randn(OUTPUTS, INPUTS)).to(kind) for _ in range(count)]
    scale = torch.rand(OUTPUTS) if kind == torch.int8 else None
    x = torch.randn(rows, INPUTS).to(torch.bfloat16 if kind == torch.bfloat16 else torch.float32)
    memory = torch.ones(BYTES // 4)
    work: dict[str, Callable[[], object]] = {
        "read": memory.sum,
        "ours": lambda: products(lambda weight: linear(x, weight, scale=scale), weights),
    }
    if scale is None:
        work["torch"] = lambda: products(lambda weight: torch.nn.functional.linear(x, weight), weights)
    with torch.inference_mode():
        times = time_in_turns(work, torch.device("cpu"), 9)
    rates = {name: 1e-9 * BYTES / median for name, (median, _, _) in times.items()}
    shown = ", ".join(f"{name} {rate:.1f} GB/s ({rate / rates['read']:.2f})" for name, rate in rates.items())
    print(f"\n{kind}, {rows} rows, {torch.get_num_threads()} threads: {shown}")
    benchmark.extra_info.update(rates)
    benchmark.pedantic(lambda: None, rounds=1)


def products(product: Callable[[Tensor], Tensor], weights: list[Tensor]) -> None:
    for weight in weights:
        product(weight)
