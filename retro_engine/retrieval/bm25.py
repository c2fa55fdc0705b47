"""BM25 over postings, in Lucene's form: the one scorer of published indexes and of the live library.

A chunk's score is the sum over the query's terms of idf tf / (tf + k1 (1 - b + b length / average)), with
idf = log(1 + (chunks - frequency + 1/2) / (frequency + 1/2)). Postings of counts are scored while they are searched,
with the statistics of what is alive; a published index, which never changes, has each entry's score instead of its
count (`bm25_search` searches it). Ties keep the lower chunk. Letters: T terms, P entries, U chunks, K results.
"""

from typing import Any

import numpy as np

from retro_engine.jit import numba
from retro_engine.retrieval.postings import Postings

K1, B = 1.5, 0.75
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
            insert(ids, scores, chunk, total[chunk])


@numba.njit(nogil=True, cache=True)
def insert(ids, best, chunk, score):  # type: ignore[no-untyped-def]
    """Put a chunk behind those with its score, which have lower numbers; the last one falls out."""
    slot = len(ids) - 1
    while slot > 0 and best[slot - 1] < score:
        best[slot], ids[slot] = best[slot - 1], ids[slot - 1]
        slot -= 1
    best[slot], ids[slot] = score, chunk
