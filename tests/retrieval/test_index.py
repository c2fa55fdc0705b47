"""Hashed projections and their exact index."""

from pathlib import Path

import numpy as np
import pytest
from helpers import write_corpus

from retro_engine.data.prepare import prepare
from retro_engine.data.store import Store
from retro_engine.errors import StoreError
from retro_engine.retrieval.embed import embed
from retro_engine.retrieval.index import HashIndex


def test_exact_search_with_exclusion(small_store: Store, tmp_path: Path) -> None:
    index = X
    tokens, lengths = small_store.rows(0, small_store.num_rows)
    vectors = embed(tokens, lengths)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    exclude = np.array([[max(0, i - 2), i + 3] for i in range(30)])
    ids, scores = index.search(tokens[:30], lengths[:30], 5, exclude)
    similarity = vectors[:30] @ vectors.T
    for q in range(30):
        similarity[q, exclude[q, 0] : exclude[q, 1]] = -1
        np.testing.assert_allclose(scores[q], np.sort(similarity[q])[::-1][:5], atol=1e-5)
        assert not any(exclude[q, 0] <= i < exclude[q, 1] for i in ids[q])
    again, _ = index.search(tokens[:1], lengths[:1], 10_000)
    assert again.shape == (1, 10_000)
    assert set(again[0][again[0] >= 0]) <= set(range(small_store.num_rows))


def test_similar_text_is_near(tmp_path: Path) -> None:
    texts = ["the quick brown fox jumps", "the quick brown fox sleeps", "an entirely different sentence here"]
    (tmp_path / "c.jsonl").write_text("".join(f'{{"text": "{t}"}}\n' for t in texts))
    store = prepare([tmp_path / "c.jsonl"], tmp_path / "s", vocab_size=300)
    index = HashIndex.build(store, tmp_path / "s" / "index" / "hash")
    ids, _ = index.search_texts(["a quick brown fox"], 3)
    assert ids[0].tolist()[2] in (2, -1)


def test_damaged_and_foreign(small_store: Store, tmp_path: Path) -> None:
    index = X
    other = prepare([write_corpus(tmp_path / "c.jsonl", 4)], tmp_path / "s", vocab_size=300)
    with pytest.raises(StoreError, match="indexes store"):
        HashIndex(index.folder, other)
    path = tmp_path / "x" / "embeddings" / "hash" / "vectors.npy"
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(raw[:-8])
    with pytest.raises(StoreError, match="damaged"):
        HashIndex(index.folder, small_store)
