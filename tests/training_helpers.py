"""Settings of runs that take seconds, and what they logged."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from retro_engine.config import Config, load_config
from retro_engine.data.store import Store

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


def launch(processes: int, words: list[str], wait: bool = True) -> subprocess.Popen[str]:
    """torchrun with `words`; its `output` when it has ended."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    process = subprocess.Popen(
        [*launcher, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
    )
    if wait:
        process.output, _ = process.communicate(timeout=240)  # type: ignore[attr-defined]
    return process


def launch_several(processes: int, runs: dict[str, list[str]], folder: Path) -> tuple[dict[str, int], str]:
    """The runs one after another in as many processes, which start once: the exit code of each, and what they said."""
    (folder / "runs.json").write_text(json.dumps(runs))
    run = launch(processes, [str(Path(__file__).parent / "train" / "several_runs.py"), str(folder / "runs.json")])
    output: str = run.output  # type: ignore[attr-defined]
    assert run.returncode == 0, output[-3000:]
    return {name: int(code) for name, code in re.findall(r"^(.*): exit code (\d+)$", output, re.M)}, output


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, optimizer and random state of a checkpoint of one process."""
    files = [folder / "model.safetensors", *(folder / "optimizer").iterdir()]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
