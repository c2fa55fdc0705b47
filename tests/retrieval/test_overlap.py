"""The leakage measure against the definition."""

import numpy as np
import pytest

from retro_engine.data.batches import SequenceBatch
from retro_engine.retrieval.overlap import chunk_overlaps, drop_leaks, overlaps

M = 4


def batch(seed: int, vocabulary: int = 3) -> SequenceBatch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (2, 17))
    labels = tokens[:, 1:].copy()
    labels[0, 11:13] = -100
    documents = np.zeros((2, 16), np.int64)
    documents[1, 9:] = 1
    return SequenceBatch(
        tokens[:, :-1], labels, documents, rng.integers(0, vocabulary, (2, 4, 2, 8)), rng.integers(0, 9, (2, 4, 2))
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("n", [1, 2, 3])
def test_equals_the_definition(seed: int, n: int) -> None:
    data = batch(seed)
    found = overlaps(data, M, n)
    for b in range(2):
        for u in range(4):
            first = u * M + M - 1
            text = []
            for t in range(first, min(first + M, 16)):
                if data.labels[b, t] < 0 or data.document_ids[b, t] != data.document_ids[b, first]:
                    break
                text.append(int(data.labels[b, t]))
            for k in range(2):
                neighbor = data.neighbors[b, u, k, : data.lengths[b, u, k]].tolist()
                grams = {tuple(neighbor[i : i + n]) for i in range(len(neighbor) - n + 1)}
                covered = {
                    j for i in range(len(text) - n + 1) if tuple(text[i : i + n]) in grams for j in range(i, i + n)
                }
                assert found[b, u, k] == pytest.approx(len(covered) / len(text) if text else 0)


def test_leaks_become_missing_neighbors() -> None:
    data = batch(0)
    before = data.lengths.copy()
    found = overlaps(data, M, 2)
    dropped = drop_leaks(data, M, 0.4, 2)
    assert dropped == ((found > 0.4) & (before > 0)).sum() > 0
    assert (data.lengths[found > 0.4] == 0).all()
    np.testing.assert_array_equal(data.lengths[found <= 0.4], before[found <= 0.4])
    assert chunk_overlaps(data, M, 2).max() <= 0.4
