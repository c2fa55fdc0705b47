"""Losses of tokens, their sums over documents, and intervals bootstrapped over those. Letters: b sequences, n tokens."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retro_engine.data.batches import SequenceBatch, Sequences
from retro_engine.data.questions import Questions
from retro_engine.model.retro import RetroModel

BOOTSTRAP_DRAWS = 1000
MIN_UNITS = 5  # fewer documents or entities make no interval
CONFIDENCE = 0.95


@dataclass
class DocumentLosses:
    """Sums per document: nats, predicted tokens, their UTF-8 bytes."""

    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray

    @classmethod
    def zeros(cls, num_documents: int) -> "DocumentLosses":
        return cls(np.zeros(num_documents), *(np.zeros(num_documents, np.int64) for _ in range(2)))

    def add(self, documents: np.ndarray, nats: np.ndarray, labels: np.ndarray, token_bytes: np.ndarray) -> None:
        """Count predicted tokens [t], each with its document, its nats and its label."""
        np.add.at(self.nats, documents, nats)
        np.add.at(self.tokens, documents, 1)
        np.add.at(self.bytes, documents, token_bytes[labels])

    def seen(
        self, sequences: "Sequences | Questions", documents: np.ndarray, token_bytes: np.ndarray
    ) -> "DocumentLosses":
        """The documents of which something was predicted (their numbers are `documents`), with their own bytes."""
        is_seen = self.tokens > 0
        num_bytes = own_bytes(sequences, documents[is_seen], token_bytes, self.bytes[is_seen])
        return DocumentLosses(self.nats[is_seen], self.tokens[is_seen], num_bytes)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nats.sum() / max(1, self.tokens.sum()))

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return float(self.nats.sum() / math.log(2) / max(1, self.bytes.sum()))

    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of bits per byte, over documents."""
        return bootstrap(
            lambda draw: self.nats[draw].sum() / math.log(2) / max(1, self.bytes[draw].sum()), len(self.nats)
        )

    def summary(self) -> dict[str, Any]:
        low, high = self.interval()
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "interval": [low, high] if math.isfinite(low) else None,
            "tokens": int(self.tokens.sum()),
            "bytes": int(self.bytes.sum()),
            "documents": int((self.tokens > 0).sum()),
        }


def bootstrap(statistic: Callable[[np.ndarray], float], count: int, seed: int = 0) -> tuple[float, float]:
    """95 % interval of `statistic` of draws with replacement from `count` units; (nan, nan) below MIN_UNITS."""
    if count < MIN_UNITS:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, count, count)) for _ in range(BOOTSTRAP_DRAWS)]
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def proportion_interval(right: float, count: int) -> tuple[float, float]:
    """95 % interval of a share `right` of `count` units, each right or wrong (Wilson's score interval): also of none and of
    all it has a width, which a bootstrap has not. (nan, nan) below MIN_UNITS, as there.
    """
    if count < MIN_UNITS:
        return math.nan, math.nan
    share, z = right / count, NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def show_interval(low: float, high: float, form: str = ".3f") -> str:
    """`[low, high]`, or that there were too few units for one."""
    return f"[{low:{form}}, {high:{form}}]" if math.isfinite(low) else "[too few]"


def own_bytes(
    sequences: Sequences | Questions, documents: np.ndarray, token_bytes: np.ndarray, counted: np.ndarray
) -> np.ndarray:
    """[d] bytes of text for `counted`, those that tokens of `documents` stand for.

    They differ where the tokenizer loses text: a document's own bytes are shared out by the bytes of its tokens.
    """
    store = sequences.store
    if store.manifest.get("losses") == []:  # earlier stores do not say
        return counted
    if isinstance(sequences, Questions):
        own = np.array([len(f" {sequences.questions[number].answers[0]}".encode()) for number in documents])
        stood = np.array([token_bytes[sequences.answers[number]].sum() for number in documents])
    else:
        own, stood = store.documents[documents, 2], np.zeros(len(documents), np.int64)
        for place, number in enumerate(documents):
            tokens, lengths = store.rows(*store.document_rows(int(number)))
            is_text = np.arange(store.chunk_size) < lengths[:, None]
            stood[place] = token_bytes[tokens[is_text]].sum()
    return counted if np.array_equal(own, stood) else counted * (own / np.maximum(1, stood))


def to_tensors(
    batch: SequenceBatch, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """tokens, labels, document_ids, neighbors and lengths (None when every neighbor is full) on `device`."""
    tokens, labels, documents = (
        torch.from_numpy(array).to(device) for array in (batch.tokens, batch.labels, batch.document_ids)
    )
    if batch.neighbors is None or batch.lengths is None:
        return tokens, labels, documents, None, None
    return (
        tokens,
        labels,
        documents,
        torch.from_numpy(batch.neighbors).to(device),
        torch.from_numpy(batch.lengths).to(device),
    )


def reads_of(batch: SequenceBatch, device: torch.device) -> Tensor | None:
    """Which of a batch's shared neighbors each row reads; None = they are not shared."""
    return None if batch.reads is None else torch.from_numpy(batch.reads).to(device)


def autocast(device: torch.device, precision: str) -> Any:
    """Of the mixed precisions bf16-mixed and 16-mixed; nothing for the others."""
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    return torch.autocast(device.type, half) if half is not None else nullcontext()


def token_losses(
    model: RetroModel, batch: SequenceBatch, device: torch.device, precision: str = "32"
) -> tuple[Tensor, Tensor]:
    """Nats of every label [b, n] (0 where there is none) and the most likely token [b, n]."""
    tokens, labels, documents, neighbors, lengths = to_tensors(batch, device)
    with torch.no_grad(), autocast(device, precision):
        reads = reads_of(batch, device)
        losses, best = model(tokens, neighbors, lengths, documents, labels, reads=reads, is_each=True)
    return losses, best


@contextmanager
def evaluating(model: RetroModel) -> Iterator[None]:
    """The model without dropout; afterwards in the mode that it was in."""
    was_training = model.training
    model.eval()
    yield
    model.train(was_training)
