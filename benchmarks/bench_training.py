"""What many processes and checkpoints cost: two gloo processes against one with as many threads; saving every 100 steps.

Runs of `retro train` on generated facts, in turns. A checkpoint's cost is that of ten of them in 100 steps, divided
by ten. RETRO_WIDTH sets the model's width (384: 30 M parameters with its vocabulary).
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retro_engine.data.builtin import write_facts
from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.retrieval.neighbors import build_neighbors

WIDTH = int(os.environ.get("RETRO_WIDTH", "384"))
MODEL = [
    f"model.hidden_size={WIDTH}", f"model.ffn_hidden_size={4 * WIDTH}", f"model.num_attention_heads={WIDTH // 64}",
    "model.dec_num_layers=9", "model.enc_num_layers=2", "model.dec_cross_attention=[5,8]", "model.enc_cross_attention=[1]",
    "model.encoder_seq_length=512", "model.init=standard", "trainer.precision=32", "trainer.val_check_interval=100000",
    "trainer.log_every_n_steps=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("training")
    paths = write_facts(folder, 4000, 100)
    made = prepare([paths["train"], paths["notes"]], folder / "store", chunk_size=64)
    build_neighbors(made, [made], "bm25", num_neighbors=2)
    return made


def train(store: Store, out: Path, threads: int, *settings: str) -> tuple[float, list[float]]:
    """Seconds of the whole run, and tokens/s of its steps after the first three."""
    command = [
        sys.executable,
        "-m",
        "retro_engine.cli",
        "train",
        "--preset",
        "small",
        "--out",
        str(out),
        *MODEL,
        *settings,
    ]
    start = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(
        [*command, f"model.data.store='{store.folder}'"], check=True, env=environment, stdout=subprocess.DEVNULL
    )
    seconds = time.perf_counter() - start
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return seconds, [row["tokens_per_s"] for row in rows if "tokens_per_s" in row][3:]


def test_two_processes_against_one(store: Store, tmp_path: Path) -> None:
    rates: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(2):
        for processes in rates:
            work = ["trainer.max_steps=7", "model.micro_batch_size=4", "model.global_batch_size=8"]
            out = tmp_path / f"{processes}-{turn}"
            rates[processes] += train(store, out, 2 // processes, *work, "--nproc", str(processes))[1]
    one, two = (statistics.median(rates[processes]) for processes in (1, 2))
    print(
        f"\none process, two threads: {one:.0f} tokens/s; two gloo processes: {two:.0f}: {two / one:.2f}x (target .9x)"
    )


def test_checkpoints(store: Store, tmp_path: Path) -> None:
    """Width WIDTH and one sequence a step: the state is large and the steps are short."""
    seconds: dict[int, list[float]] = {10: [], 1000: []}
    steps: list[float] = []
    for turn in range(2):
        for interval in seconds:
            work = [
                "trainer.max_steps=101",
                "model.micro_batch_size=1",
                f"exp_manager.checkpoint_every_n_steps={interval}",
            ]
            out = tmp_path / f"{interval}-{turn}"
            whole, _ = train(store, out, 2, *work)
            seconds[interval].append(whole)
            last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
            steps.append(last.get("train_s", 0.0))
    without, saved = (statistics.median(seconds[interval]) for interval in (1000, 10))
    cost = (saved - without) / 10
    hundred = statistics.median(steps[1::2])
    print(
        f"\na checkpoint: {cost:.2f} s; 100 steps: {hundred:.1f} s: {cost / hundred:.1%} when one is saved every 100 steps (target 3 %)"
    )
