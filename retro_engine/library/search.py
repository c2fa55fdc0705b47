"""Searching a snapshot of a live library.

BM25 as in `lexical` (Lucene's form, k1 = 1.5, b = 0.75), with the statistics of the chunks that are alive: for term t
of a query, idf(t) tf / (tf + k1 (1 - b + b length / average)). Rankings are joined by reciprocal rank fusion:
sum of weight / (60 + rank). Letters: T terms, K results.
"""

import math
from collections.abc import Sequence

import numpy as np

from retro_engine.errors import UsageError, nearest
from retro_engine.jit import numba
from retro_engine.library.segments import Snapshot
from retro_engine.retrieval.hit import drop_overlaps, fuse
from retro_engine.retrieval.lexical import K1, B

MODES = ("lexical", "dense", "hybrid")
MIN_DEPTH = 100  # of the rankings that are fused

Ranking = list[tuple[int, int, float]]  # view, chunk, score; best first


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
    snapshot: Snapshot, mode: str, hashes: np.ndarray, vector: np.ndarray | None, weights: Sequence[float], k: int
) -> Ranking:
    """The k best chunks of a snapshot; `hashes` are the query's terms, `vector` is for dense and hybrid."""
    k = min(k, sum(view.num_alive for view in snapshot))
    if k == 0:
        return []
    if mode == "lexical":
        return lexical(snapshot, hashes, k)
    assert vector is not None, mode
    if mode == "dense":
        return dense(snapshot, vector, k)
    depth = max(MIN_DEPTH, k)
    rankings = [lexical(snapshot, hashes, depth), dense(snapshot, vector, depth)]
    places = [[(view, chunk) for view, chunk, _ in ranking] for ranking in rankings]
    return [(view, chunk, score) for (view, chunk), score in fuse(places, weights)[:k]]


def lexical(snapshot: Snapshot, hashes: np.ndarray, k: int) -> Ranking:
    """The k best chunks by BM25; fewer when fewer have a term of the query."""
    num_chunks = sum(view.num_alive for view in snapshot)
    found = [view.part.postings(hashes, len(view.alive)) for view in snapshot]
    frequencies = np.zeros(len(hashes), np.int64)
    for view, (firsts, lasts, chunks, _) in zip(snapshot, found):
        _count_alive(firsts, lasts, chunks, view.alive, view.num_alive == len(view.alive), frequencies)
    if not frequencies.any():
        return []
    idf = np.log(1 + (num_chunks - frequencies + 0.5) / (frequencies + 0.5)).astype(np.float32)
    average = sum(view.num_terms for view in snapshot) / num_chunks
    out: Ranking = []
    for place, (view, (firsts, lasts, chunks, counts)) in enumerate(zip(snapshot, found)):
        if view.num_alive:
            lengths = view.part.chunk_lengths(len(view.alive))
            best, scores = _score(
                firsts, lasts, chunks, counts, lengths, view.alive, idf, average, min(k, len(lengths))
            )
            out += [(place, chunk, score) for chunk, score in zip(best.tolist(), scores.tolist()) if chunk >= 0]
    return sorted(out, key=lambda hit: -hit[2])[:k]  # stable: ties keep the older chunk


@numba.njit(nogil=True, cache=True)
def _count_alive(firsts, lasts, chunks, alive, is_whole, frequencies):  # type: ignore[no-untyped-def]
    """Add the chunks that are alive and have each term. Entries past `alive` are newer than the view."""
    for term in range(len(firsts)):
        if is_whole and lasts[term] > firsts[term] and chunks[lasts[term] - 1] < len(alive):
            frequencies[term] += lasts[term] - firsts[term]
            continue
        for entry in range(firsts[term], lasts[term]):
            if chunks[entry] < len(alive) and alive[chunks[entry]]:
                frequencies[term] += 1


@numba.njit(nogil=True, cache=True)
def _score(firsts, lasts, chunks, counts, lengths, alive, idf, average, k):  # type: ignore[no-untyped-def]
    total = np.zeros(len(alive), np.float32)
    for term in range(len(firsts)):
        for entry in range(firsts[term], lasts[term]):
            chunk = chunks[entry]
            if chunk < len(alive):
                norm = K1 * (1 - B + B * lengths[chunk] / average)
                total[chunk] += np.float32(idf[term] * counts[entry] / (counts[entry] + norm))
    ids = np.full(k, -1, np.int64)
    best = np.zeros(k, np.float32)
    found = 0
    floor = np.float32(0)  # the worst score kept, once k are kept
    for chunk in range(len(alive)):
        score = total[chunk]
        if score > floor and alive[chunk]:
            slot = found if found < k else k - 1
            while slot > 0 and best[slot - 1] < score:
                best[slot] = best[slot - 1]
                ids[slot] = ids[slot - 1]
                slot -= 1
            best[slot] = score
            ids[slot] = chunk
            found = min(found + 1, k)
            if found == k:
                floor = best[k - 1]
    return ids, best


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
    """Without chunks that share tokens with better ones: those fewer than `reach` chunks away in one document."""
    if not ranking:
        return []
    places = np.array([snapshot[view].document(chunk) for view, chunk, _ in ranking], np.int64)
    documents, chunks = places.T[:, None]
    kept = drop_overlaps(documents.copy(), chunks.copy(), np.zeros(chunks.shape, bool), reach)[0]
    return [ranking[place] for place in kept.tolist() if place >= 0]
