"""Segments, deltas and views: a merge gives what the documents alone would, bytes included; damage is refused."""

import numpy as np
import pytest
from helpers import WORDS

from retro_engine.library.segment_files import arrays_of
from retro_engine.library.segments import (
    Delta,
    Segment,
    View,
    merge_views,
    tail_to_merge,
)
from retro_engine.retrieval.analyzer import Analyzer


def delta_of(documents: dict[int, list[str]], width: int | None = 3) -> Delta:
    """A delta with the chunks of each document, by key; its vectors depend on the texts only."""
    delta = Delta(width)
    for key, texts in documents.items():
        vectors = None
        if width is not None:
            vectors = np.array([[len(text), text.count("e"), 1.0] for text in texts], np.float32)
        delta.append([key], [len(texts)], Analyzer().terms(texts), vectors)
    return delta


def random_documents(seed: int, keys: range) -> dict[int, list[str]]:
    rng = np.random.default_rng(seed)
    return {
        key: [" ".join(rng.choice(WORDS, int(rng.integers(0, 12)))) for _ in range(int(rng.integers(1, 5)))]
        for key in keys
    }


def arrays(segment: Segment) -> dict[str, bytes]:
    return {
        name: np.asarray(values).tobytes()
        for name, values in (arrays_of(segment) | {"vectors": segment.vectors}).items()
    }


@pytest.mark.parametrize("width", [None, 3])
def test_a_merge_is_what_the_documents_alone_would_make(width: int | None) -> None:
    documents = random_documents(0, range(1, 60))
    first = View.whole(delta_of({k: documents[k] for k in range(1, 20)}, width).segment())
    second = View.whole(delta_of({k: documents[k] for k in range(20, 45)}, width))
    third = View.whole(delta_of({k: documents[k] for k in range(45, 60)}, width))
    dead = [1, 7, 19, 20, 44, 59, 999]
    merged = merge_views([view.without(dead) for view in (first, second, third)])
    alone = delta_of({key: texts for key, texts in documents.items() if key not in dead}, width).segment()
    assert arrays(merged) == arrays(alone)
    assert View.whole(merged).num_alive == sum(len(t) for k, t in documents.items() if k not in dead)


def test_views_count_what_is_alive() -> None:
    documents = random_documents(1, range(1, 30))
    for part in (delta_of(documents), delta_of(documents).segment()):
        view = View.whole(part).without([3, 5]).without([5, 8, 1000])
        left = {key: texts for key, texts in documents.items() if key not in (3, 5, 8)}
        assert view.num_alive == view.alive.sum() == sum(map(len, left.values()))
        assert view.num_terms == int(Analyzer().terms([t for texts in left.values() for t in texts]).lengths.sum())
        assert view.alive_keys().tolist() == list(left)
        seen = [view.document(chunk) for chunk in np.flatnonzero(view.alive)]
        assert seen == [(key, number) for key, texts in left.items() for number in range(len(texts))]


def test_a_view_does_not_see_what_is_appended_later() -> None:
    delta = delta_of({1: ["river stone"]})
    view = View.whole(delta)
    terms = Analyzer().query("river falcon")
    for key in range(2, 200):
        delta.append([key], [1], Analyzer().terms(["river falcon"]), np.ones((1, 3), np.float32))
    found = delta.postings(terms, len(view.alive))
    assert (found.lasts - found.firsts).sum() == 1
    assert found.chunks.tolist() == [0]
    vectors = delta.all_vectors(len(view.alive))
    assert vectors is not None
    assert vectors.tolist() == [[11, 2, 1]]
    grown = view.grown()
    assert (grown.num_alive, grown.num_terms) == (199, 2 * 199)


def test_postings_of_deltas_and_segments_are_the_same() -> None:
    delta = delta_of(random_documents(2, range(1, 40)))
    segment = delta.segment()
    terms = Analyzer().query(" ".join(WORDS) + " unknown words beyond")
    found = []
    for part in (delta, segment):
        p = part.postings(terms, delta.starts[-1])
        found.append([(p.chunks[a:b].tolist(), p.values[a:b].tolist()) for a, b in zip(p.firsts, p.lasts)])
    assert found[0] == found[1]
    assert sum(bool(chunks) for chunks, _ in found[0]) == len(WORDS)
    empty = Delta(None)
    for part in (empty, empty.segment()):
        nothing = part.postings(terms, 0)
        assert not (nothing.lasts - nothing.firsts).any()


def test_which_views_are_merged() -> None:
    def view(size: int, dead: int = 0) -> View:
        part = delta_of({key: ["river"] for key in range(1, size + 1)}, None).segment()
        return View.whole(part).without(range(1, dead + 1))

    delta = View.whole(delta_of({1: ["a b"], 2: ["c"]}, None))
    assert tail_to_merge((delta,)) == 0
    assert tail_to_merge((view(100), delta)) == 1
    assert tail_to_merge((view(100), view(3), delta)) == 1
    assert tail_to_merge((view(9), view(3), delta)) == 0
    assert tail_to_merge((view(100, dead=60), view(30), delta)) == 0, "mostly dead"
    assert tail_to_merge((view(100), view(30), delta), is_all=True) == 0
    assert tail_to_merge((view(100), delta, View.whole(Delta(None)))) == 1, "deltas always"
