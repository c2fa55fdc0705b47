"""Settings of runs that take seconds, and what they logged."""

import json
from pathlib import Path

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
