"""`bench model`: a training step of RETRO and its memory, ours against the peers, as shares of the matmul rate.

All do the same work (`Shape`), AdamW included, in fp32 as they run, and in bf16 where the processor has it. GPT-2 is
the decoder alone. FLOPs are those of the formula (model/flops.py), three times the forward; `gflop_s` and the share
of the rate of matrix products count them for every RETRO alike.
"""

import statistics

import torch

from retro_engine.bench import peers
from retro_engine.bench.frame import Row, measure_ceilings
from retro_engine.bench.peers import SHAPES, Contestant, Shape, check_memory
from retro_engine.train.precision import has_fast_bf16


def run(sizes: list[str], names: list[str] | None = None, rounds: int = 5) -> list[Row]:
    """Rows of every size: `ratios` of ours hold how many times as long the others took; `peak_mib` is what the step
    takes beyond weights, gradients and optimizer state.
    """
    chosen = peers.chosen(names, peers.NAMES) or [name for name in peers.NAMES if "bf16" not in name or has_fast_bf16()]
    names = peers.present(chosen)
    rows: list[Row] = []
    for size in sizes:
        rows += _size(size, SHAPES[size], names, rounds)
    return rows


def _size(size: str, shape: Shape, names: list[str], rounds: int) -> list[Row]:
    rate = measure_ceilings(torch.device("cpu"), [torch.float32]).matmul_gflop_s["fp32"]
    check_memory(names, shape)
    contestants = [Contestant(name, shape, torch.get_num_threads()) for name in names]
    try:
        seconds: dict[str, list[float]] = {name: [] for name in names}
        mib: dict[str, float] = {}
        for contestant in contestants:
            contestant.step(2)
        for _ in range(rounds):
            for contestant in contestants:
                taken, mib[contestant.name], _loss = contestant.step()
                seconds[contestant.name].append(taken)
    finally:
        for contestant in contestants:
            contestant.close()
    rows = []
    for contestant in contestants:
        values = sorted(seconds[contestant.name])
        low, *_, high = statistics.quantiles(values, n=5) if len(values) > 1 else values * 2
        median = statistics.median(values)
        gflop = 3e-9 * shape.forward_flops(has_retrieval=contestant.name != "gpt2")
        row = Row("model", f"step {size}, {shape.batch} x {shape.length}", contestant.name, median, low, high)
        row.gflop_s, row.bound, row.ceiling_share = gflop / median, "matmul fp32", gflop / median / rate
        row.peak_mib, row.note = mib[contestant.name], f"{contestant.parameters / 1e6:.1f} M parameters"
        row.ratios = {other: statistics.median(seconds[other]) / median for other in names if other != contestant.name}
        rows.append(row)
    return rows
