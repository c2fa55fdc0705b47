"""BM25 over postings, in Lucene's form: the one scorer of published indexes and of the live library.

A chunk's score is the sum over the query's terms of idf tf / (tf + k1 (1 - b + b length / average)), with
idf = log(1 + (chunks - frequency + 1/2) / (frequency + 1/2)). Postings of counts are scored while they are searched,
with the statistics of what is alive; a published index, which never changes, has each entry's score instead of its
count. Ties keep the lower chunk. The index is searched a window of chunks at a time, whose totals stay in the nearest
cache and of which a stretch is passed over by its highest: what is found, scores and ties are those of `totals` and `best`.
Letters: Q queries, T terms of all queries, P entries, U chunks, W chunks of a window, K results.
"""

from typing import Any

import numpy as np

from retro_engine.jit import numba
from retro_engine.retrieval.postings import Postings

K1, B = 1.5, 0.75
WINDOW, STRETCH = 1 << 13, 64  # chunks; 32 KiB of totals
NO_CONTENTS = np.empty(0, np.int32)  # every chunk may be found


def idf(frequencies: np.ndarray, num_chunks: int) -> np.ndarray:
    return np.log(1 + (num_chunks - frequencies + 0.5) / (frequencies + 0.5))


def term_score(idf: Any, tf: Any, length: Any, average: float) -> Any:
    """Of numbers or arrays: the score of a term that a chunk of `length` terms has `tf` times."""
    return idf * tf / (tf + K1 * (1 - B + B * length / average))


_term_score = numba.njit(nogil=True, cache=True)(term_score)


def totals(found: Postings, idf_T: np.ndarray, lengths_U: np.ndarray, average: float) -> np.ndarray:
    """[U] f4: every chunk's score for one query, from the counts of its terms."""
    total_U = np.zeros(len(lengths_U), np.float32)
    _add_scores(total_U, found.firsts, found.lasts, found.chunks, found.values, idf_T, lengths_U, average)
    return total_U


def best(total_U: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k chunks with the highest totals above 0: ids [K] (-1 = fewer) and scores [K], best first."""
    ids, scores = np.full(k, -1, np.int64), np.zeros(k, np.float32)
    _keep_best(total_U, ids, scores)
    return ids, scores


@numba.njit(nogil=True, cache=True)
def _add_scores(total, firsts, lasts, chunks, counts, idf, lengths, average):  # type: ignore[no-untyped-def]
    """Add a query's scores."""
    for term in range(len(firsts)):
        for entry in range(firsts[term], lasts[term]):
            chunk = chunks[entry]
            total[chunk] += np.float32(_term_score(idf[term], counts[entry], lengths[chunk], average))


@numba.njit(nogil=True, cache=True)
def _keep_best(total, ids, scores):  # type: ignore[no-untyped-def]
    """`best` into `ids` and `scores`: ties keep the lower id, so that the result does not depend on the order of search."""
    for chunk in range(len(total)):
        if total[chunk] > scores[-1]:
            _insert(ids, scores, chunk, total[chunk])


@numba.njit(parallel=True, cache=True)
def search(ends, firsts, lasts, weights, chunks, scores, contents, own, num_chunks, k, workers):  # type: ignore[no-untyped-def]
    """The k best of many queries over postings of scores: ids and scores [Q, K]. Query q's terms end at ends[q]."""
    ids = np.full((len(ends), k), -1, np.int64)
    best = np.zeros((len(ends), k), np.float32)
    for worker in numba.prange(workers):
        total_W = np.zeros(WINDOW, np.float32)
        for query in range(worker, len(ends), workers):
            terms = slice(ends[query - 1] if query else 0, ends[query])
            cursors, without = firsts[terms].copy(), own[query] if len(own) else -1
            for begin in range(0, num_chunks, WINDOW):
                _add_window(begin, cursors, lasts[terms], weights[terms], chunks, scores, total_W)
                _keep_window(begin, total_W, contents, without, ids[query], best[query])
    return ids, best


@numba.njit(nogil=True, cache=True)
def _add_window(begin, cursors, lasts, weights, chunks, scores, total):  # type: ignore[no-untyped-def]
    """Add a query's scores of the chunks from `begin` on; the cursors move behind the window."""
    for term in range(len(cursors)):
        entry, last, weight = cursors[term], lasts[term], weights[term]
        while entry < last:
            place = chunks[entry] - begin
            if place >= WINDOW:
                break
            total[np.uint32(place)] += np.float32(weight * scores[entry])
            entry += 1
        cursors[term] = entry


@numba.njit(nogil=True, cache=True)
def _keep_window(begin, total, contents, own, ids, best):  # type: ignore[no-untyped-def]
    """Take a window's totals into the best so far, and make them 0. Floats above 0 are ordered as their bits are, of which
    the highest of a stretch is found many at a time."""
    bits, highest = total.view(np.int32), np.zeros(1, np.int32)
    for start in range(0, WINDOW, STRETCH):
        top = np.int32(0)
        for place in range(start, start + STRETCH):
            top = max(top, bits[place])
        highest[0] = top
        if highest.view(np.float32)[0] > best[-1]:
            for place in range(start, start + STRETCH):
                chunk, score = begin + place, total[place]
                if score > best[-1] and not (len(contents) and (contents[chunk] < 0 or contents[chunk] == own)):
                    _insert(ids, best, chunk, score)
        bits[start : start + STRETCH] = 0


@numba.njit(nogil=True, cache=True)
def _insert(ids, best, chunk, score):  # type: ignore[no-untyped-def]
    """Put a chunk behind those with its score, which have lower numbers; the last one falls out."""
    slot = len(ids) - 1
    while slot > 0 and best[slot - 1] < score:
        best[slot], ids[slot] = best[slot - 1], ids[slot - 1]
        slot -= 1
    best[slot], ids[slot] = score, chunk
