"""Searching a snapshot of a live library.

BM25 (`retrieval/bm25.py`) with the statistics of the chunks that are alive. Rankings are joined by reciprocal rank
fusion: sum of weight / (60 + rank). Letters: T terms, K results.
"""

import math
from collections.abc import Sequence

import numpy as np

from retro_engine.errors import UsageError, nearest
from retro_engine.jit import numba
from retro_engine.library.segments import Snapshot
from retro_engine.retrieval import bm25
from retro_engine.retrieval.hit import Counts, drop_overlaps, fuse
from retro_engine.retrieval.postings import Postings

MODES = ("lexical", "dense", "hybrid")
MIN_DEPTH = 100  # of the rankings that are fused

Ranking = list[tuple[int, int, float]]  # view, chunk, score; best first
NOTHING: Counts = (np.zeros(1, np.int64), 0)


def check_mode(mode: str, weights: Sequence[float]) -> None:
    if mode not in MODES:
        raise UsageError(f"mode {mode!r} does not exist", nearest(mode, list(MODES)), f"one of {', '.join(MODES)}")
    if len(weights) != 2:
        raise UsageError(f"weights {list(weights)} cannot be used", "hybrid has two: lexical and dense")
    check_weights(weights)


def check_weights(weights: Sequence[float]) -> None:
    if any(not math.isfinite(weight) or weight < 0 for weight in weights) or not sum(weights) > 0:
        raise UsageError(f"weights {list(weights)} cannot be used", "none is negative, one is above 0")


def rank(
    snapshot: Snapshot,
    mode: str,
    hashes: np.ndarray,
    vector: np.ndarray | None,
    weights: Sequence[float],
    k: int,
    beside: Counts = NOTHING,
) -> Ranking:
    """The k best chunks of a snapshot; `hashes` are the query's terms, `vector` is for dense and hybrid; `beside` as in
    `lexical`, whose scores it is for.
    """
    k = min(k, sum(view.num_alive for view in snapshot))
    if k == 0:
        return []
    if mode == "lexical":
        return lexical(snapshot, hashes, k, beside)
    assert vector is not None, mode
    if mode == "dense":
        return dense(snapshot, vector, k)
    depth = max(MIN_DEPTH, k)
    rankings = [lexical(snapshot, hashes, depth), dense(snapshot, vector, depth)]
    places = [[(view, chunk) for view, chunk, _ in ranking] for ranking in rankings]
    return [(view, chunk, score) for (view, chunk), score in fuse(places, weights)[:k]]


def lexical(snapshot: Snapshot, hashes: np.ndarray, k: int, beside: Counts = NOTHING) -> Ranking:
    """The k best chunks by BM25; fewer when fewer have a term of the query. `beside`: another collection that scores shall be
    comparable with."""
    num_chunks = sum(view.num_alive for view in snapshot)
    found = [view.part.postings(hashes, len(view.alive)) for view in snapshot]
    frequencies = _frequencies(snapshot, found, len(hashes))
    if not frequencies.any():
        return []
    idf = bm25.idf(frequencies + beside[0], num_chunks + beside[1])
    average = sum(view.num_terms for view in snapshot) / num_chunks
    out: Ranking = []
    for place, (view, postings) in enumerate(zip(snapshot, found)):
        if view.num_alive:
            total = bm25.totals(postings, idf, view.part.chunk_lengths(len(view.alive)), average)
            if view.num_alive < len(view.alive):
                total[~view.alive] = 0
            best, scores = bm25.best(total, min(k, len(total)))
            out += [(place, chunk, score) for chunk, score in zip(best.tolist(), scores.tolist()) if chunk >= 0]
    return sorted(out, key=lambda hit: -hit[2])[:k]  # stable: ties keep the older chunk


def counts(snapshot: Snapshot, hashes: np.ndarray) -> Counts:
    """Of the chunks that are alive: how many have each term, and how many there are."""
    found = [view.part.postings(hashes, len(view.alive)) for view in snapshot]
    return _frequencies(snapshot, found, len(hashes)), sum(view.num_alive for view in snapshot)


def _frequencies(snapshot: Snapshot, found: Sequence[Postings], num_terms: int) -> np.ndarray:
    frequencies = np.zeros(num_terms, np.int64)
    for view, postings in zip(snapshot, found):
        if view.num_alive == len(view.alive):
            frequencies += postings.lasts - postings.firsts
        else:
            _count_alive(postings.firsts, postings.lasts, postings.chunks, view.alive, frequencies)
    return frequencies


@numba.njit(nogil=True, cache=True)
def _count_alive(firsts, lasts, chunks, alive, frequencies):  # type: ignore[no-untyped-def]
    """Add the chunks that are alive and have each term."""
    for term in range(len(firsts)):
        for entry in range(firsts[term], lasts[term]):
            frequencies[term] += alive[chunks[entry]]


def dense(snapshot: Snapshot, vector_Z: np.ndarray, k: int) -> Ranking:
    """The k nearest chunks by inner product: in full, or in a large segment by its codes."""
    out: Ranking = []
    for place, view in enumerate(snapshot):
        if not view.num_alive:
            continue
        is_whole = view.num_alive == len(view.alive)
        if view.part.codes is not None:
            rows, scores = view.part.codes.search(vector_Z, min(k, view.num_alive), None if is_whole else view.alive)
        else:
            vectors = view.part.all_vectors(len(view.alive))
            assert vectors is not None, "a library with vectors has them in every part"
            all_scores = vectors @ vector_Z
            if not is_whole:
                all_scores[~view.alive] = -np.inf
            rows = np.arange(len(all_scores))
            if k < len(rows):
                rows = np.sort(np.argpartition(-all_scores, k)[:k])
            rows = rows[np.argsort(-all_scores[rows], kind="stable")][: view.num_alive]
            scores = all_scores[rows]
        out += [(place, row, score) for row, score in zip(rows.tolist(), scores.tolist())]
    return sorted(out, key=lambda hit: -hit[2])[:k]


def without_overlaps(snapshot: Snapshot, ranking: Ranking, reach: int) -> Ranking:
    """Without chunks that share tokens with better ones: those fewer than `reach` chunks away in one document. What is
    found in a document's last chunk is read from the one before it.
    """
    if not ranking:
        return []
    places = np.array([snapshot[view].document(chunk) for view, chunk, _ in ranking], np.int64)
    documents, chunks = places.T[:, None]
    is_last = np.array([snapshot[view].is_last(chunk) for view, chunk, _ in ranking])[None] & (chunks > 0)
    moved = chunks.copy()
    kept = drop_overlaps(documents.copy(), moved, is_last, reach)[0]
    by = (moved - chunks)[0].tolist()
    return [(ranking[i][0], ranking[i][1] + by[i], ranking[i][2]) for i in kept.tolist() if i >= 0]
