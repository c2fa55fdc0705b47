"""The order of a text's places is that of what stands before them, and every suffix is counted as by hand."""

import numpy as np
import pytest

from retro_engine.memory.suffix_order import LONGEST, count_suffixes, order_of, starts_of


def occurrences(text: list[int], words: list[int]) -> int:
    return sum(text[place : place + len(words)] == words for place in range(len(text) - len(words) + 1))


@pytest.mark.parametrize(("dtype", "vocab_size"), [("u2", 700), ("u4", 70_000)])
def test_counts_are_those_by_hand(dtype: str, vocab_size: int) -> None:
    rng = np.random.default_rng(0)
    tokens = (rng.integers(0, 4, 601) * 130).astype(dtype)
    tokens[::7] = vocab_size - 1
    tokens[300:350] = tokens[100:150]  # longer than any suffix that is compared
    order, starts, text = order_of(tokens), starts_of(tokens, vocab_size), tokens.tolist()
    assert sorted(order.tolist()) == list(range(len(text)))
    before = [text[: place + 1][::-1] for place in order.tolist()]
    assert before == sorted(before)
    if dtype != "u2":
        return  # compiled for each type: one shows it
    for array in (tokens, order, starts):
        array.setflags(write=False)
    asked = np.concatenate((tokens[320:360], [1, 130, vocab_size - 1, 0])).astype(np.int64)
    counts = np.zeros((len(asked) - 10, LONGEST + 2), np.int64)
    count_suffixes(tokens, order, starts, asked, 1, counts)
    for row, place in enumerate(range(10, len(asked))):
        for length in (*range(1, 9), 31, 32, 33):
            words = asked[max(0, place - length + 1) : place + 1].tolist()
            expected = occurrences(text, words) if len(words) == length else 0
            assert counts[row, length] == expected, (place, length)
    assert (counts[:, 0] == len(text)).all()
    count_suffixes(tokens, order, starts, asked, -1, counts)
    assert not counts.any(), "what is taken off is what was counted"
