"""Whatever is published, opened by what it is: a store, a neighbor table, vectors, an index, a library, a checkpoint."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.data import files
from retro_engine.data.neighbor_table import NeighborTable
from retro_engine.data.store import Store
from retro_engine.errors import MissingInputError
from retro_engine.library.file import FILE
from retro_engine.library.library import Library
from retro_engine.retrieval.index import VectorIndex
from retro_engine.retrieval.lexical import Bm25Index
from retro_engine.retrieval.vectors import Vectors
from retro_engine.train import checkpoint

SAMPLE_NEIGHBORS = 3


@dataclass(frozen=True, kw_only=True)
class Artefact:
    opened: Any  # a Store, NeighborTable, Vectors, Bm25Index, VectorIndex or Library; the folder of a checkpoint
    summary: Callable[[], dict[str, Any]]
    verify: Callable[[], object]  # compares every file with its checksum; raises StoreError
    store: Store | None = None  # whose chunks it is about


@contextmanager
def open_artefact(path: str | Path) -> Iterator[Artefact]:
    """Raises MissingInputError for what is none of them, StoreError for one that is damaged."""
    path = Path(path)
    if (path / "checkpoints").is_dir() or (path / checkpoint.COMPLETE).exists():
        yield _checkpoint(checkpoint.find_checkpoint(path))
    elif (path / FILE).is_file():
        with Library(path, is_read_only=True) as library:
            yield Artefact(opened=library, summary=library.statistics, verify=library.verify)
    elif (path / files.MANIFEST).is_file():
        yield _published(path)
    else:
        raise MissingInputError(
            f"{path} is not a store, table, index, library, run or checkpoint", "it has no manifest.json"
        )


def _checkpoint(folder: Path) -> Artefact:
    def summary() -> dict[str, Any]:
        return {"kind": "checkpoint", "path": str(folder), **checkpoint.read_trainer(folder)}

    return Artefact(opened=folder, summary=summary, verify=lambda: checkpoint.verify(folder))


def _published(path: Path) -> Artefact:
    try:
        kind = files.read_json(path / files.MANIFEST).get("kind")
    except (ValueError, AttributeError, OSError):
        kind = "store"  # reading it as one says what is wrong
    store = Store(path.parent.parent if kind in ("neighbors", "index", "embeddings") else path)
    opened: Any = store
    if kind == "neighbors":
        opened = NeighborTable(path, store)
    elif kind == "index":
        opened = Bm25Index(path, store) if path.name == "bm25" else VectorIndex(path, store)
    elif kind == "embeddings":
        opened = Vectors(path, store)
    return Artefact(opened=opened, summary=opened.summary, verify=opened.verify, store=store)


def samples(artefact: Artefact, count: int) -> Iterator[str]:
    """Lines on some chunks, evenly spread: each with its neighbors, what an index finds for it, or its vector."""
    store, opened = artefact.store, artefact.opened
    if store is None:
        return
    for row in np.linspace(0, store.num_rows - 1, min(count, store.num_rows)).astype(int).tolist():
        if isinstance(opened, Store | NeighborTable):
            yield f"\n{_shown(store, row, row)}"
            yield from _neighbors(opened, row) if isinstance(opened, NeighborTable) else ()
        else:
            yield f"\n{row} {' '.join(store.text(row).split())}"
            yield from _found(opened, store, row)


def _shown(store: Store, row: int, number: int) -> str:
    identifier, title = store.name(store.document_of(row))
    return f"{number} [{identifier} {title}] {' '.join(store.text(row).split())}"


def _neighbors(table: NeighborTable, row: int) -> Iterator[str]:
    for chunk in table.ids(np.array([row]), min(SAMPLE_NEIGHBORS, table.num_neighbors))[0].tolist():
        if chunk >= 0:
            yield f"    {_shown(*table.locate(chunk), chunk)}"


def _found(opened: Vectors | VectorIndex | Bm25Index, store: Store, row: int) -> Iterator[str]:
    if isinstance(opened, Vectors):
        yield f"    {np.array2string(opened.rows(row, row + 1)[0], precision=3, threshold=8)}"
        return
    depth = SAMPLE_NEIGHBORS + 1  # it finds itself
    if isinstance(opened, VectorIndex):
        ids, scores = opened.search_vectors(opened.vectors.rows(row, row + 1), depth)
    else:
        ids, scores = opened.search([store.text(row)], depth)
    for chunk, score in zip(ids[0].tolist(), scores[0].tolist()):
        if chunk >= 0 and chunk != row:
            yield f"    {chunk} {score:.3f} {' '.join(store.text(chunk).split())}"
