"""Reading timed: however neighbors are kept the text's losses are those of the whole pass, and in the prompt those of in_prompt."""

import numpy as np
import pytest
import torch
from helpers import small_config

from retro_engine.data.batches import Sequences
from retro_engine.data.neighbor_table import NeighborTable, find_table
from retro_engine.data.store import Store
from retro_engine.evaluate.in_prompt import evaluate_in_prompt
from retro_engine.evaluate.perplexity import evaluate
from retro_engine.evaluate.reading_cost import WAYS, reading_cost, texts_of
from retro_engine.model.retro import RetroModel


@pytest.fixture
def sequences(small_store: Store) -> Sequences:
    """Of several documents each, whose last chunks are short."""
    table = NeighborTable(find_table(small_store, "bm25"), small_store)
    return Sequences(small_store, np.arange(4), 128, table, 2)


@pytest.mark.parametrize("reading", ["prefix", "cross_attention"])
def test_every_way_predicts_the_same_tokens(sequences: Sequences, reading: str) -> None:
    config = small_config(
        vocab_size=sequences.store.vocab_size,
        chunk_size=16,
        encoder_seq_length=128,
        init_method_std=0.2,
        reading=reading,
        enc_cross_attention=[],
    )
    model = RetroModel(config, torch.Generator().manual_seed(0)).eval()
    token_bytes = sequences.store.tokenizer.token_bytes()
    cost = reading_cost(model, sequences)
    on = evaluate(model, sequences, token_bytes, ["on"])["on"]
    prompt = evaluate_in_prompt(model, sequences, token_bytes)
    assert cost.tokens == on.tokens.sum() == prompt.tokens.sum()
    assert cost.nats["kept"] == pytest.approx(on.nats.sum(), rel=1e-5)
    assert cost.nats["not kept"] == pytest.approx(on.nats.sum(), rel=1e-5)
    assert cost.nats["in the prompt"] == pytest.approx(prompt.nats.sum(), rel=1e-5)
    assert abs(prompt.nats - on.nats).max() > 0.1, "the ways are not the same"
    assert set(cost.seconds) == {*WAYS} and min(cost.seconds.values()) > 0


def test_texts_are_the_documents_of_sequences(sequences: Sequences) -> None:
    texts = list(texts_of(sequences))
    assert len(texts) > len(sequences.in_order()), "more than one in a sequence"
    for text in texts:
        assert text.lengths is not None
        assert len(np.unique(text.document_ids)) == 1
        assert text.lengths.shape[1] == text.tokens.shape[1] // 16
    assert len(list(texts_of(sequences, limit=1))) <= len(texts)
