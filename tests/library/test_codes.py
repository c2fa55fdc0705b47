"""Byte codes of a segment's vectors: results as exact search's, deleted rows never found."""

from pathlib import Path

import numpy as np
import pytest

from retro_engine.errors import OutOfResourceError, StoreError
from retro_engine.library.codes import CodedVectors


@pytest.fixture(scope="module", params=[32, 37])
def vectors(request: pytest.FixtureRequest) -> np.ndarray:
    raw = np.random.default_rng(0).standard_normal((4000, request.param))
    return (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)


def test_search_against_exact(vectors: np.ndarray, tmp_path: Path) -> None:
    CodedVectors.make(vectors).write(tmp_path / "codes")
    codes = CodedVectors.open(tmp_path / "codes", vectors)
    assert codes.recall() > 0.99
    alive = np.random.default_rng(1).random(len(vectors)) < 0.5
    for is_alive in (None, alive):
        found = 0
        queries = vectors[::100] + vectors[1::100]
        for query in queries:
            exact = vectors @ query
            if is_alive is not None:
                exact[~is_alive] = -np.inf
            rows, scores = codes.search(query, 10, is_alive)
            assert is_alive is None or is_alive[rows].all()
            np.testing.assert_allclose(scores, exact[rows], atol=1e-5)
            found += len(np.intersect1d(rows, np.argsort(-exact)[:10]))
        assert found >= 0.99 * 10 * len(queries)
    rows, _ = codes.search(vectors[0], 10, np.zeros(len(vectors), bool))
    assert not len(rows)
    rows, _ = codes.search(vectors[0], 10**6, np.arange(len(vectors)) == 3)
    assert rows.tolist() == [3]


def test_zeros() -> None:
    rows, scores = CodedVectors.make(np.zeros((5, 8), np.float32)).search(np.zeros(8, np.float32), 3, None)
    assert len(rows) == 3
    assert not scores.any()


def test_refuses_what_is_not_its_own(vectors: np.ndarray, tmp_path: Path) -> None:
    import faiss

    CodedVectors.make(vectors).write(tmp_path / "codes")
    for other in (vectors[:-1], np.zeros((4000, 36), np.float32)):
        with pytest.raises(StoreError, match="is not the index"):
            CodedVectors.open(tmp_path / "codes", other)
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    faiss.write_index(flat, str(tmp_path / "flat"))
    with pytest.raises(StoreError, match="is not the index"):
        CodedVectors.open(tmp_path / "flat", vectors)
    (tmp_path / "junk").write_bytes(b"junk" * 100)
    with pytest.raises(StoreError, match="does not load"):
        CodedVectors.open(tmp_path / "junk", vectors)


def test_no_memory_is_no_damage(vectors: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faiss raises one error for both."""

    def refused(*_: object) -> None:
        raise RuntimeError("Error: 'ptr != MAP_FAILED' failed: could not mmap(): Cannot allocate memory")

    monkeypatch.setattr("faiss.read_index", refused)
    with pytest.raises(OutOfResourceError, match="codes cannot be read"):
        CodedVectors.open(tmp_path / "codes", vectors)
