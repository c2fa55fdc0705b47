"""A published Faiss index over the vectors of a store's chunks, opened memory-mapped and searched.

`index_build` makes it. Letters: U chunks, Q queries, Z embedding width, K neighbors.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.data import files
from retro_engine.data.store import Store
from retro_engine.errors import StoreError, UsageError
from retro_engine.retrieval import vectors as vectors_module
from retro_engine.retrieval.embed import embed, open_embedder
from retro_engine.retrieval.faiss_factory import num_lists
from retro_engine.retrieval.inverted_lists import ListsFile, map_lists, read_faiss
from retro_engine.retrieval.left_out import LeftOut
from retro_engine.retrieval.vectors import ExactSearch, Vectors, has_gpu

MOST_FILES = 1 << 12
REFINE = 4  # times k results of a product quantizer are compared again, by their vectors
EXTRA = 128  # results asked for beyond k before rows that are left out make a second search necessary


class VectorIndex:
    """A published index over the vectors of a store."""

    def __init__(self, folder: Path, store: Store, model: str | None = None):
        """`model` is needed where queries are texts and the index is not hash's or minilm's.

        Raises MissingInputError, or StoreError for an index of another store, embedder or version, or a damaged one.
        """
        manifest = files.read_manifest(folder, "index")
        for key in ("factory", "metric", "embeddings", "embedding", "nprobe", "recall", "recall_k", "index_rows"):
            if key not in manifest:
                raise StoreError(
                    f"{folder} was made by another version", f"no {key!r}", f"rm -r {folder}, then retro index"
                )
        if manifest["store"] != store.fingerprint:
            raise StoreError(
                f"{folder} indexes store {manifest['store'][:12]}",
                f"{store.folder} has {store.fingerprint[:12]}",
                f"retro index {store.folder}",
            )
        vectors = Vectors(files.child(store.folder / "embeddings", manifest["retriever"]), store)
        if manifest["embeddings"] != vectors.fingerprint:
            raise StoreError(
                f"{folder} indexes vectors {manifest['embeddings'][:12]} of {manifest['embedding']['name']}",
                f"{vectors.folder} has {vectors.fingerprint[:12]}",
                f"rm -r {folder}, then retro index {store.folder}",
            )
        files.verify_files(folder, manifest["files"])
        self._open(folder, store, vectors, manifest)
        self.model = model or ("hash" if vectors.embedding.name == "hash" else "minilm")

    def _open(self, folder: Path, store: Store, vectors: Vectors, manifest: dict[str, Any]) -> None:
        self.folder, self.store, self.vectors, self.manifest = folder, store, vectors, manifest
        self.factory, self.metric, self.nprobe = manifest["factory"], manifest["metric"], int(manifest["nprobe"])
        self.num_chunks = store.num_rows
        if -(-self.num_chunks // manifest["index_rows"]) > MOST_FILES:
            raise StoreError(f"{folder} is in more than {MOST_FILES} files", "index_rows", f"rm -r {folder}")
        self._mapped: list[Any] = []  # Faiss does not keep the lists that it is given
        self._indexes = [(start, self._read(start)) for start in range(0, self.num_chunks, manifest["index_rows"])]

    def _read(self, start: int) -> Any:
        """One index file as a Faiss index, its lists memory-mapped; an exact one where the index is Flat."""
        import faiss

        number, rows = start // self.manifest["index_rows"], self.manifest["index_rows"]
        last = min(start + rows, self.num_chunks)
        if self.factory == "Flat":
            if start == 0 and last == self.num_chunks and has_gpu():
                return ExactSearch(self.vectors, self.metric)
            index = (
                faiss.IndexFlatIP(self.vectors.width) if self.metric == "ip" else faiss.IndexFlatL2(self.vectors.width)
            )
            for first in range(start, last, vectors_module.SHARD_ROWS):
                index.add(self.vectors.rows(first, min(first + vectors_module.SHARD_ROWS, last)))
            return index
        if not num_lists(self.factory):
            index = read_faiss(self._named(f"whole-{number:05d}.faiss"))
            self._check_faiss(index, last - start)
            return index
        index = read_faiss(self._named("trained.faiss"))
        self._check_faiss(index, 0)
        ivf = faiss.extract_index_ivf(index)
        lists = ListsFile(self._named(f"lists-{number:05d}.bin"), ivf.nlist, ivf.code_size)
        if int(lists.sizes.sum()) != last - start:
            raise StoreError(
                f"{lists.path} has {lists.sizes.sum()} vectors", f"expected {last - start}", "retro index again"
            )
        self._mapped.append(map_lists(ivf, lists))
        ivf.ntotal = index.ntotal = last - start
        return index

    def _named(self, name: str) -> Path:
        """A file whose hash was checked, because the manifest names it. Raises StoreError for another."""
        if name not in self.manifest["files"]:
            raise StoreError(
                f"{self.folder} does not name {name}", f"an index {self.factory:.40} has it", f"rm -r {self.folder}"
            )
        return self.folder / name

    def _check_faiss(self, index: Any, total: int) -> None:
        import faiss

        metric = faiss.METRIC_INNER_PRODUCT if self.metric == "ip" else faiss.METRIC_L2
        if (index.d, index.ntotal, index.metric_type, index.is_trained) != (self.vectors.width, total, metric, True):
            raise StoreError(
                f"{self.folder} has a Faiss index of width {index.d}, {index.ntotal} vectors, metric {index.metric_type}",
                f"expected width {self.vectors.width}, {total} vectors, {self.metric}",
                f"rm -r {self.folder}, then retro index {self.store.folder}",
            )

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    def search_vectors(
        self, queries_QZ: np.ndarray, k: int, exclude: LeftOut | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best chunks of each vector: ids [Q, k] (-1 = fewer) and scores [Q, k], best first.

        `exclude`: rows that a query must not find. The score of l2 is 1 / (1 + d^2).
        """
        if k < 1:
            raise UsageError(f"k={k} cannot be used", "at least one neighbor is searched for")
        queries = np.ascontiguousarray(queries_QZ, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.vectors.width:
            raise UsageError(f"queries {queries.shape} cannot be searched", f"the index has width {self.vectors.width}")
        if exclude is None and k <= self.num_chunks:
            return self._nearest(queries, k)
        ids = np.full((len(queries), k), -1, np.int64)
        scores = np.zeros((len(queries), k), np.float32)
        left_out = np.zeros(len(queries), np.int64) if exclude is None else exclude.counts
        waiting = np.arange(len(queries))
        extra = min(EXTRA, int(left_out.max(initial=0)))
        while len(waiting):
            fetch = min(k + extra, max(1, self.num_chunks))
            found, value = self._nearest(queries[waiting], fetch)
            dropped = found < 0
            if exclude is not None:
                dropped |= exclude.holds(found, waiting)
            is_short = ((~dropped).sum(1) < k) & (found[:, -1] >= 0) & (fetch < k + left_out[waiting])
            is_short &= fetch < self.num_chunks
            order = np.argsort(dropped, axis=1, kind="stable")[:, :k]
            kept = np.take_along_axis(np.where(dropped, -1, found), order, 1)
            ids[waiting, : kept.shape[1]] = kept
            scores[waiting, : kept.shape[1]] = np.take_along_axis(np.where(dropped, 0, value), order, 1)
            waiting, extra = waiting[is_short], 8 * extra + 1
        return ids, scores

    def _nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Over all index files: ids and scores [Q, k], higher is better."""
        wide = min(k * REFINE, self.num_chunks) if ",PQ" in self.factory else k
        each = [self._search_file(start, index, queries, wide) for start, index in self._indexes]
        found, values = each[0] if len(each) == 1 else (np.concatenate(part, 1) for part in zip(*each))
        if found.size and (found.max() >= self.num_chunks or found.min() < -1):
            raise StoreError(
                f"{self.folder} holds chunk {found.max()}", f"the store has {self.num_chunks}", "retro index"
            )
        if wide != k:
            values = self._compare(queries, found)
        if self.metric == "l2":
            values = 1 / (1 + np.maximum(values, 0))
        elif self.vectors.embedding.name == "hash":
            found = np.where(values > 0, found, -1)  # nothing in common
        if len(each) > 1 or wide != k:  # else they are in order, what is missing last
            order = np.argsort(np.where(found >= 0, -values, np.inf), axis=1, kind="stable")[:, :k]
            found, values = np.take_along_axis(found, order, 1), np.take_along_axis(values, order, 1)
        return found, np.where(found >= 0, values, np.float32(0)).astype(np.float32, copy=False)

    def _search_file(self, start: int, index: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and Faiss' values of one index file; lists hold the store's own ids, other kinds count from 0."""
        values, found = index.search(queries, k, **self._parameters(index))
        if start and not num_lists(self.factory):
            found = np.where(found >= 0, found + start, -1)
        return found, values

    def _parameters(self, index: Any) -> dict[str, Any]:
        import faiss

        if not num_lists(self.factory):
            return {}
        library: Any = faiss  # its stubs do not know keyword arguments
        parameters = library.SearchParametersIVF(nprobe=self.nprobe)
        is_wrapped = isinstance(index, faiss.IndexPreTransform)
        return {"params": library.SearchParametersPreTransform(index_params=parameters) if is_wrapped else parameters}

    def _compare(self, queries: np.ndarray, found: np.ndarray) -> np.ndarray:
        """The exact values of results, from the stored vectors."""
        near = self.vectors.take(np.maximum(found, 0))
        if self.metric == "ip":
            return np.einsum("qz,qkz->qk", queries, near)
        return np.square(near - queries[:, None]).sum(2)

    def search(
        self, tokens_QM: np.ndarray, lengths_Q: np.ndarray, k: int, exclude: LeftOut | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`search_vectors` for rows of token ids."""
        if self.vectors.embedding.name == "hash":
            return self.search_vectors(embed(tokens_QM, lengths_Q), k, exclude)
        rows = [row[:length] for row, length in zip(tokens_QM.tolist(), lengths_Q.tolist())]
        return self.search_vectors(self.embed_texts(self.store.tokenizer.decode_batch(rows)), k, exclude)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        return open_embedder(self.vectors.embedding, self.model).texts(texts, self.store)

    def verify(self) -> None:
        """Compare every file with the manifests (opening has done so with the index's own, which Faiss reads unseen)."""
        files.verify_files(self.folder, self.manifest["files"])
        files.verify_files(self.vectors.folder, self.vectors.manifest["files"])

    def summary(self) -> dict[str, Any]:
        keys = (
            "kind",
            "retriever",
            "factory",
            "metric",
            "chunks",
            "nprobe",
            "recall",
            "recall_k",
            "store",
            "embeddings",
        )
        held = sum((self.folder / name).stat().st_size for name in self.manifest["files"])
        each = held / max(1, self.num_chunks) or self.vectors.width * self.vectors.embedding.dtype.itemsize
        shown = {key: self.manifest[key] for key in keys}
        return {**shown, "bytes_per_vector": round(each, 1), "fingerprint": self.fingerprint}
