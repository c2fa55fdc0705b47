"""`bench model`: a training step of RETRO and its memory, ours against the peers, as shares of the matmul rate.

All do the same work (`Shape`), AdamW included, in fp32 as they run, and in bf16 where the processor has it. GPT-2 is
the decoder alone. FLOPs are those of the formula (model/flops.py), three times the forward; `gflop_s` and the share
of the rate of matrix products count them for every RETRO alike.
"""

import torch

from retro_engine.bench import contestants
from retro_engine.bench.ceilings import measure_ceilings
from retro_engine.bench.contestants import RETRO_PEERS, SHAPES, Shape
from retro_engine.bench.frame import CPU, Measured, Options, Row, Spread, Target, at_least, at_most, compared
from retro_engine.train.precision import has_fast_bf16


def run(options: Options, rounds: int = 5) -> Measured:
    """Rows of every size: `ratios` of ours hold how many times as long the others took; `peak_mib` is what the step
    takes beyond weights, gradients and optimizer state.
    """
    known = [name for name in contestants.NAMES if "bf16" not in name or has_fast_bf16()]
    names = contestants.present(contestants.chosen(options.implementations, contestants.NAMES) or known)
    measured = Measured([])
    for size in options.sizes:
        rows = _size(size, SHAPES[size], names, rounds)
        measured.rows += rows
        measured.targets += targets(size, rows)
    return measured


def _size(size: str, shape: Shape, names: list[str], rounds: int) -> list[Row]:
    rate = measure_ceilings(CPU, [torch.float32]).matmul_gflop_s["fp32"]
    contestants.check_memory(names, shape)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    mib: dict[str, float] = {}
    with contestants.started(names, shape) as started:
        for contestant in started:
            contestant.step(2)
        for _ in range(rounds):
            for contestant in started:
                taken, mib[contestant.name], _loss = contestant.step()
                seconds[contestant.name].append(taken)
    times = {name: Spread.of(values) for name, values in seconds.items()}
    rows = compared(f"step {size}, {shape.batch} x {shape.length}", times, ours=names)
    for row, contestant in zip(rows, started):
        row.gflop_s = 3e-9 * shape.forward_flops(has_retrieval=row.implementation != "gpt2") / row.median_s
        row.bound, row.ceiling_share = "matmul fp32", row.gflop_s / rate
        row.peak_mib, row.note = mib[row.implementation], f"{contestant.parameters / 1e6:.1f} M parameters"
    return rows


def targets(size: str, rows: list[Row]) -> list[Target]:
    """Of docs/performance-log.md: speed and memory against the better peer; at 57M on one thread the share of the rate."""
    found = {row.implementation: row for row in rows}
    peers = [found[name] for name in RETRO_PEERS if name in found]
    out = []
    if "ours" in found:
        fastest = min((peer.median_s for peer in peers), default=None)
        types = {
            "fp32": (1.35, ["ours", "ours, compiled"]),
            "the best type": (2.5, [name for name in found if name.startswith("ours")]),
        }
        for what, (target, names) in types.items():
            best = min(found[name].median_s for name in names if name in found)
            value = fastest / best if fastest is not None else None
            out.append(at_least(f"step {size}: times as fast as the faster peer, {what}", value, target))
        leanest = min((peer.peak_mib or 0 for peer in peers), default=None)
        mine = min(row.peak_mib or 0 for name, row in found.items() if name.startswith("ours"))
        out.append(at_most(f"step {size}: memory against the leaner peer", mine / leanest if leanest else None, 0.5))
        if size == "57M" and torch.get_num_threads() == 1:
            out.append(at_least(f"step {size}: share of the fp32 matmul rate", found["ours"].ceiling_share, 0.88))
    return out
