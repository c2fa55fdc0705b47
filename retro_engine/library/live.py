"""The one search over a live library and published stores: what generation reads, routes answer and commands print.

A document that was added is read from the next chunk on that asks; one that was deleted is not. Where both are searched by words,
and read them alike, their scores are those of one BM25 over the chunks of both (but for the mean length of a chunk, of which each
has its own), times the weight of each; else rankings are joined by reciprocal rank fusion.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from retro_engine.data.coding import Coding
from retro_engine.data.store import Store
from retro_engine.errors import UsageError
from retro_engine.library.documents import MAX_QUERY_CHARACTERS, check_query
from retro_engine.library.filters import Filter
from retro_engine.library.library import DEFAULT, Library
from retro_engine.library.search import check_mode, check_weights
from retro_engine.retrieval.hit import Counts, Found, Hit, fuse
from retro_engine.retrieval.search import Retriever


def library_coding(library: Library) -> Coding:
    """What a reader of its chunks must have too."""
    return Coding(str(library.folder), library.file.tokenizer.fingerprint, library.file.chunk_size, "library")


class LiveRetriever:
    """A `NeighborSource` over a library and, with `static`, stores."""

    def __init__(
        self,
        library: Library,
        static: Retriever | None = None,
        weights: Sequence[float] = (1.0, 1.0),
        mode: str = "lexical",
        namespace: str = DEFAULT,
    ):
        """`weights`: of the library and of the stores. Raises StoreError where their tokenizers or chunks differ."""
        check_mode(mode, (1.0, 1.0))
        check_weights(weights)
        if mode != "lexical" and library.chunker.width is None:
            raise UsageError(f"mode {mode} needs vectors", f"{library.folder} was made without an embedder", "lexical")
        self.library, self.static, self.weights = library, static, tuple(weights)
        self.mode, self.namespace = mode, namespace
        if static is not None:
            static.coding.check(self.coding)

    @property
    def name(self) -> str:
        return str(self.library.folder)

    @property
    def stores(self) -> list[Store]:
        return [] if self.static is None else self.static.stores

    @property
    def coding(self) -> Coding:
        return library_coding(self.library)

    @property
    def version(self) -> str:
        return f"{self.library.version} {self.static.version if self.static is not None else ''}"

    def check_least(self, mode: str | None) -> None:
        """Raises UsageError where a least score says nothing: what is joined by rank has no score of its own."""
        mode = mode or self.mode
        if mode == "hybrid" or (self.static is not None and not self._is_one(mode)):
            why = "rankings are joined there: their scores are of ranks"
            raise UsageError("min_score cannot be used", why, "lexical, or a library alone")

    def _is_one(self, mode: str) -> bool:
        """Whether library and stores are searched as one collection."""
        return mode == "lexical" and self.static is not None and self.static.analyzer == self.library.file.analyzer

    def search(
        self,
        text: str,
        k: int,
        mode: str | None = None,
        weights: Sequence[float] = (1.0, 1.0),
        retrieved_length: int | None = None,
        where: Filter | None = None,
    ) -> Found:
        """What generation would read for a text. Raises UsageError for an empty or huge one, and what else is refused.

        `weights`: of the halves of the library's hybrid mode. None: a chunk and as much of what follows it. `where`: of the
        library's documents that match; those of stores have no metadata, and do not.
        """
        check_query(text, k)
        check_mode(mode or self.mode, weights)
        length = 2 * self.coding.chunk_size if retrieved_length is None else retrieved_length
        return self.neighbors([text], k, length, mode, where, weights)[0]

    def neighbors(
        self,
        texts: Sequence[str],
        k: int,
        retrieved_length: int,
        mode: str | None = None,
        where: Filter | None = None,
        weights: Sequence[float] = (1.0, 1.0),
    ) -> list[Found]:
        """The k best of each text, as tokens; `mode`, `where` and `weights` as in `search`."""
        mode = mode or self.mode
        if self.static is None or where is not None:
            return [self._live(text, k, retrieved_length, mode, weights, where=where) for text in texts]
        is_one = self._is_one(mode)
        theirs = self.static.counts if is_one else None
        live = [
            self._live(text, k, retrieved_length=retrieved_length, mode=mode, weights=weights, beside=theirs)
            for text in texts
        ]
        ours = partial(self.library.counts, namespace=self.namespace) if is_one else None
        fixed = self.static.neighbors(texts, k, retrieved_length, beside=ours)
        join = self._by_score if is_one else self._fused
        return [join(pair, k, retrieved_length) for pair in zip(live, fixed)]

    def _live(
        self,
        text: str,
        k: int,
        retrieved_length: int,
        mode: str,
        weights: Sequence[float],
        beside: Callable[[np.ndarray], Counts] | None = None,
        where: Filter | None = None,
    ) -> Found:
        found: list[tuple[Hit, np.ndarray]] = []
        if text.strip():
            query = text[:MAX_QUERY_CHARACTERS]
            found = self.library.find(
                query,
                k,
                mode=mode,
                namespace=self.namespace,
                weights=weights,
                retrieved_length=retrieved_length,
                beside=beside,
                where=where,
            )
        return Found.of(found, k, retrieved_length, self.library.file.tokenizer.pad_id)

    def _by_score(self, sides: Sequence[Found], k: int, retrieved_length: int) -> Found:
        """Scores of one collection, each side's with its weight; what has weight 0 is not read."""
        scores = [
            ((side, place), hit.score * weight)
            for side, (found, weight) in enumerate(zip(sides, self.weights))
            for place, hit in enumerate(found.hits)
            if weight
        ]
        return self._joined(sides, sorted(scores, key=lambda pair: (-pair[1], pair[0])), k, retrieved_length)

    def _fused(self, sides: Sequence[Found], k: int, retrieved_length: int) -> Found:
        rankings = [[(side, place) for place in range(len(found.hits))] for side, found in enumerate(sides)]
        return self._joined(sides, fuse(rankings, self.weights), k, retrieved_length)

    def _joined(
        self, sides: Sequence[Found], ranking: Sequence[tuple[tuple[int, int], float]], k: int, retrieved_length: int
    ) -> Found:
        """Ties go to the library; a chunk that stands in both is read once."""
        pairs = [found.pairs() for found in sides]
        best: list[tuple[Hit, np.ndarray]] = []
        sides_of: dict[tuple[str, str], int] = {}
        for (side, place), score in ranking:
            hit, tokens = pairs[side][place]
            if sides_of.setdefault((hit.text, hit.continuation), side) == side:
                best.append((replace(hit, score=score), tokens))
        return Found.of(best[:k], k, retrieved_length, self.library.file.tokenizer.pad_id)
