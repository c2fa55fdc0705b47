"""Searching an index, a query at a time or many together, is adding up everything: ids, scores and ties, to the bit."""

from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_engine.retrieval import bm25_search
from retro_engine.retrieval.bm25 import NO_CONTENTS, best
from retro_engine.retrieval.bm25_search import search


@mock.patch.object(bm25_search, "LEAST_CHUNKS", 0)
@settings(max_examples=60, deadline=None)
@given(
    num_chunks=st.sampled_from([1, 63, 64, 8191, 8192, 8193, 20_000]),
    sizes=st.lists(st.integers(0, 9000), max_size=9),
    k=st.integers(1, 70),
    contents=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_queries_alone_and_together_find_what_adding_up_everything_finds(
    num_chunks: int, sizes: list[int], k: int, contents: int, seed: int
) -> None:
    """Ids, scores and ties, to the bit: few different scores, so that many chunks have the same."""
    rng = np.random.default_rng(seed)
    terms = [np.sort(rng.choice(num_chunks, min(size, num_chunks), False)).astype(np.int32) for size in sizes]
    chunks = np.concatenate([np.empty(0, np.int32), *terms])
    scores = rng.choice(np.array([0, 0.1, 0.7, 1.3], np.float32), len(chunks))
    held = np.array([len(term) for term in terms], np.int64)
    lasts = np.cumsum(held)
    firsts = lasts - held
    weights = rng.choice(np.array([0.3, 1], np.float32), len(terms))
    chunks.flags.writeable = scores.flags.writeable = False  # as in a file: compiled once for both
    hidden = rng.integers(-1, contents, num_chunks).astype(np.int32) if contents else NO_CONTENTS
    half = len(terms) // 2  # one query, then 20 of which every second one has the same terms, the others half of them
    several = [np.arange(len(terms) if query % 2 else half) for query in range(20)]
    for queries in ([np.arange(len(terms)), np.empty(0, np.int64)], several):
        each = np.concatenate(queries)
        ends = np.cumsum([len(some) for some in queries])
        own = np.full(len(queries), 1, np.int32) if contents else NO_CONTENTS
        postings = firsts[each], lasts[each], weights[each], chunks, scores
        ids, found = search(ends, postings, scores.max(initial=0), hidden, own, num_chunks, k, 1)
        for query, some in enumerate(queries[:2]):
            total = np.zeros(num_chunks, np.float32)
            for term in some:
                total[chunks[firsts[term] : lasts[term]]] += weights[term] * scores[firsts[term] : lasts[term]]
            if contents:
                total[(hidden < 0) | (hidden == 1)] = 0
            expected = best(total, k)
            np.testing.assert_array_equal(ids[query], expected[0])
            np.testing.assert_array_equal(found[query], expected[1])
        assert (ids[2::2] == ids[0]).all() and (ids[1::2] == ids[1]).all()


@mock.patch.object(bm25_search, "LEAST_CHUNKS", 0)
def test_many_candidates_of_one_score_are_added_up_on_the_way() -> None:
    """More chunks with the highest score than are noted at once, and a score beyond what a query's steps count finely."""
    num_chunks, frequent = 30_000, np.arange(0, 30_000, 2, dtype=np.int32)
    chunks = np.concatenate((frequent, np.array([4, 29_998], np.int32)))
    scores = np.concatenate((np.full(len(frequent), 0.7, np.float32), np.array([3e4, 0.1], np.float32)))
    chunks.flags.writeable = scores.flags.writeable = False
    firsts, lasts = np.array([0, len(frequent)]), np.array([len(frequent), len(chunks)])
    ends, both = np.arange(2, 22, 2), np.tile([0, 1], 10)
    postings = firsts[both], lasts[both], np.ones(20, np.float32), chunks, scores
    ids, found = search(ends, postings, 3e4, NO_CONTENTS, NO_CONTENTS, num_chunks, 4, 1)
    assert ids.tolist() == [[4, 29_998, 0, 2]] * 10
    np.testing.assert_array_equal(found[3], np.array([3e4 + 0.7, 0.8, 0.7, 0.7], np.float32))
