"""Vectors of a store's chunks and their Faiss index: exact inner product (Flat) over hashed projections.

Reads and writes EMBEDDINGS/manifest.json with vectors.npy and INDEX/manifest.json. A Flat index is its vectors,
so no Faiss file is written or read. Letters: U chunks, Q queries, Z embedding width, K neighbors.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.data import files
from retro_engine.data.store import Store
from retro_engine.errors import StoreError, UsageError
from retro_engine.retrieval.embed import WIDTH, embed

EMBED_ROWS = 1 << 16


def embed_store(store: Store, folder: Path) -> dict[str, Any]:
    """Publish the vectors of every chunk in `folder`; return its manifest. Kept when it is already there."""
    try:
        manifest = files.read_manifest(folder, "embeddings")
        if manifest["store"] == store.fingerprint:
            return manifest
    except FileNotFoundError:
        pass
    parts = []
    for start in range(0, store.num_rows, EMBED_ROWS):
        parts.append(embed(*store.rows(start, min(start + EMBED_ROWS, store.num_rows))))
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate(parts), allow_pickle=False)
    with files.locked(folder):
        files.publish(folder / "vectors.npy", [buffer.getbuffer()])
        hashes = {"vectors.npy": files.sha256_file(folder / "vectors.npy")}
        content = {"embedder": "hash", "store": store.fingerprint, "width": WIDTH, "files": hashes}
        files.write_manifest(folder, "embeddings", content)
    return files.read_manifest(folder, "embeddings")


class HashIndex:
    """Exact nearest chunks by inner product of hashed projections."""

    def __init__(self, folder: Path, store: Store):
        """Raises MissingInputError, or StoreError for an index of another store or damaged vectors."""
        import faiss

        self.folder, self.store = folder, store
        self.manifest = files.read_manifest(folder, "index")
        vectors_folder = folder / self.manifest["embeddings_path"]
        vectors_manifest = files.read_manifest(vectors_folder, "embeddings")
        for what, here, there in (
            ("store", self.manifest["store"], store.fingerprint),
            ("embeddings", self.manifest["embeddings"], vectors_manifest["fingerprint"]),
        ):
            if here != there:
                raise StoreError(
                    f"{folder} indexes {what} {here[:12]}",
                    f"{store.folder} has {there[:12]}",
                    f"retro index {store.folder}",
                )
        files.verify_files(vectors_folder, vectors_manifest["files"])
        vectors = np.load(vectors_folder / "vectors.npy", allow_pickle=False)
        if vectors.shape != (store.num_rows, vectors_manifest["width"]):
            raise StoreError(f"{vectors_folder} has vectors {vectors.shape}", f"the store has {store.num_rows} chunks")
        self.num_chunks = store.num_rows
        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(vectors)

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @classmethod
    def build(cls, store: Store, folder: Path) -> "HashIndex":
        vectors = embed_store(store, folder.parent.parent / "embeddings" / "hash")
        with files.locked(folder):
            content = {
                "retriever": "hash",
                "factory": "Flat",
                "metric": "inner product",
                "store": store.fingerprint,
                "chunks": store.num_rows,
                "embeddings": vectors["fingerprint"],
                "embeddings_path": "../../embeddings/hash",
                "files": {},
            }
            files.write_manifest(folder, "index", content)
        return cls(folder, store)

    def search(
        self, tokens_QM: np.ndarray, lengths_Q: np.ndarray, k: int, exclude: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best chunks of each row of token ids: ids [Q, k] (-1 = fewer) and scores [Q, k], best first.

        `exclude` [Q, 2]: rows first ... last - 1 that a query must not find.
        """
        if k < 1:
            raise UsageError(f"k={k} cannot be used", "at least one neighbor is searched for")
        extra = 0 if exclude is None or not len(exclude) else int((exclude[:, 1] - exclude[:, 0]).max())
        scores, ids = self._index.search(embed(tokens_QM, lengths_Q), min(k + extra, max(1, self.num_chunks)))
        dropped = (ids < 0) | (scores <= 0)
        if exclude is not None:
            dropped |= (ids >= exclude[:, :1]) & (ids < exclude[:, 1:])
        order = np.argsort(dropped, axis=1, kind="stable")[:, :k]
        ids = np.take_along_axis(np.where(dropped, -1, ids), order, 1)
        scores = np.take_along_axis(np.where(dropped, 0, scores), order, 1)
        missing = k - ids.shape[1]
        return np.pad(ids, ((0, 0), (0, missing)), constant_values=-1), np.pad(scores, ((0, 0), (0, missing)))

    def search_texts(self, texts: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """`search` for texts, cut at a chunk's length from the end: what precedes the answer counts."""
        m = self.store.chunk_size
        rows = [ids[-m:] for ids in self.store.tokenizer.encode_batch(texts)]
        tokens = np.zeros((len(rows), m), np.int64)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = row
        return self.search(tokens, np.array([len(row) for row in rows]), k)

    def summary(self) -> dict[str, Any]:
        keys = ("kind", "retriever", "factory", "chunks", "store", "fingerprint")
        return {key: self.manifest[key] for key in keys}
