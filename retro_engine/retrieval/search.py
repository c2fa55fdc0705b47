"""One retriever over one or more stores: lexical, dense, or both by reciprocal rank fusion.

Letters: Q queries, K neighbors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.data.coding import Coding
from retro_engine.data.contents import hide_copies, number_contents
from retro_engine.data.loader import NeighborLoader
from retro_engine.data.neighbor_table import check_databases
from retro_engine.data.store import Store
from retro_engine.errors import MissingInputError, StoreError, UsageError, nearest
from retro_engine.progress import Reporter
from retro_engine.retrieval import bm25
from retro_engine.retrieval.analyzer import Analyzer
from retro_engine.retrieval.embed import short_name
from retro_engine.retrieval.executor import Executor
from retro_engine.retrieval.hit import RANK_OFFSET, Counts, Found, Hit, drop_overlaps
from retro_engine.retrieval.index import VectorIndex
from retro_engine.retrieval.index_build import build_index
from retro_engine.retrieval.left_out import LeftOut
from retro_engine.retrieval.lexical import Bm25Index, check_analyzers
from retro_engine.retrieval.vectors import Vectors, build_vectors, vectors_folder

RETRIEVERS = ("bm25", "hash", "hybrid", "minilm")
FUSION_DEPTH = 100  # results of each retriever that are fused


@dataclass(frozen=True)
class Building:
    """How what is missing gets built; all of it is optional."""

    executor: Executor = field(default_factory=Executor)
    reporter: Reporter = field(default_factory=lambda: Reporter("quiet"))
    factory: str = "auto"  # of the Faiss index
    metric: str = "auto"  # ip, l2
    embedder: str = "minilm"  # the dense half of hybrid
    fusion: tuple[float, float] = (1.0, 1.0)  # weights of hybrid's lexical and dense half
    choices: dict[str, Any] = field(default_factory=dict)  # of embed.choose_embedding
    analyzer: Analyzer | None = None  # how bm25 reads words; None = as the index that is there, or the default


def index_folder(store: Store, retriever: str) -> Path:
    return store.folder / "index" / short_name(retriever)


def named(retriever: str, embedder: str) -> str:
    """The name of a retriever, which its index and its tables have: lexical is bm25, dense the embedder."""
    return {"lexical": "bm25", "dense": embedder}.get(retriever, retriever)


def check_retriever(retriever: str) -> None:
    """Raise UsageError for what is neither a retriever nor can be a model: a folder, or a hub id ORG/NAME."""
    if retriever not in RETRIEVERS and not Path(retriever).is_dir() and "/" not in retriever:
        close = nearest(retriever, [*RETRIEVERS, "lexical", "dense"])
        raise UsageError(
            f"retriever {retriever!r} does not exist",
            close,
            f"lexical, dense, {', '.join(RETRIEVERS)}, or a SentenceTransformers model: a folder or a hub id",
        )


def halves(retriever: str, embedder: str) -> tuple[str, ...]:
    """The retrievers that one consists of."""
    check_retriever(retriever)
    return ("bm25", embedder) if retriever == "hybrid" else (retriever,)


def make_index(store: Store, retriever: str, building: Building) -> Bm25Index | VectorIndex:
    """Build the index of a store: what is there and whole is kept, what is missing or damaged is built."""
    check_retriever(retriever)
    folder = index_folder(store, retriever)
    if retriever == "bm25":
        return Bm25Index.build(store, folder, building.executor, building.reporter, building.analyzer)
    return build_index(
        store,
        retriever,
        folder=folder,
        factory=building.factory,
        metric=building.metric,
        executor=building.executor,
        reporter=building.reporter,
        **building.choices,
    )


def find_index(store: Store, retriever: str, building: Building | None = None) -> Bm25Index | VectorIndex:
    """The index of a store, built when it is not there."""
    check_retriever(retriever)
    folder = index_folder(store, retriever)
    try:
        return Bm25Index(folder, store) if retriever == "bm25" else VectorIndex(folder, store, retriever)
    except FileNotFoundError:
        return make_index(store, retriever, building or Building())


class Retriever:
    """Searches several stores as one collection; chunk ids count through them in order."""

    def __init__(
        self,
        stores: Sequence[Store],
        retriever: str = "bm25",
        merge_overlaps: bool = True,
        building: Building | None = None,
        weights: Sequence[float] | None = None,
    ):
        """Opens (and where missing builds) the index of every store.

        `merge_overlaps` leaves out hits that overlap better ones, as neighbors of more than one chunk do (r > m).
        `weights`, one a store, multiply its scores. Raises StoreError for stores that do not fit, UsageError for
        one that is named twice and for weights that are not above 0.
        """
        check_databases(stores)
        self.building = building or Building()
        self.kind = named(retriever, self.building.embedder)
        self.stores, self.merge_overlaps = list(stores), merge_overlaps
        self.weights = np.array([1.0] * len(stores) if weights is None else weights, np.float32)
        if len(self.weights) != len(stores) or not (np.isfinite(self.weights) & (self.weights > 0)).all():
            given = " ".join(map(str, weights or ()))
            raise UsageError(f"--source-weights {given} cannot be used", "one number above 0 for each store")
        self.loader = NeighborLoader(stores)
        self.halves = halves(self.kind, self.building.embedder)
        self._indexes = {half: [find_index(store, half, self.building) for store in stores] for half in self.halves}
        for half in self.halves:
            _check_embeddings([index.vectors for index in self._dense(half)])
        check_analyzers([index for index in self.indexes if isinstance(index, Bm25Index)])
        self.starts = np.cumsum([0] + [store.num_rows for store in stores])
        first_documents = np.cumsum([0] + [store.num_documents for store in stores])
        self._row_documents = np.concatenate([s.row_documents() + first for s, first in zip(stores, first_documents)])
        self._copies = _copies(stores)
        self._span = 3 if merge_overlaps else 1  # results asked for per neighbor kept: its own chunk and both beside it

    @property
    def indexes(self) -> list[Bm25Index | VectorIndex]:
        return [index for half in self.halves for index in self._indexes[half]]

    @property
    def fingerprint(self) -> str:
        return "+".join(index.fingerprint[:12] for index in self.indexes)

    def search(
        self,
        texts: Sequence[str],
        k: int,
        beside: Callable[[np.ndarray], Counts] | None = None,
        exclude: Sequence[LeftOut | None] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids [q, k] (-1 = fewer were found) and scores [q, k], best first; of copies only the first. `beside`: counts of terms
        in another collection, with whose BM25 scores these shall be comparable. `exclude` gives, per database, rows to leave out.
        """
        if exclude is None:
            nothing = np.full(len(texts), -1, np.int32)
            exclude = [None if copies is None else copies.for_queries(nothing) for copies in self._copies]
        embed = lambda half: self._dense(half)[0].embed_texts(texts)  # noqa: E731
        return self._search(k, exclude, lambda: texts, embed, beside)

    def search_rows(
        self, query: Store, first: int, last: int, k: int, exclude: Sequence[LeftOut | None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """`search` for rows first ... last - 1 of a store; `exclude` gives, per database, rows to leave out.

        Dense retrievers compare chunks as documents, by the stored vectors of both stores.
        """
        query.coding.check(self.coding)
        texts = lambda: [text for batch in query.texts(first, last) for text in batch]  # noqa: E731
        return self._search(k, exclude, texts, lambda half: self.query_vectors(query, half).rows(first, last))

    def _search(
        self,
        k: int,
        exclude: Sequence[LeftOut | None],
        texts: Callable[[], Sequence[str]],
        vectors: Callable[[str], np.ndarray],
        beside: Callable[[np.ndarray], Counts] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        found, depth = [], self._depth(k)
        for half in self.halves:
            if half == "bm25":
                each = self._search_bm25(texts(), depth, exclude, beside)
            else:
                queries, pairs = vectors(half), zip(self._dense(half), exclude)
                each = [index.search_vectors(queries, depth, without) for index, without in pairs]
            found.append(self._over_stores(each, depth))
        ids, scores = found[0] if len(found) == 1 else fused(found, self.building.fusion, k * self._span)
        if self.merge_overlaps:
            ids, scores = self._without_overlaps(ids, scores)
        return ids[:, :k], scores[:, :k]

    def query_vectors(self, query: Store, half: str) -> Vectors:
        """The vectors of a query store; they are built when they are not there."""
        for index in self._dense(half):
            if index.store.fingerprint == query.fingerprint:
                return index.vectors
        try:
            vectors = Vectors(vectors_folder(query, half), query)
        except MissingInputError:
            b = self.building
            known = self._dense(half)[0].vectors.embedding
            same = {key: getattr(known, key) for key in ("precision", "pooling", "query_prompt", "document_prompt")}
            vectors = build_vectors(query, half, b.executor, b.reporter, **same)
        _check_embeddings([vectors, *(index.vectors for index in self._dense(half))])
        return vectors

    def _dense(self, half: str) -> list[VectorIndex]:
        return [index for index in self._indexes[half] if isinstance(index, VectorIndex)]

    def _depth(self, k: int) -> int:
        return max(FUSION_DEPTH, k * self._span) if len(self.halves) > 1 else k * self._span

    def _over_stores(self, each: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
        weighted = [
            (ids, np.where(scores > 0, scores * weight, scores / weight))
            for (ids, scores), weight in zip(each, self.weights)
        ]
        return best_over_stores(weighted, self.starts, k)

    def _without_overlaps(self, ids: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of hits beside each other in one document the better, and a document's last chunk with the one before it; what is
        dropped leaves -1 at the end.
        """
        rows = np.maximum(ids, 0)
        documents = np.where(ids >= 0, self._row_documents[rows], -1)
        following = self._row_documents[np.minimum(rows + 1, self.starts[-1] - 1)]
        is_last = (following != documents) | (rows + 1 == self.starts[-1])
        is_last &= (rows > 0) & (self._row_documents[np.maximum(rows - 1, 0)] == documents)
        kept = drop_overlaps(documents, rows, is_last, 2)  # rows of one document count as its chunks do
        place, is_kept = np.maximum(kept, 0), kept >= 0
        ids = np.where(is_kept, np.take_along_axis(rows, place, 1), -1)
        return ids, np.where(is_kept, np.take_along_axis(scores, place, 1), 0).astype(scores.dtype, copy=False)

    def _search_bm25(
        self,
        texts: Sequence[str],
        k: int,
        exclude: Sequence[LeftOut | None],
        beside: Callable[[np.ndarray], Counts] | None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each store's best, scored with the document frequencies of all stores together, and of what is beside them."""
        indexes = self._words
        if len(indexes) == 1 and beside is None:
            return [indexes[0].search(texts, k, exclude[0])]
        hashes = np.unique(indexes[0].analyzer.terms(texts, is_query=True).hashes)
        frequencies, num_chunks = self.counts(hashes)
        others = (0, 0) if beside is None else beside(hashes)
        together = hashes, bm25.idf(frequencies + others[0], num_chunks + others[1])
        return [index.search(texts, k, rows, together) for index, rows in zip(indexes, exclude)]

    @property
    def _words(self) -> list[Bm25Index]:
        return [index for index in self._indexes.get("bm25", ()) if isinstance(index, Bm25Index)]

    @property
    def analyzer(self) -> Analyzer | None:
        """How words are read; None where neighbors are not found by words alone."""
        return self._words[0].analyzer if self.halves == ("bm25",) else None

    def counts(self, hashes: np.ndarray) -> Counts:
        """How many chunks have each of these terms, and how many there are."""
        frequencies = np.sum([index.frequencies(hashes) for index in self._words], axis=0)
        return frequencies, sum(index.num_chunks for index in self._words)

    def hits(self, text: str, k: int) -> list[Hit]:
        """The k best chunks for a text, with their documents."""
        ids, scores = self.search([text], k)
        return [self.hit(int(chunk), float(score)) for chunk, score in zip(ids[0], scores[0]) if chunk >= 0]

    @property
    def name(self) -> str:
        return str(self.stores[0].folder)

    @property
    def coding(self) -> Coding:
        return self.stores[0].coding

    @property
    def version(self) -> str:
        return self.fingerprint

    def neighbors(
        self,
        texts: Sequence[str],
        k: int,
        retrieved_length: int,
        mode: str | None = None,
        where: Any = None,
        beside: Callable[[np.ndarray], Counts] | None = None,
    ) -> list[Found]:
        """The k best of each text, as tokens. `mode` says nothing to published stores; `beside` as in `search`."""
        if where is not None:
            raise UsageError("a filter cannot be used", "documents of stores have no metadata", "name a library")
        ids, scores = self.search(texts, k, beside)
        tokens, lengths = self.loader.gather(ids, retrieved_length)
        hits = [
            [self.hit(int(i), float(s)) for i, s in zip(row, row_scores) if i >= 0]
            for row, row_scores in zip(ids, scores)
        ]
        return [Found(*found) for found in zip(tokens, lengths, hits)]

    def hit(self, chunk: int, score: float = 0.0) -> Hit:
        """What chunk `chunk` of the stores, counted through them, is."""
        number = int(np.searchsorted(self.starts, chunk, "right")) - 1
        return store_hit(self.stores[number], chunk - int(self.starts[number]), score)


def store_hit(store: Store, row: int, score: float = 0.0) -> Hit:
    """What a store's row is."""
    document = store.document_of(row)
    chunk = row - store.document_rows(document)[0]
    return Hit(*store.name(document), chunk, score, store.text(row), store.continuation(row), store.folder.name)


def _copies(stores: Sequence[Store]) -> list[LeftOut | None]:
    """For each store what of it repeats a document of it or of those before; None where nothing does.

    Old stores, whose contents would have to be computed from all their tokens, are searched with their copies.
    """
    none: list[LeftOut | None] = [None] * len(stores)
    if not all(store.has_contents for store in stores):
        return none
    numbers = number_contents([store.contents for store in stores])
    if len(np.unique(np.concatenate(numbers))) == sum(map(len, numbers)):
        return none
    return list(copies_left_out(stores, numbers))


def copies_left_out(stores: Sequence[Store], numbers: Sequence[np.ndarray]) -> list[LeftOut]:
    """For the content numbers [documents] of each store: rows of all but the first copy are found by no query."""
    return [LeftOut.of(part[store.row_documents()]) for store, part in zip(stores, hide_copies(numbers))]


def _check_embeddings(vectors: Sequence[Vectors]) -> None:
    """Raise StoreError when vectors that shall be compared were made by different embedders, naming both."""
    for other in vectors[1:]:
        if other.embedding != vectors[0].embedding:
            first, second = vectors[0].embedding, other.embedding
            raise StoreError(
                f"{vectors[0].folder} is of {first.name} {first.fingerprint[:12]} {first.precision}",
                f"{other.folder} is of {second.name} {second.fingerprint[:12]} {second.precision}",
                "build one of them again with the other's embedder",
            )


def best_over_stores(
    found: Sequence[tuple[np.ndarray, np.ndarray]], starts: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of several stores' results; ids are shifted to count through the stores."""
    ids = np.concatenate([np.where(i >= 0, i + start, -1) for (i, _), start in zip(found, starts)], 1)
    scores = np.concatenate([s for _, s in found], 1)
    order = np.argsort(np.where(ids >= 0, -scores, np.inf), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)


def fused(
    found: Sequence[tuple[np.ndarray, np.ndarray]], weights: Sequence[float], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of several retrievers' results, as `fuse` joins them for one query; ties keep the lower id."""
    parts = [(ids, weight) for (ids, _), weight in zip(found, weights) if weight]
    ids = np.concatenate([ids for ids, _ in parts], 1)
    ranks = np.concatenate([np.cumsum(ids >= 0, axis=1) for ids, _ in parts], 1)
    worth = np.repeat([weight for _, weight in parts], [ids.shape[1] for ids, _ in parts]) / (RANK_OFFSET + ranks)
    is_found = ids >= 0
    queries = np.nonzero(is_found)[0]
    most = int(ids.max(initial=0)) + 1
    keys, places = np.unique(queries * most + ids[is_found], return_inverse=True)
    scores = np.bincount(places, worth[is_found], len(keys))
    queries, chunks = keys // most, keys % most
    order = np.lexsort((chunks, -scores, queries))
    queries, chunks, scores = queries[order], chunks[order], scores[order]
    ranks = np.arange(len(queries)) - np.searchsorted(queries, queries)
    kept = ranks < k
    out_ids = np.full((len(ids), k), -1, np.int64)
    out_scores = np.zeros((len(ids), k), np.float32)
    out_ids[queries[kept], ranks[kept]] = chunks[kept]
    out_scores[queries[kept], ranks[kept]] = scores[kept]
    return out_ids, out_scores
