"""The copy ceiling against the definition, and where there is nothing to copy."""

import time

import numpy as np

from retro_engine.data.batches import SequenceBatch, Sequences, split_documents
from retro_engine.data.neighbor_table import NeighborTable, find_table
from retro_engine.data.store import Store
from retro_engine.retrieval.ceiling import CONTEXT, copy_ceiling, copyable, describe_ceiling


def test_equals_the_definition(small_store: Store) -> None:
    table = NeighborTable(find_table(small_store, "bm25"), small_store)
    shares = split_documents(small_store, "50,50,0")
    sequences = Sequences(small_store, shares["valid"], 64, table, 2, database_documents=shares["train"])
    m = small_store.chunk_size
    copied = total = 0
    for batch in sequences.batches(4):
        for s in range(len(batch.tokens)):
            text, documents = batch.tokens[s].tolist(), batch.document_ids[s].tolist()
            for t, label in enumerate(batch.labels[s].tolist()):
                if label < 0:
                    continue
                total += 1
                u = (t + 1) // m - 1
                if u < 0 or t == 0 or documents[t - 1] != documents[t] or documents[(u + 1) * m - 1] != documents[t]:
                    continue
                match = [text[t - 1], text[t], label]
                own = any(
                    text[p - 1 : p + 2] == match and documents[p - 1] == documents[t]
                    for p in range(max(1, t - CONTEXT), t)
                )
                found = False
                for k in range(2):
                    neighbor = batch.neighbors[s, u, k, : batch.lengths[s, u, k]].tolist()
                    found |= any(neighbor[p : p + 3] == match for p in range(len(neighbor) - 2))
                copied += found and not own
    share, count = copy_ceiling(sequences)
    assert count == total
    assert share == copied / total > 0.01


def test_its_rate(small_store: Store) -> None:
    """At least a million tokens a second is the aim; a busy machine is given a tenth."""
    tokens = np.random.default_rng(0).integers(0, 8000, (64, 2048))
    labels = np.roll(tokens, -1, 1)
    neighbors = np.random.default_rng(1).integers(0, 8000, (64, 32, 2, 128))
    batch = SequenceBatch(tokens, labels, np.zeros_like(tokens), neighbors, np.full((64, 32, 2), 128))
    copyable(batch, 64)
    start = time.perf_counter()
    copyable(batch, 64)
    assert tokens.size / (time.perf_counter() - start) > 1e5


def test_it_says_what_to_expect() -> None:
    assert "nothing to gain" in describe_ceiling(0.0, 10)
    assert "4.0% of 1,000" in describe_ceiling(0.04, 1000)
    assert "about 2.0% fewer" in describe_ceiling(0.04, 1000)


def test_too_much_is_a_warning() -> None:
    """Neither a ceiling that only copies have, nor chunks whose neighbors state all that follows, is good news."""
    for share, repeated in ((0.6, 0.0), (0.02, 0.3)):
        text = describe_ceiling(share, 1000, repeated)
        assert text.startswith("WARNING: the neighbors state what follows: duplicates?")
        assert "expect" not in text
        assert "retro neighbors STORE --near-duplicates" in text
