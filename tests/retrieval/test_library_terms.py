"""Hashed terms are the words that `lexical` finds, whatever the text."""

import os
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_engine.retrieval.lexical import terms_of as words_of
from retro_engine.retrieval.library_terms import query_terms, terms_of

ODD = "The café's naïve_x İSTANBUL ǅ ß ﬁn x2 a_b — 北京市 ½½ ⅣⅣ ١٢٣ e\u0301e\u0301 \U0001d7d8\U0001d7d8 is not"


def check(texts: list[str]) -> None:
    terms = terms_of(texts)
    first = 0
    for text, end, length in zip(texts, terms.ends.tolist(), terms.lengths.tolist()):
        (words,) = words_of([text])
        expected = Counter(int(query_terms(word)[0]) for word in words)
        assert dict(zip(terms.hashes[first:end].tolist(), terms.counts[first:end].tolist())) == expected, text
        assert (np.diff(terms.hashes[first:end].astype(object)) > 0).all()
        assert length == len(words)
        first = end
    assert first == len(terms.hashes) == len(terms.counts)


def test_words_of_lexical() -> None:
    check([ODD, "", "a b c", "the of and", "river River RIVER stone", "x" * 1000, "word " * 70_0])


@settings(max_examples=10_000 if os.environ.get("RETRO_CAMPAIGN") else 300, deadline=None)
@given(st.lists(st.text(max_size=60), max_size=4))
def test_any_text(texts: list[str]) -> None:
    check(texts)


def test_hashes_do_not_change() -> None:
    """They are in files."""
    assert [int(query_terms(word)[0]) for word in ("retro", "été")] == [10661994062934669438, 7497643197324195883]


def test_counts_end_at_65535() -> None:
    terms = terms_of(["river " * 70_000])
    assert (terms.counts.tolist(), terms.lengths.tolist()) == ([65535], [70_000])
