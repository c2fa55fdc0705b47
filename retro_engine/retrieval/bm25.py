"""BM25 over postings, in Lucene's form: the one scorer of published indexes and of the live library.

A chunk's score is the sum over the query's terms of idf tf / (tf + k1 (1 - b + b length / average)), with
idf = log(1 + (chunks - frequency + 1/2) / (frequency + 1/2)). Postings of counts are scored while they are searched,
with the statistics of what is alive; a published index, which never changes, has each entry's score instead of its
count. Ties keep the lower chunk. Letters: Q queries, T terms of all queries, P entries, U chunks, K results.
"""

from typing import Any

import numpy as np

from retro_engine.jit import numba
from retro_engine.retrieval.postings import Postings

K1, B = 1.5, 0.75
NO_LENGTHS = np.empty(0, np.int32)  # the postings' values are scores
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
    _keep_best(total_U, NO_CONTENTS, -1, ids, scores)
    return ids, scores


@numba.njit(nogil=True, cache=True)
def _add_scores(total, firsts, lasts, chunks, values, weights, lengths, average):  # type: ignore[no-untyped-def]
    """Add a query's scores: of counts, with `weights` the idf; without `lengths`, the values times their weights."""
    for term in range(len(firsts)):
        weight = weights[term]
        if len(lengths):
            for entry in range(firsts[term], lasts[term]):
                chunk = chunks[entry]
                total[chunk] += np.float32(_term_score(weight, values[entry], lengths[chunk], average))
        else:
            for entry in range(firsts[term], lasts[term]):
                total[chunks[entry]] += np.float32(weight * values[entry])


@numba.njit(nogil=True, cache=True)
def _keep_best(total, contents, own, ids, scores):  # type: ignore[no-untyped-def]
    """`best` into `ids` and `scores`, without chunks whose content is below 0 or is `own` (`LeftOut`)."""
    found = 0
    floor = np.float32(0)  # the worst score kept, once k are kept
    for chunk in range(len(total)):
        score = total[chunk]
        if score > floor:  # ties keep the lower id: the result does not depend on the order of search
            if len(contents) and (contents[chunk] < 0 or contents[chunk] == own):
                continue
            slot = found if found < len(ids) else len(ids) - 1
            while slot > 0 and scores[slot - 1] < score:
                scores[slot] = scores[slot - 1]
                ids[slot] = ids[slot - 1]
                slot -= 1
            scores[slot] = score
            ids[slot] = chunk
            found = min(found + 1, len(ids))
            if found == len(ids):
                floor = scores[found - 1]


@numba.njit(parallel=True, cache=True)
def search(ends, firsts, lasts, weights, chunks, scores, contents, own, num_chunks, k, workers):  # type: ignore[no-untyped-def]
    """The k best of many queries over postings of scores: ids and scores [Q, K]. Query q's terms end at ends[q]."""
    ids = np.full((len(ends), k), -1, np.int64)
    best = np.zeros((len(ends), k), np.float32)
    lengths = np.empty(0, np.int32)
    for worker in numba.prange(workers):
        total = np.zeros(num_chunks, np.float32)
        for query in range(worker, len(ends), workers):
            terms = slice(ends[query - 1] if query else 0, ends[query])
            _add_scores(total, firsts[terms], lasts[terms], chunks, scores, weights[terms], lengths, 1.0)
            _keep_best(total, contents, own[query] if len(own) else -1, ids[query], best[query])
            total[:] = 0
    return ids, best
