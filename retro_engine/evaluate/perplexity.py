"""Loss, perplexity and bits per byte over every token of some documents, with retrieval on, off or random.

Each document is cut into sequences from its start; every token with a predecessor in its document is predicted
once, the end-of-document token included (it has 0 bytes). Intervals are bootstrapped over documents.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retro_engine.data.batches import SequenceBatch, Sequences
from retro_engine.data.inputs import open_file, shown
from retro_engine.data.questions import Questions
from retro_engine.data.streams import read_text
from retro_engine.errors import MissingInputError
from retro_engine.model.retro import RetroModel
from retro_engine.retrieval.overlap import drop_leaks

BOOTSTRAP_DRAWS = 1000
MIN_UNITS = 5  # fewer documents or entities make no interval
CONFIDENCE = 0.95
MAX_TEXT_BYTES = 1 << 32  # of a share whose words are counted


@dataclass
class DocumentLosses:
    """Sums per document: nats, predicted tokens, their UTF-8 bytes."""

    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray

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


def count_words(path: Path) -> int:
    """Words of a text as WikiText-103's papers count them: what stands between spaces, and one end a line."""
    with open_file(path) as file:
        text = read_text(file, MAX_TEXT_BYTES, shown(path))
    words = len(text.split()) + text.count("\n")
    if not words:
        raise MissingInputError(f"{path} has no words", "", "--words FILE")
    return words


def word_perplexity(losses: DocumentLosses, words: int) -> float:
    return math.exp(min(float(losses.nats.sum()) / words, 700.0))


@dataclass(frozen=True)
class Given:
    """Neighbors that every chunk reads in mode "given": tokens [K, R] and lengths [K]."""

    tokens: np.ndarray
    lengths: np.ndarray

    def attach(self, batch: SequenceBatch, chunk_size: int) -> SequenceBatch:
        B, L = batch.tokens.shape[0], batch.tokens.shape[1] // chunk_size
        neighbors = np.broadcast_to(self.tokens, (B, L, *self.tokens.shape)).copy()
        return replace(
            batch, neighbors=neighbors, lengths=np.broadcast_to(self.lengths, (B, L, len(self.lengths))).copy()
        )


def bootstrap(statistic: Callable[[np.ndarray], float], count: int, seed: int = 0) -> tuple[float, float]:
    """95 % interval of `statistic` of draws with replacement from `count` units; (nan, nan) below MIN_UNITS."""
    if count < MIN_UNITS:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, count, count)) for _ in range(BOOTSTRAP_DRAWS)]
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


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
        logits = model(tokens, neighbors, lengths, documents).float()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return losses.reshape(labels.shape), logits.argmax(-1)


def evaluate(
    model: RetroModel,
    sequences: Sequences | Questions,
    token_bytes: np.ndarray,
    modes: Iterable[str] = ("on", "off", "random"),
    batch_size: int = 8,
    limit: int | None = None,
    precision: str = "32",
    advance: Callable[[int], None] = lambda count: None,
    given: Given | None = None,
    leak_limit: float | None = None,
    shard: tuple[int, int] = (0, 1),
    reduce: Callable[[Iterable[np.ndarray]], None] = lambda arrays: None,
) -> dict[str, DocumentLosses]:
    """Losses per document for each mode (on, off, random, one_right, given); `limit` batches at most a mode.

    `leak_limit`: neighbors that state more than this share of what follows word for word become missing. `shard` (i, n): every n-th batch
    from the i-th on, with `reduce` to sum arrays over the n processes in place. The model is left in the mode it was in.
    """
    device = model.embedding.weight.device
    was_training = model.training
    model.eval()
    results = {}
    numbers = np.full(sequences.num_documents, -1, np.int64)
    numbers[sequences.documents] = np.arange(len(sequences.documents))
    for mode in modes:
        count = len(sequences.documents)
        sums = DocumentLosses(np.zeros(count), np.zeros(count, np.int64), np.zeros(count, np.int64))
        all_rows = sequences.batch_rows(batch_size, limit)
        for turn in range(0, len(all_rows), shard[1]):
            is_extra = turn + shard[0] >= len(all_rows)  # so that every process makes as many passes
            rows = all_rows[min(turn + shard[0], len(all_rows) - 1)]
            batch = sequences.batch(rows, "off" if mode == "given" else mode)
            if mode == "given":
                assert given is not None, "mode given needs neighbors"
                batch = given.attach(batch, sequences.store.chunk_size)
            if leak_limit is not None and batch.lengths is not None:
                drop_leaks(batch, sequences.store.chunk_size, leak_limit)
            losses, _ = token_losses(model, batch, device, precision)
            has_label = (batch.labels >= 0) & (not is_extra)
            document = numbers[batch.document_ids[has_label]]
            np.add.at(sums.nats, document, losses.double().cpu().numpy()[has_label])
            np.add.at(sums.tokens, document, 1)
            np.add.at(sums.bytes, document, token_bytes[batch.labels[has_label]])
            advance(len(batch.tokens))
        reduce((sums.nats, sums.tokens, sums.bytes))
        seen = sums.tokens > 0
        num_bytes = own_bytes(sequences, sequences.documents[seen], token_bytes, sums.bytes[seen])
        results[mode] = DocumentLosses(sums.nats[seen], sums.tokens[seen], num_bytes)
    model.train(was_training)
    return results
