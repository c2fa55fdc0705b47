"""The nearest of one segment's vectors: Faiss scans a byte a component, the best are compared again in full.

The scan reads a quarter of the vectors' bytes and is exact but for rounding, needs no training and no clusters, and
never changes: row numbers are Faiss' own and deleted rows are left out by a selector, so there is no IndexIDMap and
nothing is removed. Recall against exact search is measured when it is made, and noted. Letters: U vectors, Z their
width, K results.
"""

from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.errors import StoreError, read_error, system_error

MIN_CHUNKS = 2048  # fewer are multiplied in full in less than half a millisecond
CANDIDATES = 4  # for each result, compared again in full
RECALL_AT, RECALL_QUERIES = 10, 100
SEED = 1


class CodedVectors:
    """Vectors [U, Z] f32 and their codes; both are memory-mapped."""

    def __init__(self, codes: Any, vectors_UZ: np.ndarray):
        self._codes, self.vectors = codes, vectors_UZ

    @classmethod
    def make(cls, vectors_UZ: np.ndarray) -> "CodedVectors":
        import faiss

        codes: Any = faiss.IndexScalarQuantizer(
            vectors_UZ.shape[1], faiss.ScalarQuantizer.QT_8bit_direct_signed, faiss.METRIC_INNER_PRODUCT
        )
        codes.is_trained = True  # these codes have nothing to learn
        scale = _scale(vectors_UZ)
        for start in range(0, len(vectors_UZ), 1 << 14):
            codes.add(np.rint(vectors_UZ[start : start + (1 << 14)] * scale))
        return cls(codes, vectors_UZ)

    def write(self, path: Path) -> None:
        import faiss

        faiss.write_index(self._codes, str(path))

    @classmethod
    def open(cls, path: Path, vectors_UZ: np.ndarray) -> "CodedVectors":
        """Memory-map a file whose hash was checked. Raises StoreError when it is not of these vectors."""
        import faiss

        try:
            codes: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except (RuntimeError, MemoryError) as error:
            if (refused := system_error(error)) is not None:
                raise read_error(refused, path) from error
            raise StoreError(f"{path} does not load", str(error).splitlines()[0], "it is built again") from error
        is_ours = isinstance(codes, faiss.IndexScalarQuantizer) and codes.metric_type == faiss.METRIC_INNER_PRODUCT
        if not is_ours or (codes.ntotal, codes.d) != vectors_UZ.shape or codes.code_size != codes.d:
            raise StoreError(f"{path} is not the index that its manifest describes", "", "it is built again")
        return cls(codes, vectors_UZ)

    def search(self, query_Z: np.ndarray, k: int, alive_U: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Rows [<= k] and inner products, best first; only rows that are alive (None = all are)."""
        import faiss

        settings: dict[str, Any] = {}
        if alive_U is not None:
            bits = np.packbits(alive_U, bitorder="little")
            settings["sel"] = faiss.IDSelectorBitmap(bits)  # type: ignore[arg-type,call-arg]
        parameters = faiss.SearchParameters(**settings)
        query = np.rint(query_Z * _scale(query_Z))[None]
        _, candidates = self._codes.search(query, min(CANDIDATES * k, len(self.vectors)), params=parameters)
        rows = np.sort(candidates[0][candidates[0] >= 0])
        scores = self.vectors[rows] @ query_Z
        order = np.argsort(-scores, kind="stable")[:k]
        return rows[order], scores[order]

    def recall(self) -> float:
        """The share of the exact 10 best that is found, for 100 of the vectors."""
        import faiss

        rng = np.random.default_rng(SEED)
        queries = self.vectors[np.sort(rng.choice(len(self.vectors), min(len(self.vectors), RECALL_QUERIES), False))]
        at = min(RECALL_AT, len(self.vectors))
        _, exact = faiss.knn(queries, self.vectors, at, metric=faiss.METRIC_INNER_PRODUCT)
        found = [self.search(query, at, None)[0] for query in queries]
        return float(np.mean([len(np.intersect1d(a, b)) / at for a, b in zip(found, exact)]))


def _scale(vectors: np.ndarray) -> np.float32:
    """What makes the largest component 127. All are scaled alike, so the order of inner products stays."""
    largest = float(np.abs(vectors).max(initial=0))
    return np.float32(127 / largest if largest > 0 else 1)
