"""Value accuracy on `facts`: does the model say values that stand only in its neighbors?

Teacher-forced: at every token of a value, is the most likely token the right one? Tokens that no neighbor can
condition (before the end of the first chunk) are left out; with one right and one wrong neighbor also values that
the right one does not state. Intervals over entities.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retro_engine.data.batches import MODES, SequenceBatch, Sequences
from retro_engine.evaluate.losses import DocumentLosses, bootstrap, token_losses
from retro_engine.model.retro import RetroModel


@dataclass
class FactsResult:
    """Per entity: value tokens and how many were right, whole values and how many were right, and the losses."""

    tokens: np.ndarray
    right_tokens: np.ndarray
    values: np.ndarray
    right_values: np.ndarray
    losses: DocumentLosses

    @property
    def value_accuracy(self) -> float:
        return float(self.right_tokens.sum() / max(1, self.tokens.sum()))

    @property
    def whole_values(self) -> float:
        return float(self.right_values.sum() / max(1, self.values.sum()))

    def summary(self) -> dict[str, Any]:
        ratio = lambda a, b: bootstrap(lambda draw: a[draw].sum() / max(1, b[draw].sum()), len(a))  # noqa: E731
        return {
            "value_accuracy": self.value_accuracy,
            "value_accuracy_interval": ratio(self.right_tokens, self.tokens),
            "whole_values": self.whole_values,
            "whole_values_interval": ratio(self.right_values, self.values),
            "bits_per_byte": self.losses.bits_per_byte,
            "bits_per_byte_interval": self.losses.interval(),
            "entities": len(self.tokens),
        }


def evaluate_facts(
    model: RetroModel,
    sequences: Sequences,
    documents_path: Path,
    modes: Sequence[str] = MODES,
    batch_size: int = 32,
    precision: str = "32",
) -> dict[str, FactsResult]:
    """Results per mode (on, off, random, one_right) over the store's documents, whose value spans are in
    `documents_path` (heldout.jsonl of `builtin.write_facts`, in the store's order).
    """
    store = sequences.store
    rows_of_text = [json.loads(line) for line in documents_path.read_text(encoding="utf-8").splitlines()]
    value_of = _value_numbers(rows_of_text, sequences)
    token_bytes = store.tokenizer.token_bytes()
    device = model.device
    results = {}
    for mode in modes:
        count = store.num_documents
        tokens, right, values, right_values = (np.zeros(count) for _ in range(4))
        sums = DocumentLosses.zeros(count)
        is_right_value: dict[tuple[int, int], bool] = {}
        for rows in sequences.batch_rows(batch_size):
            batch = sequences.batch(rows, mode)
            losses, best = token_losses(model, batch, device, precision)
            document, has_label = batch.document_ids, batch.labels >= 0
            nats = losses.double().cpu().numpy()[has_label]
            sums.add(document[has_label], nats, batch.labels[has_label], token_bytes)
            value = _values_of_labels(value_of, rows, store.chunk_size)
            is_value = (value > 0) & has_label
            if mode == "one_right":
                is_value &= _is_stated(rows_of_text, batch, value, is_value, sequences)
            is_right = best.cpu().numpy() == batch.labels
            np.add.at(tokens, document[is_value], 1)
            np.add.at(right, document[is_value], is_right[is_value])
            for key, good in zip(
                zip(document[is_value].tolist(), value[is_value].tolist()), is_right[is_value].tolist()
            ):
                is_right_value[key] = is_right_value.get(key, True) and good
        for (number, _), good in is_right_value.items():
            values[number] += 1
            right_values[number] += good
        results[mode] = FactsResult(tokens, right, values, right_values, sums)
    return results


def _is_stated(
    texts: list[dict[str, Any]], batch: SequenceBatch, value: np.ndarray, is_value: np.ndarray, sequences: Sequences
) -> np.ndarray:
    """[B, N] does the first neighbor of the chunk that a token attends state the value?"""
    assert batch.neighbors is not None and batch.lengths is not None
    m = sequences.store.chunk_size
    shown: dict[tuple[int, int], str] = {}
    out = np.zeros_like(is_value)
    for b, t in zip(*np.nonzero(is_value)):
        u = (t + 1) // m - 1
        if (b, u) not in shown:
            shown[b, u] = sequences.store.tokenizer.decode(batch.neighbors[b, u, 0, : batch.lengths[b, u, 0]])
        row = texts[batch.document_ids[b, t]]
        start, end = row["spans"][value[b, t] - 1]
        out[b, t] = row["text"][start:end] in shown[b, u]
    return out


def _value_numbers(texts: list[dict[str, Any]], sequences: Sequences) -> np.ndarray:
    """[rows * m + 1]: for each token of the store the number of the value it belongs to in its document, 0 = none."""
    store = sequences.store
    m = store.chunk_size
    numbers = np.zeros(store.num_rows * m + 1, np.int64)
    for document, row in enumerate(texts):
        _, offsets = store.tokenizer.encode_with_offsets(row["text"])
        first = store.document_rows(document)[0] * m
        for place, (start, end) in enumerate(offsets[m:], m):  # earlier ones are predicted before any neighbor is seen
            for number, (begin, stop) in enumerate(row["spans"], 1):
                if start < stop and end > begin:
                    numbers[first + place] = number
    return numbers


def _values_of_labels(value_of: np.ndarray, rows_BL: np.ndarray, m: int) -> np.ndarray:
    """The value that each label [B, N] belongs to: the label of token t is token t + 1 of the store."""
    position = rows_BL[..., None] * m + np.arange(m) + 1
    return np.where(rows_BL[..., None] < 0, 0, value_of[position]).reshape(len(rows_BL), -1)
