"""What retrieval answers with, one form for stores and libraries, generation, routes and commands: hits, their tokens, how
rankings are joined, and which of two hits that overlap stays.

Letters: Q queries, C candidates, K neighbors, R tokens per neighbor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from retro_engine.data.coding import Coding
from retro_engine.data.store import Store
from retro_engine.jit import numba

RANK_OFFSET = 60  # of reciprocal rank fusion: weight / (60 + rank), ranks from 1

Counts = tuple[np.ndarray, int]  # of a collection: how many chunks have each of some terms, and how many there are
Item = TypeVar("Item", int, tuple[int, int])


@dataclass(frozen=True)
class Hit:
    """One retrieved chunk: what a model reads is `text` and `continuation`."""

    document: str  # its id
    title: str
    chunk: int  # its number within its document; -1 = a text that was given
    score: float
    text: str
    continuation: str  # what the document goes on with, as far as it is read; may be empty
    source: str  # name of the library's or the store's folder; empty = given

    @classmethod
    def given(cls, number: int, text: str) -> "Hit":
        """A neighbor that was not retrieved, counted from 0."""
        return cls(f"given {number + 1}", "", -1, 0.0, text, "", "")

    @property
    def where(self) -> str:
        """Where it stands, for people."""
        if not self.source:
            return self.document
        title = f" {self.title}" if self.title else ""
        return f"{self.source}/{self.document}{title} chunk {self.chunk}"

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "store": self.source}  # the name that `source` had here; for one more release


@dataclass(frozen=True)
class Found:
    """The neighbors of one text as a model reads them, and what they are."""

    tokens_KR: np.ndarray  # i64, padded
    lengths_K: np.ndarray  # valid tokens, 0 = missing
    hits: list[Hit]

    @classmethod
    def of(cls, found: Sequence[tuple[Hit, np.ndarray]], k: int, retrieved_length: int, pad_id: int) -> "Found":
        """From hits, at most k, and their tokens; what is past R is cut."""
        tokens_KR = np.full((k, retrieved_length), pad_id, np.int64)
        lengths_K = np.zeros(k, np.int64)
        for place, (_, tokens) in enumerate(found):
            lengths_K[place] = min(retrieved_length, len(tokens))
            tokens_KR[place, : lengths_K[place]] = tokens[:retrieved_length]
        return cls(tokens_KR, lengths_K, [hit for hit, _ in found])

    def above(self, least: float | None) -> "Found":
        """Those whose score is at least that; the rest is missing. None: all."""
        if least is None:
            return self
        count = sum(hit.score >= least for hit in self.hits)  # best first
        lengths_K = np.where(np.arange(len(self.lengths_K)) < count, self.lengths_K, 0)
        return Found(self.tokens_KR, lengths_K, self.hits[:count])

    def pairs(self) -> list[tuple[Hit, np.ndarray]]:
        """Each hit with its valid tokens."""
        return [(hit, self.tokens_KR[place, : self.lengths_K[place]]) for place, hit in enumerate(self.hits)]


class NeighborSource(Protocol):
    """Where generation gets its neighbors: published stores, a live library, or both."""

    @property
    def name(self) -> str: ...

    @property
    def stores(self) -> Sequence[Store]:
        """Those published ones that are read."""
        ...

    @property
    def coding(self) -> Coding:
        """Whose ids these are: what reads them must have the same."""
        ...

    @property
    def version(self) -> str:
        """Changes with what can be found."""
        ...

    def neighbors(
        self, texts: Sequence[str], k: int, retrieved_length: int, mode: str | None = None, where: Any = None
    ) -> list[Found]:
        """The k best of each text; any thread may call. `mode` and `where` (a `library.filters.Filter`) are of a live
        library's search. Raises UsageError for a filter of what has no metadata.
        """
        ...


def fuse(rankings: Sequence[Sequence[Item]], weights: Sequence[float]) -> list[tuple[Item, float]]:
    """Reciprocal rank fusion: each item's sum of weight / (60 + rank), best first; ties keep the smaller item.

    What only a ranking of weight 0 has is not in it.
    """
    scores: dict[Item, float] = {}
    for ranking, weight in zip(rankings, weights):
        if weight:
            for place, item in enumerate(ranking, 1):
                scores[item] = scores.get(item, 0.0) + weight / (RANK_OFFSET + place)
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))


@numba.njit(cache=True)
def drop_overlaps(documents_QC, chunks_QC, is_last_QC, reach):  # type: ignore[no-untyped-def]
    """[Q, C] the places of the candidates that stay, best first, then -1: of two in one document that are fewer than
    `reach` chunks apart the better, because as a neighbor it brings what follows it. Documents below 0 are no candidates.

    Nothing follows a document's last chunk, which may be a few tokens: it moves one back (in `chunks_QC`), so that as
    much is read as of others, unless another one that stays is read there. `is_last_QC` says which are, of more than one.
    """
    kept = np.full(documents_QC.shape, -1, np.int64)
    for query in range(documents_QC.shape[0]):
        count = 0
        for place in range(documents_QC.shape[1]):
            document, chunk = documents_QC[query, place], chunks_QC[query, place]
            if document < 0:
                continue
            is_free = True
            for other in kept[query, :count]:
                if documents_QC[query, other] == document and abs(chunks_QC[query, other] - chunk) < reach:
                    is_free = False
                    break
            if is_free:
                kept[query, count] = place
                count += 1
        for place in kept[query, :count]:
            if not is_last_QC[query, place]:
                continue
            document, chunk = documents_QC[query, place], chunks_QC[query, place] - 1
            is_free = True
            for other in kept[query, :count]:
                is_near = documents_QC[query, other] == document and abs(chunks_QC[query, other] - chunk) < reach
                if other != place and is_near:
                    is_free = False
            if is_free:
                chunks_QC[query, place] = chunk
    return kept
