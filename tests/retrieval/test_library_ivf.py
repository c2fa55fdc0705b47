"""The IVF index of large segments: recall as noted, deleted rows never found, vectors given back bit by bit."""

from pathlib import Path

import numpy as np
import pytest

from retro_engine.errors import StoreError
from retro_engine.retrieval.library_ivf import RECALL, IvfVectors


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    raw = rng.standard_normal((40, 32)).repeat(100, 0) + 0.6 * rng.standard_normal((4000, 32))
    return (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)


def test_search_against_exact(vectors: np.ndarray, tmp_path: Path) -> None:
    probes, recall = IvfVectors.build(vectors, tmp_path / "ivf")
    assert recall >= RECALL
    index = IvfVectors.open(tmp_path / "ivf", *vectors.shape, probes)
    np.testing.assert_array_equal(index.vectors(), vectors)
    alive = np.random.default_rng(1).random(len(vectors)) < 0.5
    for is_alive in (None, alive):
        found = 0
        for query in vectors[::100]:
            exact = vectors @ query
            if is_alive is not None:
                exact[~is_alive] = -np.inf
            rows, scores = index.search(query, 10, is_alive)
            assert is_alive is None or is_alive[rows].all()
            np.testing.assert_allclose(scores, exact[rows], atol=1e-5)
            found += len(np.intersect1d(rows, np.argsort(-exact)[:10]))
        assert found >= 0.9 * 10 * len(vectors[::100])
    rows, _ = index.search(vectors[0], 10, np.zeros(len(vectors), bool))
    assert not len(rows)


def test_refuses_what_is_not_its_own(vectors: np.ndarray, tmp_path: Path) -> None:
    import faiss

    probes, _ = IvfVectors.build(vectors, tmp_path / "ivf")
    for count, width, wrong in ((3999, 32, probes), (4000, 31, probes), (4000, 32, 0), (4000, 32, 10**6)):
        with pytest.raises(StoreError, match="is not the index"):
            IvfVectors.open(tmp_path / "ivf", count, width, wrong)
    flat = faiss.IndexFlatIP(32)
    flat.add(vectors)
    faiss.write_index(flat, str(tmp_path / "flat"))
    with pytest.raises(StoreError, match="is not the index"):
        IvfVectors.open(tmp_path / "flat", *vectors.shape, probes)
    (tmp_path / "junk").write_bytes(b"junk" * 100)
    with pytest.raises(StoreError, match="does not load"):
        IvfVectors.open(tmp_path / "junk", *vectors.shape, probes)
