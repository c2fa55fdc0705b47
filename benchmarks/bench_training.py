"""What many processes and checkpoints cost: two gloo processes against one with as many threads; saving every 100 steps.

Runs of `retro train` on generated facts, in turns. A checkpoint's cost is that of ten of them in 100 steps, divided
by ten; width RETRO_WIDTH (384: 30 M parameters with its vocabulary) and one sequence a step: the state is large and the
steps are short.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from retro_engine.bench.frame import Measured, Options, Spread, at_least, at_most, compared
from retro_engine.data.builtin import write_facts
from retro_engine.data.prepare import prepare
from retro_engine.retrieval.neighbors import build_neighbors

WIDTH = int(os.environ.get("RETRO_WIDTH", "384"))
MODEL = [
    f"model.hidden_size={WIDTH}", f"model.ffn_hidden_size={4 * WIDTH}", f"model.num_attention_heads={WIDTH // 64}",
    "model.dec_num_layers=9", "model.enc_num_layers=2", "model.dec_cross_attention=[5,8]", "model.enc_cross_attention=[1]",
    "model.encoder_seq_length=512", "model.init=standard", "trainer.precision=32", "trainer.val_check_interval=100000",
    "trainer.log_every_n_steps=1",
]  # fmt: skip


def run(options: Options) -> Measured:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_facts(folder, 4000, 100)
        store = prepare([paths["train"], paths["notes"]], folder / "store", chunk_size=64)
        build_neighbors(store, [store], "bm25", num_neighbors=2)
        measured = Measured([])
        measure_processes(measured, folder)
        measure_checkpoints(measured, folder)
    return measured


def train(folder: Path, out: str, threads: int, *settings: str) -> tuple[float, list[dict[str, float]]]:
    """Seconds of the whole run, and its lines of metrics."""
    command = [sys.executable, "-m", "retro_engine.cli", "train", "--preset", "small", "--out", str(folder / out)]
    start = time.perf_counter()
    subprocess.run(
        [*command, *MODEL, *settings, f"model.data.store='{folder / 'store'}'"],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - start
    return seconds, [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]


def measure_processes(measured: Measured, folder: Path) -> None:
    """Seconds a token, of the steps after the first three."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(2):
        for processes in seconds:
            work = ["trainer.max_steps=7", "model.micro_batch_size=4", "model.global_batch_size=8"]
            more = ["--nproc", str(processes)]
            _, lines = train(folder, f"{processes}-{turn}", 2 // processes, *work, *more)
            seconds[processes] += [1 / line["tokens_per_s"] for line in lines if "tokens_per_s" in line][3:]
    names = {1: "one process, two threads", 2: "two gloo processes"}
    times = {names[processes]: Spread.of(values) for processes, values in seconds.items()}
    rows = compared("a token of training", times, ours=[names[2]])
    for row in rows:
        row.note = f"{1 / row.median_s:.0f} tokens/s"
    measured.rows += rows
    ratio = rows[0].median_s / rows[1].median_s
    measured.targets.append(at_least("two gloo processes against one of two threads", ratio, 0.9))


def measure_checkpoints(measured: Measured, folder: Path) -> None:
    seconds: dict[int, list[float]] = {10: [], 1000: []}
    hundred: list[float] = []  # steps without a checkpoint
    for turn in range(2):
        for interval in seconds:
            work = ["trainer.max_steps=101", "model.micro_batch_size=1", "exp_manager.keep_best=false"]
            saving = f"exp_manager.checkpoint_every_n_steps={interval}"
            whole, lines = train(folder, f"every-{interval}-{turn}", 2, *work, saving)
            seconds[interval].append(whole)
            if interval == 1000:
                hundred.append(lines[-1]["train_s"])
    times = {f"every {interval} steps": Spread.of(values) for interval, values in seconds.items()}
    rows = compared("100 steps, a checkpoint", times, ours=["every 10 steps"])
    cost = (rows[0].median_s - rows[1].median_s) / 10
    rows[0].note = f"a checkpoint {cost:.2f} s, 100 steps {Spread.of(hundred).median:.1f} s"
    measured.rows += rows
    share = cost / Spread.of(hundred).median
    measured.targets.append(at_most("a checkpoint every 100 steps, share of their time", share, 0.03))
