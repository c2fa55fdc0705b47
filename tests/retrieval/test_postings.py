"""Postings: several collections joined are what their chunks together would make; what is asked for and not there."""

import numpy as np
import pytest
from helpers import WORDS

from retro_engine.retrieval.analyzer import Analyzer
from retro_engine.retrieval.postings import Postings, do_fit, joined


def postings_of(texts: list[str]) -> Postings:
    terms = Analyzer().terms(texts)
    return Postings.inverted(terms.hashes, terms.counts, terms.ends)


@pytest.mark.parametrize("cut", [0, 1, 37, 90])
def test_joined_is_what_the_chunks_together_make(cut: int) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, int(rng.integers(0, 9)))) for _ in range(90)]
    is_kept = np.arange(90) % 5 > 0
    numbers = np.where(is_kept, np.cumsum(is_kept) - 1, -1).astype(np.int32)
    found = joined([postings_of(texts[:cut]), postings_of(texts[cut:])], [numbers[:cut], numbers[cut:]])
    expected = postings_of([text for text, kept in zip(texts, is_kept) if kept])
    for name in ("terms", "starts", "chunks", "values"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), strict=True)


def test_some_terms_in_any_order() -> None:
    postings = postings_of(["river stone", "river river"])
    asked = Analyzer().terms(["stone", "falcon", "river"]).hashes
    for held, sizes in ((postings, [1, 0, 2]), (postings_of([]), [0, 0, 0])):
        found = held.of(asked)
        assert (found.lasts - found.firsts).tolist() == sizes
    river = postings.of(asked[2:])
    assert river.chunks[river.firsts[0] : river.lasts[0]].tolist() == [0, 1]
    assert river.values[river.firsts[0] : river.lasts[0]].tolist() == [1, 2]


def test_arrays_that_do_not_fit_are_seen() -> None:
    p = postings_of(["river stone", "river"])
    whole = {"terms": p.terms, "starts": p.starts, "chunks": p.chunks, "values": p.values}
    assert do_fit(**whole, num_chunks=2) and not do_fit(**whole, num_chunks=1)
    for name, bad in (
        ("terms", p.terms[::-1]),
        ("starts", p.starts[:-1]),
        ("starts", np.array([0, 4, 3])),
        ("starts", np.array([1, 2, 3])),
        ("chunks", -p.chunks - 1),
        ("chunks", 1 - p.chunks),  # of a term with two they descend
        ("values", p.values[1:]),
    ):
        assert not do_fit(**{**whole, name: bad}, num_chunks=2), (name, bad)
