"""One scorer: a live library scores as a published index of the same chunks, to the bit, and both as bm25s."""

from pathlib import Path

import bm25s
import numpy as np

from retro_engine.data.store import Store
from retro_engine.library.search import lexical
from retro_engine.library.segments import Delta, View
from retro_engine.retrieval.analyzer import Analyzer, titled
from retro_engine.retrieval.bm25 import K1, B, best, idf
from retro_engine.retrieval.lexical import Bm25Index, row_titles


def test_a_library_scores_as_an_index_does(small_store: Store, tmp_path: Path) -> None:
    index = Bm25Index.build(small_store, tmp_path / "index")
    texts = [text for batch in small_store.texts() for text in batch]
    texts = titled(row_titles(small_store, 0, len(texts)), texts)
    oracle = bm25s.BM25(k1=K1, b=B)
    oracle.index([Analyzer().words(text) for text in texts], show_progress=False)
    views = []
    for first, last in ((0, 30), (30, 31), (31, len(texts))):
        delta = Delta(None)
        delta.append(range(first + 1, last + 1), [1] * (last - first), Analyzer().terms(texts[first:last]), None)
        views.append(View.whole(delta if first else delta.segment()))
    for query in (texts[17], "river stone amber", "falcon"):
        ids, scores = index.search([query], 20)
        found = lexical(tuple(views), Analyzer().query(query), 20)
        assert [views[view].document(chunk)[0] - 1 for view, chunk, _ in found] == ids[0][: len(found)].tolist()
        assert [score for _, _, score in found] == scores[0][: len(found)].tolist()
        theirs = oracle.retrieve([sorted(set(Analyzer().words(query)))], k=20, show_progress=False)[1]
        np.testing.assert_allclose(scores, theirs, rtol=1e-4)


def test_ties_keep_the_lower_chunk_and_nothing_is_no_result() -> None:
    ids, scores = best(np.array([0, 1, 3, 1, 3, 0, 2], np.float32), 4)
    assert (ids.tolist(), scores.tolist()) == ([2, 4, 6, 1], [3, 3, 2, 1])
    assert best(np.zeros(3, np.float32), 2)[0].tolist() == [-1, -1]
    assert (np.diff(idf(np.arange(1, 100), 99)) < 0).all() and idf(np.array([99]), 99)[0] > 0
