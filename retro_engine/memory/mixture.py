"""Several guesses at the next token as one: p = (1 - w) p_before + w c(suffix, token) / c(suffix), from the model's p up to the
longest suffix of the text that was found.

The weight w depends on how long the suffix is and how often it occurs. The weights are those that make other documents than
the evaluated ones likeliest (expectation maximization, as for interpolated n-grams: Jelinek and Mercer, 1980). A suffix that
occurs only where a longer one does is passed over: it says the same. Letters: T tokens, J guesses at all of them, O classes
of lengths, C classes of counts, L tokens of the longest suffix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retro_engine.data import files
from retro_engine.errors import StoreError, UsageError
from retro_engine.jit import numba

LENGTHS = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 31, 1 << 30])  # the longest of each class
COUNTS = np.array([1, 2, 4, 8, 16, 64, 256, 1 << 62])  # the most of each class
SHAPE = len(LENGTHS), len(COUNTS)
FIRST = 0.2  # a weight before anything was seen
TRUST = 4.0  # tokens that a class is taken to have seen at what its lengths have on average
ROUNDS = 40
LEAST = 1e-30  # of a probability


@dataclass(frozen=True)
class Guesses:
    """What the suffixes before T tokens give them, the shortest first: token t's are those from ends[t - 1] to ends[t]."""

    classes_J: np.ndarray  # u1: of its length and its count, together
    shares_J: np.ndarray  # f4: the token's share of what came after the suffix
    ends_T: np.ndarray  # i8

    @classmethod
    def joined(cls, parts: "Sequence[Guesses]") -> "Guesses":
        ends = np.cumsum([0] + [len(part.classes_J) for part in parts])
        return cls(
            np.concatenate([np.empty(0, np.uint8), *(part.classes_J for part in parts)]),
            np.concatenate([np.empty(0, np.float32), *(part.shares_J for part in parts)]),
            np.concatenate([np.empty(0, np.int64), *(part.ends_T + end for part, end in zip(parts, ends))]),
        )

    def of(self, places: np.ndarray) -> "Guesses":
        """Those at some tokens, ascending."""
        begins, ends = np.concatenate(([0], self.ends_T[:-1]))[places], self.ends_T[places]
        sizes = ends - begins
        entries = np.repeat(ends - np.cumsum(sizes), sizes) + np.arange(int(sizes.sum()))
        return Guesses(self.classes_J[entries], self.shares_J[entries], np.cumsum(sizes))

    def longest(self) -> "Guesses":
        """Of each token that of the longest suffix alone."""
        last = self.ends_T - 1
        return Guesses(self.classes_J[last], self.shares_J[last], np.arange(1, len(last) + 1))


