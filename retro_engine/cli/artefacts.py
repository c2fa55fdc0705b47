"""Whatever is published, opened by what it is, and what it holds as lines to read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.data import files
from retro_engine.data.neighbor_table import NeighborTable
from retro_engine.data.store import Store
from retro_engine.errors import MissingInputError
from retro_engine.library.file import FILE
from retro_engine.library.library import Library
from retro_engine.memory.knn_memory import KnnMemory
from retro_engine.memory.ngram_memory import NgramMemory
from retro_engine.model.encoding_file import EncodingFile
from retro_engine.retrieval.index import VectorIndex
from retro_engine.retrieval.lexical import Bm25Index
from retro_engine.retrieval.vectors import Vectors
from retro_engine.train import checkpoint

SAMPLE_NEIGHBORS = 3


class Checkpoint:
    """A checkpoint's folder, with the methods of the others."""

    def __init__(self, folder: Path):
        self.folder = folder

    def summary(self) -> dict[str, Any]:
        base = checkpoint.read_base(self.folder)
        beside = {} if base is None else {"adapters": asdict(base.lora), "base": str(base.folder)}
        return {"kind": "checkpoint", "path": str(self.folder), **beside, **checkpoint.read_trainer(self.folder)}

    def verify(self) -> None:
        checkpoint.verify(self.folder)


Chunks = Store | NeighborTable | Vectors | Bm25Index | VectorIndex
Other = Library | Checkpoint | EncodingFile | NgramMemory | KnnMemory  # of which no sample is shown


@contextmanager
def open_artefact(path: str | Path) -> Iterator[Chunks | Other]:
    """A store, a neighbor table, vectors, an index, encodings, a memory, a library, or the best checkpoint of a run.

    Raises MissingInputError for what is none of them, StoreError for one that is damaged.
    """
    path = Path(path)
    is_run = any(path.glob("checkpoints")) or any(path.glob("*/checkpoints"))
    if is_run or (path / checkpoint.COMPLETE).exists():
        yield Checkpoint(checkpoint.find_checkpoint(path))
    elif (path / FILE).is_file():
        with Library(path, is_read_only=True) as library:
            yield library
    elif (path / files.MANIFEST).is_file():
        yield _published(path)
    else:
        raise MissingInputError(
            f"{path} is not a store, table, index, library, run or checkpoint", "it has no manifest.json"
        )


def _published(path: Path) -> Chunks | EncodingFile | NgramMemory | KnnMemory:
    kind = files.kind_in(path) or "store"  # reading it as one says what is wrong
    if kind == "encodings":
        return EncodingFile(path)
    if kind == "ngram":
        return NgramMemory(path)
    if kind == "knn":
        return KnnMemory(path)
    store = Store(path.parent.parent if kind in ("neighbors", "index", "embeddings") else path)
    if kind == "neighbors":
        return NeighborTable(path, store)
    if kind == "index":
        return Bm25Index(path, store) if path.name == "bm25" else VectorIndex(path, store)
    return Vectors(path, store) if kind == "embeddings" else store


def samples(opened: Chunks, count: int) -> Iterator[str]:
    """Lines on some chunks, evenly spread: each with its neighbors, its vector, or what an index finds for it."""
    store = _store_of(opened)
    for row in np.linspace(0, store.num_rows - 1, min(count, store.num_rows)).astype(int).tolist():
        yield f"\n{_named(store, row, row)}"
        if isinstance(opened, NeighborTable):
            for chunk in opened.ids(np.array([row]), min(SAMPLE_NEIGHBORS, opened.num_neighbors))[0].tolist():
                if chunk >= 0:
                    yield f"    {_named(*opened.locate(chunk), chunk)}"
        elif isinstance(opened, Vectors):
            yield f"    {np.array2string(opened.rows(row, row + 1)[0], precision=3, threshold=8)}"
        elif not isinstance(opened, Store):
            yield from _found(opened, store, row)


def _store_of(opened: Chunks) -> Store:
    if isinstance(opened, NeighborTable):
        return opened.query
    if isinstance(opened, Vectors):
        return Store(opened.folder.parent.parent)
    return opened if isinstance(opened, Store) else opened.store


def _named(store: Store, row: int, number: int) -> str:
    """A chunk by its number, with its document."""
    identifier, title = store.name(store.document_of(row))
    return f"{number} [{identifier} {title}] {' '.join(store.text(row).split())}"


def _found(index: VectorIndex | Bm25Index, store: Store, row: int) -> Iterator[str]:
    depth = SAMPLE_NEIGHBORS + 1  # it finds itself
    if isinstance(index, VectorIndex):
        ids, scores = index.search_vectors(index.vectors.rows(row, row + 1), depth)
    else:
        ids, scores = index.search([store.text(row)], depth)
    for chunk, score in zip(ids[0].tolist(), scores[0].tolist()):
        if chunk >= 0 and chunk != row:
            yield f"    {chunk} {score:.3f} {' '.join(store.text(chunk).split())}"
