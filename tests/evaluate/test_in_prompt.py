"""Neighbors in the prompt: the same tokens as `evaluate`'s, each predicted as a full pass over prompt and text predicts it."""

import numpy as np
import pytest
import torch
from helpers import small_config

from retro_engine.data.batches import Sequences
from retro_engine.data.neighbor_table import NeighborTable, find_table
from retro_engine.data.store import Store
from retro_engine.evaluate.in_prompt import evaluate_in_prompt
from retro_engine.evaluate.perplexity import evaluate
from retro_engine.model.retro import RetroModel


def test_neighbors_are_read_before_the_text(small_store: Store) -> None:
    config = small_config(vocab_size=small_store.vocab_size, chunk_size=16, encoder_seq_length=32, init_method_std=0.2)
    model = RetroModel(config, torch.Generator().manual_seed(0)).eval()
    table = NeighborTable(find_table(small_store, "bm25"), small_store)
    sequences = Sequences(small_store, np.arange(3), 32, table, 2)
    token_bytes = small_store.tokenizer.token_bytes()
    found = evaluate_in_prompt(model, sequences, token_bytes)
    off = evaluate(model, sequences, token_bytes, ["off"])["off"]
    assert np.array_equal(found.tokens, off.tokens)
    assert np.array_equal(found.bytes, off.bytes)
    assert (abs(found.nats - off.nats) > 1e-3).any()
    rows = sequences.in_order()
    expected = np.zeros(small_store.num_documents)
    for b in range(len(rows)):
        batch = sequences.batch(rows[b : b + 1])
        assert batch.neighbors is not None
        assert batch.lengths is not None
        for t in np.flatnonzero(batch.labels[0] >= 0):
            document, u = batch.document_ids[0, t], (t + 1) // 16 - 1
            text = batch.tokens[0, : t + 1][batch.document_ids[0, : t + 1] == document].tolist()
            read: list[int] = []
            if u >= 0 and batch.document_ids[0, u * 16 + 15] == document:
                for k in (1, 0):
                    read += batch.neighbors[0, u, k, : batch.lengths[0, u, k]].tolist()
            with torch.no_grad():
                expected[document] -= float(
                    model(torch.tensor([read + text]))[0, -1].log_softmax(-1)[batch.labels[0, t]]
                )
    assert found.nats == pytest.approx(expected[:3], rel=1e-4)
