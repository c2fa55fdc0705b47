"""Blends: each store gives its share at every length, in its own order; what cannot be one is refused."""

import math

import numpy as np
import pytest

from retro_engine.data.batches import Order, Sequences
from retro_engine.data.blend import Blend, read_blend, shares_of
from retro_engine.data.store import Store
from retro_engine.errors import UsageError


@pytest.mark.parametrize(
    "weights", [(0.5, 0.5), (0.7, 0.2, 0.1), (0.999, 0.001), (0.25,) * 4, (1 / 3, 1 / 3, 1 / 3), (0.1,) * 10]
)
def test_every_store_gives_its_share(weights: tuple[float, ...]) -> None:
    before = [0] * len(weights)
    for count in range(1, 3000):
        now = shares_of(weights, count)
        assert sum(now) == count
        assert sorted(np.subtract(now, before).tolist()) == [0] * (len(weights) - 1) + [1]
        assert max(abs(have - weight * count) for have, weight in zip(now, weights)) < 2
        before = now
    far = 10**9 + 7
    assert max(abs(have - weight * far) for have, weight in zip(shares_of(weights, far), weights)) < 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([".5", "a", ".6", "b"], "the weights are 1.1 together"),
        (["1.5", "a", "-.5", "b"], "-0.5 is no weight"),
        (["0", "a", "1", "b"], "0.0 is no weight"),
        (["nan", "a", "1", "b"], "nan is no weight"),
        ([".5", "a", ".5", "a"], "a store is in it twice"),
        (["a", ".5", "b", ".5"], "could not convert"),
        ([".5", "a", ".5"], "it has 3 entries"),
        (["1", "a"], "it has 2 entries"),
    ],
)
def test_what_is_no_blend(given: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace(".", r"\.")):
        read_blend(given)
    assert read_blend([".25", "a", ".75", "b"]) == ([0.25, 0.75], ["a", "b"])


def test_batches_are_those_of_the_stores_in_turn(small_store: Store) -> None:
    """Two halves of one store as two streams: any batch, asked for alone, has each stream's own next sequences."""
    middle = small_store.num_documents // 2
    everything = np.arange(small_store.num_documents)
    streams = [Sequences(small_store, part, 64) for part in (everything[:middle], everything[middle:])]
    blend, order = Blend(streams, [0.75, 0.25]), Order(7)
    count = 3 * max(stream.epoch_length(order, 0) for stream in streams)
    places = [blend.place(number) for number in range(count)]
    assert [sum(which == each for which, _ in places) for each in (0, 1)] == [
        math.floor(0.75 * count + 0.5),
        count - math.floor(0.75 * count + 0.5),
    ]
    for each in (0, 1):
        assert [own for which, own in places if which == each] == list(range(sum(w == each for w, _ in places)))
    for index in (0, 3, count // 4 - 1):
        batch = blend.training_batch(index, 4, order)
        for row, (which, own) in enumerate(places[4 * index : 4 * index + 4]):
            alone = streams[which].batch(streams[which].sequence(own, order)[None])
            np.testing.assert_array_equal(batch.tokens[row], alone.tokens[0])
            np.testing.assert_array_equal(batch.labels[row], alone.labels[0])
            shifted = np.where(alone.document_ids < 0, -1, alone.document_ids + which * small_store.num_documents)
            np.testing.assert_array_equal(batch.document_ids[row], shifted[0])
    assert blend.num_sequences(order) is None
    assert blend.epoch_length(order, 0) == int(streams[0].epoch_length(order, 0) / 0.75)
