"""Several processes train the same run as one: data parallel, sharded, tensor and sequence parallel, and their mixes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_helpers import losses, settings

from retro_engine.config import load_config
from retro_engine.data.store import Store
from retro_engine.progress import Reporter
from retro_engine.train import checkpoint
from retro_engine.train.loop import train

EXACT = [
    "trainer.precision=64", "trainer.max_steps=20", "model.hidden_dropout=0", "model.attention_dropout=0",
    "model.global_batch_size=4", "model.micro_batch_size=1", "model.data.neighbor_dropout=0.2",
    "model.num_attention_heads=4", "exp_manager.checkpoint_every_n_steps=10", "exp_manager.keep_last_n=4",
]  # fmt: skip
LAYOUTS = {
    "dp2": (2, []),
    "fsdp2": (2, ["model.optim.name=distributed_fused_adam"]),
    "tp2": (2, ["model.tensor_model_parallel_size=2"]),
    "tp2 sequence": (2, ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"]),
    "tp2 x dp2": (4, ["model.tensor_model_parallel_size=2"]),
    "fsdp2 recomputed": (2, ["trainer.strategy=fsdp", "model.activations_checkpoint_granularity=full"]),
}


def torchrun(
    processes: int, arguments: list[str], *flags: str, wait: bool = True, **environment: str
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
    command = [part for part in command if part not in ("--master-port", "0")] + ["--standalone", *flags]
    process = subprocess.Popen(
        [*command, "-m", "retro_engine.train", *arguments, "--quiet"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment,
    )  # fmt: skip
    if wait:
        process.output, _ = process.communicate(timeout=240)  # type: ignore[attr-defined]
    return process


@pytest.fixture(scope="module")
def single(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("single") / "run"
    train(load_config(settings(small_store, out, *EXACT)), Reporter("quiet"))
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_one_process(layout: str, small_store: Store, single: Path, tmp_path: Path) -> None:
    processes, more = LAYOUTS[layout]
    out = tmp_path / "run"
    run = torchrun(processes, settings(small_store, out, *EXACT, *more))
    assert run.returncode == 0, run.output[-3000:]
    found, expected = losses(out), losses(single)
    assert sorted(found) == list(range(1, 21))
    assert max(abs(found[step] - expected[step]) for step in expected) <= 1e-9
