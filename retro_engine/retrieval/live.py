"""Neighbors for generation from a live library, alone or together with published stores.

A document that was added is read from the next chunk on that asks; one that was deleted is not. Rankings of library and
stores are joined by reciprocal rank fusion, each with its weight.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from retro_engine.data.coding import Coding
from retro_engine.errors import UsageError
from retro_engine.retrieval.library import DEFAULT, Library
from retro_engine.retrieval.library_documents import MAX_QUERY_CHARACTERS
from retro_engine.retrieval.library_search import check_mode, check_weights, fuse
from retro_engine.retrieval.search import Found, Hit, Retriever

SPAN = 3  # results asked for per neighbor kept: its own chunk and both beside it


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
    def coding(self) -> Coding:
        return library_coding(self.library)

    @property
    def version(self) -> str:
        return f"{self.library.version} {self.static.version if self.static is not None else ''}"

    def neighbors(self, texts: Sequence[str], k: int, retrieved_length: int, mode: str | None = None) -> list[Found]:
        """The k best of each text, as tokens; `mode` is of this search."""
        live = [self._live(text, k, retrieved_length, mode or self.mode) for text in texts]
        if self.static is None:
            return live
        fixed = self.static.neighbors(texts, k, retrieved_length)
        return [self._fused(pair, k) for pair in zip(live, fixed)]

    def _live(self, text: str, k: int, R: int, mode: str) -> Found:
        tokens_KR = np.full((k, R), self.library.file.tokenizer.pad_id, np.int64)
        lengths_K, hits = np.zeros(k, np.int64), list[Hit]()
        if text.strip():
            query = text[:MAX_QUERY_CHARACTERS]
            reach = -(-R // self.library.file.stride)  # chunks nearer than that share tokens as neighbors
            kept: dict[str, list[int]] = {}
            for hit, tokens in self.library.find(query, SPAN * k, mode, self.namespace):
                near = [other for other in kept.get(hit.document, []) if abs(other - hit.chunk) < reach]
                if len(hits) < k and not near:
                    kept.setdefault(hit.document, []).append(hit.chunk)
                    lengths_K[len(hits)] = min(R, len(tokens))
                    tokens_KR[len(hits), : min(R, len(tokens))] = tokens[:R]
                    hits.append(
                        Hit(hit.chunk, hit.document, hit.title, hit.score, hit.text, hit.source, hit.continuation)
                    )
        return Found(tokens_KR, lengths_K, hits)

    def _fused(self, sides: Sequence[Found], k: int) -> Found:
        """Ties go to the library."""
        rankings = [[(side, place) for place in range(len(found.hits))] for side, found in enumerate(sides)]
        best = fuse(rankings, self.weights)[:k]
        tokens_KR, lengths_K = (
            np.full_like(sides[0].tokens_KR, self.library.file.tokenizer.pad_id),
            np.zeros(k, np.int64),
        )
        hits = []
        for number, ((side, place), score) in enumerate(best):
            found = sides[side]
            tokens_KR[number], lengths_K[number] = found.tokens_KR[place], found.lengths_K[place]
            hit = found.hits[place]
            hits.append(replace(hit, score=score))
        return Found(tokens_KR, lengths_K, hits)
