"""The device's gathering against the loader's: the same neighbors, and the same losses in training."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_corpus

from retro_engine.config import load_config
from retro_engine.data.loader import NeighborLoader
from retro_engine.data.prepare import prepare
from retro_engine.progress import Reporter
from retro_engine.retrieval.neighbors import build_neighbors
from retro_engine.train import loop
from retro_engine.train.device_table import DeviceTable

CPU = torch.device("cpu")


def test_the_same_neighbors_as_the_loader(tmp_path: Path) -> None:
    a = prepare([write_corpus(tmp_path / "a.jsonl", 20)], tmp_path / "a", vocab_size=300, chunk_size=16)
    b = prepare([write_corpus(tmp_path / "b.jsonl", 7)], tmp_path / "b", tokenizer=str(tmp_path / "a"), chunk_size=16)
    table, loader = DeviceTable([a, b], CPU), NeighborLoader([a, b])
    ids = np.random.default_rng(0).integers(-1, a.num_rows + b.num_rows, (3, 4, 2))
    for r in (16, 32, 41):
        tokens, lengths = table.gather(ids, r)
        expected, expected_lengths = loader.gather(ids, r)
        assert np.array_equal(tokens.numpy(), expected)
        assert np.array_equal(lengths.numpy(), expected_lengths)


def test_the_same_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = prepare([write_corpus(tmp_path / "c.jsonl", 30)], tmp_path / "c", vocab_size=300, chunk_size=16)
    build_neighbors(store, [store], "bm25", reporter=Reporter("quiet"))
    losses = []
    for gathers_on_device in (False, True):
        monkeypatch.setattr(loop, "gathers_on_device", lambda device, answer=gathers_on_device: answer)
        overrides: list[str | tuple[str, object]] = [
            ("model.data.store", str(store.folder)), ("exp_manager.exp_dir", str(tmp_path / f"run{gathers_on_device}")),
            "model.chunk_size=16", "model.encoder_seq_length=64", "model.hidden_size=48", "model.ffn_hidden_size=64",
            "model.num_attention_heads=2", "trainer.max_steps=4", "trainer.precision=32", "model.micro_batch_size=2",
            "trainer.val_check_interval=4",
        ]  # fmt: skip
        result = loop.train(load_config(overrides, "tiny"), Reporter("quiet"))
        losses.append((result.metrics["loss"], result.metrics["valid_loss_on"], result.metrics["grad_norm"]))
    assert losses[0] == losses[1]
