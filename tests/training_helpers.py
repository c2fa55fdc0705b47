"""Settings of runs that take seconds, and what they logged."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forks import Fork
from safetensors.torch import load_file

from retro_engine.config import Config, load_config
from retro_engine.data.store import Store
from retro_engine.train import loop
from retro_engine.train.__main__ import main
from retro_engine.train.signals import leave

SMALL = [
    "model.hidden_size=32", "model.ffn_hidden_size=64", "model.num_attention_heads=2", "model.dec_num_layers=2",
    "model.enc_num_layers=1", "model.enc_cross_attention=[0]", "model.dec_cross_attention=[1]", "model.chunk_size=16",
    "model.encoder_seq_length=64", "model.micro_batch_size=2", "model.data.splits_string='80,20,0'", "model.optim.lr=5e-3",
    "model.optim.sched.warmup_steps=2", "trainer.max_steps=12", "trainer.val_check_interval=6", "trainer.limit_val_batches=2",
    "trainer.log_every_n_steps=1", "trainer.precision=32", "model.hidden_dropout=0.1", "model.attention_dropout=0.1",
    "model.data.neighbor_dropout=0.2", "exp_manager.checkpoint_every_n_steps=100",
]  # fmt: skip

# NeMo's two documented commands as they are typed; paths, devices and accelerator apart.
NEMO_TRAINING = shlex.split(
    r"""trainer.num_nodes=1 trainer.devices=1 trainer.precision=bf16 trainer.accelerator=cpu
    model.data.data_prefix=["none"] exp_manager.exp_dir=DIR exp_manager.create_wandb_logger=True
    exp_manager.wandb_logger_kwargs.name=NAME exp_manager.wandb_logger_kwargs.project=PROJECT
    +exp_manager.wandb_logger_kwargs.resume=False model.mcore_gpt=True model.tensor_model_parallel_size=1
    model.pipeline_model_parallel_size=1 model.optim.name=distributed_fused_adam model.retro.retro_project_dir=STORE
    model.data.num_workers=4 ++cluster_type=BCP model.micro_batch_size=4 model.data.shuffle_documents=False
    trainer.val_check_interval=10 model.init_method_std=0.023 model.optim.lr=6.0e-4 model.optim.weight_decay=0.1
    model.optim.sched.name=CosineAnnealing model.optim.sched.min_lr=6.0e-5 model.optim.sched.max_steps=650000
    model.megatron_amp_O2=True model.data.dataloader_type=cyclic model.data.splits_string=\'98,2,0\'
    trainer.max_steps=750000"""
)
NEMO_INFERENCE = shlex.split(
    r"""checkpoint_dir=DIR checkpoint_name=\'NAME\' inference.greedy=False inference.add_BOS=False
    inference.tokens_to_generate=10 inference.temperature=1.0 trainer.devices=1 trainer.num_nodes=1
    trainer.accelerator=cpu trainer.precision=32 megatron_amp_O2=False ++cluster_type=BCP
    tensor_model_parallel_size=-1 pipeline_model_parallel_size=-1
    inference.retro_inference.retro_gpt_retrieved_length=128 inference.retro_inference.retro_num_neighbors=3
    inference.retro_inference.ft_neighbours=0 inference.retro_inference.reuse_top=False
    prompt='"Question: Who wrote it? Answer:"' neighbors='["text one","text two","text three"]'"""
)


PLAIN = ["model.retrieval=false", "exp_manager.create_tensorboard_logger=false"]


def settings(store: Store, out: Path, *more: str) -> list[str]:
    return [
        *SMALL,
        f"model.data.store='{store.folder}'",
        "model.data.neighbors=bm25",
        f"exp_manager.exp_dir='{out}'",
        *more,
    ]


def config(store: Store, out: Path, *more: str) -> Config:
    return load_config(settings(store, out, *more))


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def launch(processes: int, words: list[str]) -> subprocess.Popen[str]:
    """torchrun with `words`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*launcher, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
    )


def forked(count: int, said: Path, act: Callable[..., int], *arguments: Any) -> list[int]:
    """`act(*arguments)` in `count` processes that are told what torchrun tells its own: how each ended. What they say is
    appended to `said`; where one has failed the others are killed, as torchrun does.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    ranks = [Fork(_rank, rank, told, act, *arguments, out=said).process for rank in range(count)]
    end, running = time.monotonic() + 240, {one.sentinel: one for one in ranks}
    while running:
        ended = connection.wait(list(running), end - time.monotonic())
        for sentinel in ended or list(running):
            one = running.pop(sentinel)  # type: ignore[arg-type]
            if not ended:
                one.kill()
            one.join()
            for other in running.values() if one.exitcode else ():
                other.kill()
    return [one.exitcode or 0 for one in ranks]


def _rank(rank: int, told: dict[str, str], act: Callable[..., int], *arguments: Any) -> None:
    os.environ |= {**told, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    loop.peak_flops = lambda device, dtype: 1e12  # type: ignore[assignment]  # else each measures it for a second
    leave(act(*arguments))


def launch_several(processes: int, runs: dict[str, list[str]], folder: Path) -> tuple[dict[str, int], str]:
    """The runs one after another in as many processes: the exit code of each, and what they said."""
    said = folder / f"said by {processes}"
    ended = forked(processes, said, _several, runs)
    output = said.read_text()
    assert ended == [0] * processes, output[-3000:]
    return {name: int(code) for name, code in re.findall(r"^(.*): exit code (\d+)$", output, re.M)}, output


def _several(runs: dict[str, list[str]]) -> int:
    dist.init_process_group("gloo")
    for name, arguments in runs.items():
        code = main([*arguments, "--quiet"])
        if dist.get_rank() == 0:
            print(f"{name}: exit code {code}", flush=True)
    dist.destroy_process_group()
    return 0


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, optimizer and random state of a checkpoint of one process."""
    files = [folder / "model.safetensors", *(folder / "optimizer").iterdir()]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
