"""Approximate inner-product search over one segment's vectors: a Faiss IVF index that never changes.

Row numbers are Faiss' own, deleted rows are left out by a selector while it searches: there is no IndexIDMap and
nothing is removed. The lists to probe are doubled until recall against exact search is good enough, and both are
noted. Letters: U vectors, Z their width, K results.
"""

from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.errors import StoreError

MIN_CHUNKS = 1 << 14  # fewer are searched exactly in less time than a question takes to be read
TRAIN_PER_LIST = 64
RECALL, RECALL_AT, RECALL_QUERIES = 0.95, 10, 200
SEED = 1


class IvfVectors:
    """An opened index."""

    def __init__(self, index: Any, probes: int):
        self._index, self.probes = index, probes

    @classmethod
    def open(cls, path: Path, num_vectors: int, width: int, probes: int) -> "IvfVectors":
        """Memory-map a file whose hash was checked. Raises StoreError when it is not what the manifest says."""
        import faiss

        try:
            index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        except RuntimeError as error:
            raise StoreError(f"{path} does not load", str(error).splitlines()[0], "it is built again") from error
        is_ours = isinstance(index, faiss.IndexIVFFlat) and index.metric_type == faiss.METRIC_INNER_PRODUCT
        if not is_ours or (index.ntotal, index.d) != (num_vectors, width) or not 1 <= probes <= index.nlist:
            raise StoreError(f"{path} is not the index that its manifest describes", "", "it is built again")
        return cls(index, probes)

    @classmethod
    def build(cls, vectors_UZ: np.ndarray, path: Path) -> tuple[int, float]:
        """Write an index of the vectors to `path`; return the lists to probe and the recall measured with them."""
        import faiss

        U, Z = vectors_UZ.shape
        faiss.omp_set_num_threads(1)  # of the calling thread only: questions are answered at the same time
        num_lists = min(2 ** round(np.log2(4 * U**0.5)), U // 39)
        index: Any = faiss.index_factory(Z, f"IVF{num_lists},Flat", faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = SEED
        rng = np.random.default_rng(SEED)
        sample = np.sort(rng.choice(U, min(U, TRAIN_PER_LIST * num_lists), replace=False))
        index.train(vectors_UZ[sample])
        index.add(vectors_UZ)
        queries = vectors_UZ[np.sort(rng.choice(U, min(U, RECALL_QUERIES), replace=False))]
        _, exact = faiss.knn(queries, vectors_UZ, min(RECALL_AT, U), metric=faiss.METRIC_INNER_PRODUCT)
        probes = min(16, num_lists)
        while True:
            index.nprobe = probes
            _, found = index.search(queries, exact.shape[1])
            recall = float(np.mean([len(np.intersect1d(a, b)) for a, b in zip(found, exact)])) / exact.shape[1]
            if recall >= RECALL or probes == num_lists:
                break
            probes = min(2 * probes, num_lists)
        faiss.write_index(index, str(path))
        return probes, recall

    def search(self, query_Z: np.ndarray, k: int, alive_U: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Rows [<= k] and scores, best first; only rows that are alive (None = all are)."""
        import faiss

        settings: dict[str, Any] = {"nprobe": self.probes}
        if alive_U is not None:
            bits = np.packbits(alive_U, bitorder="little")
            settings["sel"] = faiss.IDSelectorBitmap(bits)  # type: ignore[arg-type,call-arg]
        parameters = faiss.SearchParametersIVF(**settings)  # type: ignore[call-arg]  # faiss makes its __init__ late
        scores, rows = self._index.search(query_Z[None], k, params=parameters)
        found = rows[0] >= 0
        return rows[0][found], scores[0][found]

    def vectors(self) -> np.ndarray:
        """The vectors [U, Z] that it was built from, bit by bit."""
        return self._index.reconstruct_n(0, self._index.ntotal)
