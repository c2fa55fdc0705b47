"""The one search over a live library and published stores: what generation reads, routes answer and commands print.

A document that was added is read from the next chunk on that asks; one that was deleted is not. Rankings of library and
stores are joined by reciprocal rank fusion, each with its weight.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from retro_engine.data.coding import Coding
from retro_engine.data.store import Store
from retro_engine.errors import UsageError
from retro_engine.library.documents import MAX_QUERY_CHARACTERS, check_query
from retro_engine.library.library import DEFAULT, Library
from retro_engine.library.search import check_mode, check_weights
from retro_engine.retrieval.hit import Found, Hit, fuse
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

    def search(
        self,
        text: str,
        k: int,
        mode: str | None = None,
        weights: Sequence[float] = (1.0, 1.0),
        retrieved_length: int | None = None,
    ) -> Found:
        """What generation would read for a text. Raises UsageError for an empty or huge one, and what else is refused.

        `weights`: of the halves of the library's hybrid mode. None: a chunk and as much of what follows it.
        """
        check_query(text, k)
        check_mode(mode or self.mode, weights)
        length = 2 * self.coding.chunk_size if retrieved_length is None else retrieved_length
        return self.neighbors([text], k, length, mode, weights)[0]

    def neighbors(
        self,
        texts: Sequence[str],
        k: int,
        retrieved_length: int,
        mode: str | None = None,
        weights: Sequence[float] = (1.0, 1.0),
    ) -> list[Found]:
        """The k best of each text, as tokens; `mode` is of this search."""
        live = [self._live(text, k, retrieved_length, mode or self.mode, weights) for text in texts]
        if self.static is None:
            return live
        fixed = self.static.neighbors(texts, k, retrieved_length)
        return [self._fused(pair, k, retrieved_length) for pair in zip(live, fixed)]

    def _live(self, text: str, k: int, retrieved_length: int, mode: str, weights: Sequence[float]) -> Found:
        found: list[tuple[Hit, np.ndarray]] = []
        if text.strip():
            query = text[:MAX_QUERY_CHARACTERS]
            found = self.library.find(query, k, mode, self.namespace, weights, retrieved_length)
        return Found.of(found, k, retrieved_length, self.library.file.tokenizer.pad_id)

    def _fused(self, sides: Sequence[Found], k: int, retrieved_length: int) -> Found:
        """Ties go to the library; a chunk that stands in both is read once."""
        pairs = [found.pairs() for found in sides]
        rankings = [[(side, place) for place in range(len(found))] for side, found in enumerate(pairs)]
        best: list[tuple[Hit, np.ndarray]] = []
        sides_of: dict[tuple[str, str], int] = {}
        for (side, place), score in fuse(rankings, self.weights):
            hit, tokens = pairs[side][place]
            if sides_of.setdefault((hit.text, hit.continuation), side) == side:
                best.append((replace(hit, score=score), tokens))
        return Found.of(best[:k], k, retrieved_length, self.library.file.tokenizer.pad_id)
