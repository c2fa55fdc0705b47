"""One retriever over one or more stores: text in, the best chunks with their documents out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retro_engine.data.loader import NeighborLoader
from retro_engine.data.neighbor_table import check_databases
from retro_engine.data.store import Store
from retro_engine.errors import UsageError, nearest
from retro_engine.jit import numba
from retro_engine.retrieval.index import HashIndex
from retro_engine.retrieval.lexical import Bm25Index

RETRIEVERS = ("bm25", "hash")


@dataclass(frozen=True)
class Hit:
    """One retrieved chunk. `chunk` counts through the retriever's stores."""

    chunk: int
    document: str
    title: str
    score: float
    text: str
    store: str


def index_folder(store: Store, retriever: str) -> Path:
    return store.folder / "index" / retriever


def check_retriever(retriever: str) -> None:
    if retriever not in RETRIEVERS:
        close = nearest(retriever, list(RETRIEVERS))
        raise UsageError(f"retriever {retriever!r} does not exist", close, f"one of {', '.join(RETRIEVERS)}")


def open_index(store: Store, retriever: str) -> Bm25Index | HashIndex:
    """The published index of a store."""
    check_retriever(retriever)
    folder = index_folder(store, retriever)
    return Bm25Index(folder, store) if retriever == "bm25" else HashIndex(folder, store)


def build_index(store: Store, retriever: str) -> Bm25Index | HashIndex:
    """The index of a store, built when it is not there."""
    check_retriever(retriever)
    try:
        return open_index(store, retriever)
    except FileNotFoundError:
        kind = Bm25Index if retriever == "bm25" else HashIndex
        return kind.build(store, index_folder(store, retriever))


class Retriever:
    """Searches several stores as one collection; chunk ids count through them in order."""

    def __init__(self, stores: Sequence[Store], retriever: str = "bm25", merge_overlaps: bool = True):
        """Opens (and where missing builds) the index of every store.

        `merge_overlaps` leaves out hits that overlap better ones, as neighbors of more than one chunk do (r > m).
        Raises StoreError for stores that do not fit, UsageError for one that is named twice.
        """
        check_databases(stores)
        self.stores, self.kind, self.merge_overlaps = list(stores), retriever, merge_overlaps
        self.loader = NeighborLoader(stores)
        self.indexes = [build_index(store, retriever) for store in stores]
        self.starts = np.cumsum([0] + [store.num_rows for store in stores])
        first_documents = np.cumsum([0] + [store.num_documents for store in stores])
        self._row_documents = np.concatenate([s.row_documents() + first for s, first in zip(stores, first_documents)])
        self._span = 3 if merge_overlaps else 1  # results asked for per neighbor kept: its own chunk and both beside it

    @property
    def fingerprint(self) -> str:
        return "+".join(index.fingerprint[:12] for index in self.indexes)

    def search(self, texts: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids [q, k] (-1 = fewer were found) and scores [q, k], best first."""
        if self.kind == "bm25":
            found = self._search_bm25(texts, k * self._span, [None] * len(self.stores))
        else:
            found = [
                index.search_texts(texts, k * self._span) for index in self.indexes if isinstance(index, HashIndex)
            ]
        return self._best(found, k)

    def search_rows(
        self, query: Store, first: int, last: int, k: int, exclude: Sequence[np.ndarray | None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """`search` for rows first ... last - 1 of a store; `exclude` gives, per database, [q, 2] rows to leave out."""
        if self.kind == "bm25":
            texts = [text for batch in query.texts(first, last) for text in batch]
            return self._best(self._search_bm25(texts, k * self._span, exclude), k)
        tokens, lengths = query.rows(first, last)
        found = [
            index.search(tokens, lengths, k * self._span, without)
            for index, without in zip(self.indexes, exclude)
            if isinstance(index, HashIndex)
        ]
        return self._best(found, k)

    def _best(self, found: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
        ids, scores = merge(found, self.starts, k * self._span)
        if self.merge_overlaps:
            drop_overlaps(ids, scores, self._row_documents)
        return ids[:, :k], scores[:, :k]

    def _search_bm25(
        self, texts: Sequence[str], k: int, exclude: Sequence[np.ndarray | None]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each store's best, scored with the document frequencies of all stores together."""
        indexes = [index for index in self.indexes if isinstance(index, Bm25Index)]
        if len(indexes) == 1:
            return [indexes[0].search(texts, k, exclude[0])]
        together: dict[str, int] = {}
        for index in indexes:
            for term, count in index.frequencies_of(texts).items():
                together[term] = together.get(term, 0) + count
        total = sum(index.num_chunks for index in indexes)
        return [index.search(texts, k, rows, together, total) for index, rows in zip(indexes, exclude)]

    def hits(self, text: str, k: int) -> list[Hit]:
        """The k best chunks for a text, with their documents."""
        ids, scores = self.search([text], k)
        return [self.hit(int(chunk), float(score)) for chunk, score in zip(ids[0], scores[0]) if chunk >= 0]

    def hit(self, chunk: int, score: float = 0.0) -> Hit:
        number = int(np.searchsorted(self.starts, chunk, "right")) - 1
        store, row = self.stores[number], chunk - int(self.starts[number])
        identifier, title = store.name(store.document_of(row))
        return Hit(chunk, identifier, title, score, store.text(row), store.folder.name)


def merge(found: Sequence[tuple[np.ndarray, np.ndarray]], starts: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of several stores' results; ids are shifted to count through the stores."""
    ids = np.concatenate([np.where(i >= 0, i + start, -1) for (i, _), start in zip(found, starts)], 1)
    scores = np.concatenate([s for _, s in found], 1)
    order = np.argsort(np.where(ids >= 0, -scores, np.inf), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)


@numba.njit(cache=True)
def drop_overlaps(ids, scores, row_documents):  # type: ignore[no-untyped-def]
    """Of hits beside each other in one document keep the better: as a neighbor it brings its continuation.

    Where the better one is its document's last chunk, nothing follows it: it moves one back, so that both are shown.
    Works in place; what is dropped leaves -1 at the end.
    """
    for query in range(ids.shape[0]):
        kept = 0
        for place in range(ids.shape[1]):
            chunk, score = ids[query, place], scores[query, place]
            if chunk < 0:
                break
            beside = -1
            for other in range(kept):
                better = ids[query, other]
                if abs(better - chunk) <= 1 and row_documents[better] == row_documents[chunk]:
                    beside = other
                    break
            if beside < 0:
                ids[query, kept], scores[query, kept] = chunk, score
                kept += 1
                continue
            better = ids[query, beside]
            is_last = better + 1 == len(row_documents) or row_documents[better + 1] != row_documents[better]
            if chunk == better - 1 and is_last:
                is_free = True
                for other in range(kept):
                    if ids[query, other] == chunk - 1 and row_documents[chunk - 1] == row_documents[chunk]:
                        is_free = False
                if is_free:
                    ids[query, beside] = chunk
        ids[query, kept:] = -1
        scores[query, kept:] = 0
