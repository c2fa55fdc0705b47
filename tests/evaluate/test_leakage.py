"""Losses by chunk: the tokens that a chunk's neighbors can condition, each once."""

import numpy as np
import torch
from helpers import small_config

from retro_engine.data.batches import Sequences
from retro_engine.data.neighbor_table import NeighborTable, find_table
from retro_engine.data.store import Store
from retro_engine.evaluate.compare import compare
from retro_engine.evaluate.leakage import LIMITS, ChunkLosses, chunk_losses
from retro_engine.evaluate.losses import token_losses
from retro_engine.evaluate.perplexity import evaluate
from retro_engine.model.retro import RetroModel


def test_chunks_and_comparison(small_store: Store) -> None:
    config = small_config(vocab_size=small_store.vocab_size, chunk_size=16, encoder_seq_length=64)
    model = RetroModel(config, torch.Generator().manual_seed(0)).eval()
    plain = RetroModel(small_config(vocab_size=small_store.vocab_size, chunk_size=16, retrieval=False)).eval()
    table = NeighborTable(find_table(small_store, "bm25"), small_store)
    sequences = Sequences(small_store, np.arange(20), 64, table, 2)
    token_bytes = small_store.tokenizer.token_bytes()
    found = chunk_losses({"on": (model, "on"), "off": (model, "off")}, sequences, token_bytes, batch_size=3)
    m, number = 16, 0
    for rows in sequences.in_order():
        batch = sequences.batch(rows[None])
        losses, _ = token_losses(model, batch, torch.device("cpu"))
        for u in range(4):
            last = u * m + m - 1
            if batch.document_ids[0, last] < 0 or not (batch.lengths[0, u] > 0).any():
                continue
            span = [
                t for t in range(last, min(last + m, 64))
                if batch.labels[0, t] >= 0 and batch.document_ids[0, t] == batch.document_ids[0, last]
            ]  # fmt: skip
            np.testing.assert_allclose(found.nats["on"][number], losses[0, span].sum(), rtol=1e-4)
            assert found.bytes[number] == token_bytes[batch.labels[0, span]].sum()
            number += 1
    assert number == len(found.overlap) > 20
    assert sum(int(row["chunks"]) for row in found.groups()) == number
    nothing = ChunkLosses(np.ones(2), np.ones(2), {"on": np.ones(2)}, 0, {"on": 0})
    assert [row["on"] is None for row in nothing.groups()] == [True, True, False], "no figure of no chunks"
    assert [row["up_to"] for row in found.curve()] == list(LIMITS)
    comparison = compare(model, sequences, token_bytes, {"plain": plain})
    assert set(comparison.losses) == {"on", "off", "random", "plain"}
    measured = comparison.gain("plain")
    assert measured["low"] <= measured["gain"] <= measured["high"]
    assert measured["gain"] == 1 - comparison.losses["on"].nats.sum() / comparison.losses["plain"].nats.sum()


def test_the_leak_filter(small_store: Store) -> None:
    """With a limit of 0 no neighbor may state a run of what follows; with 1 nothing changes."""
    config = small_config(vocab_size=small_store.vocab_size, chunk_size=16, encoder_seq_length=64)
    model = RetroModel(config, torch.Generator().manual_seed(0)).eval()
    table = NeighborTable(find_table(small_store, "bm25"), small_store)
    sequences = Sequences(small_store, np.arange(20), 64, table, 2)
    token_bytes = small_store.tokenizer.token_bytes()
    base, all_in, none = (
        evaluate(model, sequences, token_bytes, ["on"], leak_limit=limit)["on"].nats.sum() for limit in (None, 1.0, 0.0)
    )
    assert base == all_in != none
