"""Gain by overlap: where retrieval helps, is it because the text stands in the neighbors already?

Chunks are sorted by how much of what they predict their neighbors state word for word (retrieval/overlap.py), and
losses are compared within each group; the cumulative curve is that of RETRO (arXiv 2112.04426 section 2.6).
"""

from dataclasses import dataclass

import numpy as np

from retro_engine.data.batches import SequenceBatch, Sequences
from retro_engine.evaluate.losses import own_bytes, token_losses
from retro_engine.model.retro import RetroModel
from retro_engine.retrieval.ceiling import copyable
from retro_engine.retrieval.overlap import chunk_overlaps

GROUPS = (("none", 0.0, 0.0), ("up to .3", 0.0, 0.3), ("above .3", 0.3, 1.0))  # name, above, up to
LIMITS = (0.0, 0.125, 0.25, 0.5, 1.0)  # of the cumulative curve


@dataclass
class ChunkLosses:
    """Per chunk that has neighbors: overlap, UTF-8 bytes of what is predicted, and nats for each model.

    `copyable` counts the tokens under the copy ceiling, `copied` those of them that each model's most likely token is.
    """

    overlap: np.ndarray
    bytes: np.ndarray
    nats: dict[str, np.ndarray]
    copyable: int
    copied: dict[str, int]

    def realized(self) -> dict[str, float]:
        """The share of the copy ceiling's tokens that each model predicts."""
        return {name: count / max(1, self.copyable) for name, count in self.copied.items()}

    def bits_per_byte(self, name: str, chosen: np.ndarray) -> float | None:
        if not chosen.any():
            return None
        return float(self.nats[name][chosen].sum() / np.log(2) / max(1, self.bytes[chosen].sum()))

    def groups(self) -> list[dict[str, float | str | int | None]]:
        """One row a group of GROUPS: chunks, and bits per byte of each model; None where there are no chunks."""
        rows: list[dict[str, float | str | int | None]] = []
        for name, above, up_to in GROUPS:
            chosen = (self.overlap <= up_to) & ((self.overlap > above) | (up_to == 0))
            rows.append(
                {"overlap": name, "chunks": int(chosen.sum()), **{n: self.bits_per_byte(n, chosen) for n in self.nats}}
            )
        return rows

    def curve(self) -> list[dict[str, float | None]]:
        """Bits per byte over the chunks whose overlap is at most each of LIMITS."""
        return [
            {"up_to": limit, **{name: self.bits_per_byte(name, self.overlap <= limit) for name in self.nats}}
            for limit in LIMITS
        ]


def chunk_losses(
    models: dict[str, tuple[RetroModel, str]],
    sequences: Sequences,
    token_bytes: np.ndarray,
    batch_size: int = 8,
    limit: int | None = None,
) -> ChunkLosses:
    """Losses of several (model, mode) pairs over the tokens that each chunk's neighbors can condition."""
    m = sequences.store.chunk_size
    overlap: list[np.ndarray] = []
    num_bytes: list[np.ndarray] = []
    nats: dict[str, list[np.ndarray]] = {name: [] for name in models}
    copied, count = dict.fromkeys(models, 0), 0
    for rows in sequences.batch_rows(batch_size, limit):
        batch = sequences.batch(rows)
        assert batch.lengths is not None
        has_neighbors = (batch.lengths > 0).any(-1) & (batch.document_ids[:, m - 1 :: m] >= 0)
        can_copy = copyable(batch, m)
        count += int(can_copy.sum())
        chosen = _tokens_of_chunks(batch.labels, batch.document_ids, m)
        overlap.append(chunk_overlaps(batch, m)[has_neighbors])
        counted = _own_bytes(sequences, batch, np.where(chosen, token_bytes[batch.labels], 0), token_bytes)
        num_bytes.append(_sum(counted, m)[has_neighbors])
        for name, (model, mode) in models.items():
            losses, best = token_losses(model, batch if mode == "on" else sequences.batch(rows, mode), model.device)
            nats[name].append(_sum(np.where(chosen, losses.double().cpu().numpy(), 0), m)[has_neighbors])
            copied[name] += int((best.cpu().numpy() == batch.labels)[can_copy].sum())
    joined = {name: np.concatenate(values) for name, values in nats.items()}
    return ChunkLosses(np.concatenate(overlap), np.concatenate(num_bytes), joined, count, copied)


def _own_bytes(sequences: Sequences, batch: SequenceBatch, counted: np.ndarray, token_bytes: np.ndarray) -> np.ndarray:
    """[B, N] bytes of text for those that tokens stand for."""
    documents, places = np.unique(batch.document_ids, return_inverse=True)
    scale = np.ones(len(documents))
    is_text = documents >= 0
    scale[is_text] = own_bytes(sequences, documents[is_text], token_bytes, scale[is_text])
    return counted if (scale == 1).all() else counted * scale[places].reshape(counted.shape)


def _tokens_of_chunks(labels: np.ndarray, documents: np.ndarray, m: int) -> np.ndarray:
    """[B, N] whether the token's label is predicted with the neighbors of the chunk that it attends."""
    position = np.arange(labels.shape[1])
    chunk = (position + 1) // m - 1
    last = documents[:, np.maximum(chunk, 0) * m + m - 1]
    return (labels >= 0) & (chunk >= 0) & (documents == last)


def _sum(values: np.ndarray, m: int) -> np.ndarray:
    """[B, N] per token -> [B, L] per chunk: tokens um + m - 1 ... um + 2m - 2 belong to chunk u."""
    shifted = np.pad(values[:, m - 1 :], ((0, 0), (0, m - 1)))
    return shifted.reshape(len(values), -1, m).sum(-1)
