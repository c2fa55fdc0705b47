"""A memory beside a model: the same tokens and losses as without, weights of other documents, nothing of what is held out."""

import numpy as np
import pytest
import torch
from helpers import small_config

from retro_engine.data.batches import Sequences
from retro_engine.data.neighbor_table import NeighborTable, find_table
from retro_engine.data.store import Store
from retro_engine.errors import UsageError
from retro_engine.evaluate.memories import (
    ScoredTokens,
    describe_left_out,
    held_out_marks,
    look_up,
    mixed_nats,
    score_tokens,
)
from retro_engine.evaluate.perplexity import evaluate
from retro_engine.memory.mixture import Guesses, Mixture
from retro_engine.memory.ngram_memory import NgramMemory, build_ngram_memory
from retro_engine.model.retro import RetroModel


@pytest.fixture(scope="module")
def model(small_store: Store) -> RetroModel:
    config = small_config(vocab_size=small_store.vocab_size, chunk_size=16, encoder_seq_length=32)
    return RetroModel(config, torch.Generator().manual_seed(0)).eval()


@pytest.fixture(scope="module")
def sequences(small_store: Store) -> Sequences:
    """Ten documents, of which a memory must know nothing; the others may be read."""
    table = NeighborTable(find_table(small_store, "bm25"), small_store)
    return Sequences(
        small_store, np.arange(10), 32, table, 2, database_documents=np.arange(12, small_store.num_documents)
    )


@pytest.fixture(scope="module")
def scored(model: RetroModel, sequences: Sequences) -> ScoredTokens:
    return score_tokens(model, sequences, "on", batch_size=3)


@pytest.fixture(scope="module")
def memory(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> NgramMemory:
    return build_ngram_memory(small_store, tmp_path_factory.mktemp("memory") / "ngram")


def test_tokens_are_those_that_are_evaluated(model: RetroModel, sequences: Sequences, scored: ScoredTokens) -> None:
    """The same losses by document, and each token at its place."""
    store, token_bytes = sequences.store, sequences.store.tokenizer.token_bytes()
    expected = evaluate(model, sequences, token_bytes, ["on"])["on"]
    found = scored.by_document(token_bytes)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.bytes, expected.bytes)
    np.testing.assert_allclose(found.nats, expected.nats, rtol=1e-5)
    for place in range(0, len(scored.labels_T), 37):
        first, end = store.document_rows(int(scored.documents_T[place]))
        rows, lengths = store.rows(first, end)
        text = rows[np.arange(store.chunk_size) < lengths[:, None]]
        assert text[scored.places_T[place]] == scored.labels_T[place]


def test_a_memory_of_other_documents_helps_and_of_none_changes_nothing(
    scored: ScoredTokens, memory: NgramMemory, sequences: Sequences
) -> None:
    left, marks = memory.without(held_out_marks(sequences))
    assert len(marks) == 12, "what is evaluated, and what was not trained on"
    line = describe_left_out(marks, sequences)
    assert line is not None and line.startswith("12 documents of the memory are held out") and "doc" in line
    assert describe_left_out(marks[:0], sequences) is None
    known = look_up(left, scored)
    mixed = mixed_nats(scored, known, Mixture.fitted, None)
    assert mixed.sum() < 0.8 * scored.nats_T.sum()
    none = mixed_nats(scored, known, lambda before, guesses: Mixture.even(0), None)
    np.testing.assert_allclose(none, scored.nats_T, rtol=1e-6)
    with_itself = mixed_nats(scored, look_up(memory, scored), Mixture.fitted, None)
    assert with_itself.sum() < mixed.sum(), "a document that is in the memory says itself"


def test_weights_are_not_of_the_documents_that_they_are_used_for(scored: ScoredTokens, memory: NgramMemory) -> None:
    known, seen = look_up(memory, scored), []

    def fit(before: np.ndarray, guesses: Guesses) -> Mixture:
        seen.append(len(before))
        return Mixture.fitted(before, guesses)

    mixed_nats(scored, known, fit, None)
    assert len(seen) == 2 and sum(seen) == len(scored.nats_T)
    seen.clear()
    mixed_nats(scored, known, fit, (scored, known))
    assert seen == [len(scored.nats_T)]
    one = scored.documents_T == scored.documents_T[0]
    single = ScoredTokens(
        sequences=scored.sequences,
        documents_T=scored.documents_T[one],
        places_T=scored.places_T[one],
        labels_T=scored.labels_T[one],
        nats_T=scored.nats_T[one],
    )
    with pytest.raises(UsageError, match="one document is evaluated"):
        mixed_nats(single, known.of(np.flatnonzero(one)), fit, None)
