"""Several stores as one stream of training, each with its share of the sequences (NeMo's data_prefix=[.5,A,.5,B]).

After any number of sequences each store has given its share of them, to within a sequence or two, and which sequence is
whose is computed from its number alone: a run goes on from the number of its step. Each store has its own pass after
pass, order and neighbor table.
"""

import math
from collections.abc import Sequence as Listed
from dataclasses import fields
from typing import Any

import numpy as np

from retro_engine.data.batches import Order, SequenceBatch, Sequences
from retro_engine.errors import UsageError

KEY = "model.data.blend"


def read_blend(given: Listed[str]) -> tuple[list[float], list[str]]:
    """Weights and stores of [.5,A,.5,B]. Raises UsageError unless the weights are above 0 and their sum is 1."""
    shown = f"{KEY}=[{','.join(map(str, given))}]"
    what = "a weight and a store in turns: [.5,A,.5,B]"
    if len(given) < 4 or len(given) % 2:
        raise UsageError(f"{shown} cannot be used", f"it has {len(given)} entries", what)
    try:
        weights = [float(weight) for weight in given[::2]]
    except ValueError as error:
        raise UsageError(f"{shown} cannot be used", str(error), what) from None
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise UsageError(f"{shown} cannot be used", f"{min(weights)} is no weight", "leave out what is not to be read")
    if abs(math.fsum(weights) - 1) > 1e-6:
        raise UsageError(f"{shown} cannot be used", f"the weights are {math.fsum(weights):g} together", "make them 1")
    paths = list(given[1::2])
    if len(set(paths)) < len(paths):
        raise UsageError(
            f"{shown} cannot be used", "a store is in it twice", "name it once, with both weights together"
        )
    return weights, paths


def shares_of(weights: Listed[float], count: int) -> list[int]:
    """How many of the first `count` sequences are of each store: the first's share to the nearest, then in the same way
    of those that are left. One more sequence is one more of exactly one store.
    """
    out, left, rest = [], count, math.fsum(weights)
    for weight in weights[:-1]:
        out.append(math.floor(left * min(1.0, weight / rest) + 0.5))
        left -= out[-1]
        rest -= weight
    return [*out, left]


class Blend:
    """What `Sequences` is to training, of several of them."""

    table = None  # neighbors are of several collections: they are gathered where the stores are mapped
    gathers_neighbors = True

    def __init__(self, streams: Listed[Sequences], weights: Listed[float]):
        """The stores have one tokenizer and chunk size (`Coding.check`)."""
        self.streams, self.weights, self.store = list(streams), list(weights), streams[0].store
        self._first_documents = np.cumsum([0] + [stream.num_documents for stream in streams])
        self.num_documents = int(self._first_documents[-1])
        each = zip(streams, self._first_documents)
        self.documents = np.concatenate([stream.documents + first for stream, first in each])
        self.holds_itself = all(stream.holds_itself for stream in streams)

    def epoch_length(self, order: Order, number: int) -> int:
        """Sequences until the store that is used up first was read once."""
        lengths = [stream.epoch_length(order, number) for stream in self.streams]
        return int(min(length / weight for length, weight in zip(lengths, self.weights)))

    def num_sequences(self, order: Order) -> int | None:
        """Without end: a store that is used up begins its next pass."""
        assert order.is_cyclic, "checked where the settings are"
        return None

    def place(self, number: int) -> tuple[int, int]:
        """Which store sequence `number` of the blend is of, and which of its own it is."""
        before, after = shares_of(self.weights, number), shares_of(self.weights, number + 1)
        which = next(place for place in range(len(before)) if after[place] > before[place])
        return which, before[which]

    def training_batch(self, index: int, size: int, order: Order, mode: str = "on") -> SequenceBatch:
        """Batch number `index` of a run: sequences index*size ... of the blend."""
        places = [self.place(number) for number in range(index * size, (index + 1) * size)]
        parts, numbers = [], []
        for which in sorted({which for which, _ in places}):
            chosen = [number for number, place in enumerate(places) if place[0] == which]
            rows = np.stack([self.streams[which].sequence(places[number][1], order) for number in chosen])
            part = self.streams[which].batch(rows, mode)
            part.document_ids = np.where(part.document_ids < 0, -1, part.document_ids + self._first_documents[which])
            parts.append(part)
            numbers += chosen
        back = np.argsort(numbers)
        joined: dict[str, Any] = {}
        for field in fields(SequenceBatch):
            values = [getattr(part, field.name) for part in parts]
            joined[field.name] = None if values[0] is None else np.concatenate(values)[back]
        return SequenceBatch(**joined)