@dataclass(frozen=True)
class Mixture:
    """The weights [O, C], each from 0 to 1."""

    weights_OC: np.ndarray

    def __post_init__(self) -> None:
        """Raises UsageError for weights that cannot be used."""
        w = self.weights_OC
        if w.shape != SHAPE or w.dtype != np.float64:
            raise UsageError(f"{w.shape} weights of {w.dtype} cannot be used", f"there are {SHAPE} classes")
        wrong = w[~((w >= 0) & (w <= 1))]
        if len(wrong):
            raise UsageError(f"a weight of {wrong[0]:g} cannot be used", "it is a share: from 0 to 1")

    @classmethod
    def even(cls, weight: float) -> "Mixture":
        """The same for every suffix of at least one token."""
        weights = np.full(SHAPE, float(weight))
        weights[0] *= 0
        return cls(weights)

    @classmethod
    def fitted(cls, before_T: np.ndarray, guesses: Guesses) -> "Mixture":
        """The weights that make tokens likeliest which the model gives the probabilities `before`."""
        weights = np.full(SHAPE, FIRST)
        for _ in range(ROUNDS):
            stops, visits = np.zeros(SHAPE), np.zeros(SHAPE)
            _expect(
                before_T,
                guesses.classes_J,
                guesses.shares_J,
                guesses.ends_T,
                weights.ravel(),
                stops.ravel(),
                visits.ravel(),
            )
            of_length = (stops.sum(1) + FIRST) / (visits.sum(1) + 1)
            weights = (stops + TRUST * of_length[:, None]) / (visits + TRUST)
        return cls(weights)

    @classmethod
    def load(cls, path: Path, memory: str) -> "Mixture":
        """Those that `save` wrote. Raises MissingInputError, StoreError for another memory's, UsageError for other weights."""
        body = files.read_object(path, "retro eval RUN --memory ngram --memory-out FILE writes it")
        if body.get("memory") != memory:
            raise StoreError(
                f"{path} has weights of memory {str(body.get('memory'))[:12]}",
                f"this one is {memory[:12]}",
                "retro eval RUN --memory ngram --memory-out FILE fits them",
            )
        try:
            weights = np.array(body.get("weights"), np.float64)
        except (ValueError, TypeError) as error:
            raise StoreError(f"{path} is damaged", f"its weights are no table: {error}", "fit them again") from error
        return cls(weights)

    def save(self, path: Path, memory: str) -> None:
        """Publish the weights for the memory with this fingerprint."""
        files.publish(path, [files.json_bytes({"memory": memory, "weights": self.weights_OC.tolist()})])

    def probabilities(self, before_T: np.ndarray, guesses: Guesses) -> np.ndarray:
        """[T] of the tokens whose probabilities without a memory are `before`."""
        out = np.empty(len(before_T))
        _mix(before_T, guesses.classes_J, guesses.shares_J, guesses.ends_T, self.weights_OC.ravel(), out)
        return out


LENGTH_CLASSES = np.searchsorted(LENGTHS, np.arange(256)) * len(COUNTS)  # of each length, times C


def collect(context_TL: np.ndarray, with_token_TL: np.ndarray) -> Guesses:
    """The guesses at tokens from how often the suffixes before each occur, [T, L + 2] for l = 0 ... L + 1, and how often those
    that end with it do.
    """
    most = len(context_TL) * (context_TL.shape[1] - 1)
    classes, shares = np.empty(most, np.uint8), np.empty(most, np.float32)
    ends = np.empty(len(context_TL), np.int64)
    found = _collect(context_TL, with_token_TL, LENGTH_CLASSES, COUNTS, classes, shares, ends)
    return Guesses(classes[:found].copy(), shares[:found].copy(), ends)


@numba.njit(nogil=True, cache=True)
def _collect(context, with_token, length_classes, counts, classes, shares, ends):  # type: ignore[no-untyped-def]
    found = 0
    for token in range(len(context)):
        for length in range(context.shape[1] - 1):
            count = context[token, length]
            if count <= 0:
                break
            if length + 2 < context.shape[1] and context[token, length + 1] == count:
                continue  # the longer one stands at the same places
            which = 0
            while counts[which] < count:
                which += 1
            classes[found] = length_classes[length] + which
            shares[found] = with_token[token, length + 1] / count
            found += 1
        ends[token] = found
    return found


@numba.njit(nogil=True, cache=True)
def _mix(before, classes, shares, ends, weights, out):  # type: ignore[no-untyped-def]
    first = 0
    for token in range(len(before)):
        p = before[token]
        for guess in range(first, ends[token]):
            w = weights[classes[guess]]
            p = (1 - w) * p + w * shares[guess]
        out[token] = max(p, LEAST)
        first = ends[token]


@numba.njit(nogil=True, cache=True)
def _expect(before, classes, shares, ends, weights, stops, visits):  # type: ignore[no-untyped-def]
    """Add to each class how often a suffix of it is asked, and how often it is what gave the token."""
    p = np.empty(512)
    first = 0
    for token in range(len(before)):
        p[0] = before[token]
        size = ends[token] - first
        for guess in range(size):
            w = weights[classes[first + guess]]
            p[guess + 1] = (1 - w) * p[guess] + w * shares[first + guess]
        rest = 1.0 / max(p[size], LEAST)
        for guess in range(size - 1, -1, -1):  # the longest is asked first
            which = classes[first + guess]
            visits[which] += rest * p[guess + 1]
            stops[which] += rest * weights[which] * shares[first + guess]
            rest *= 1 - weights[which]
        first = ends[token]
