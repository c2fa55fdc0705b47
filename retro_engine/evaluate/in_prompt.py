"""The rival that needs no RETRO: the same decoder reads the neighbors in its prompt (arXiv 2302.00083).

Each chunk's span (the tokens that its neighbors may condition) is predicted with its neighbors' text put before the text so
far, retrieval off: one full pass a chunk. Without neighbors a span is predicted as with retrieval off. Letters: N tokens,
M chunk length, L chunks, K neighbors, R tokens per neighbor.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from retro_engine.data.batches import SequenceBatch, Sequences
from retro_engine.evaluate.losses import DocumentLosses, autocast, evaluating
from retro_engine.model.retro import RetroModel


def evaluate_in_prompt(
    model: RetroModel,
    sequences: Sequences,
    token_bytes: np.ndarray,
    limit: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
    precision: str = "32",
) -> DocumentLosses:
    """Losses per document of the same tokens as `evaluate`'s; `limit` batches of 8 sequences and `precision` as there."""
    count, device = sequences.num_documents, model.device
    sums = DocumentLosses.zeros(count)
    with evaluating(model):
        for rows in sequences.batch_rows(8, limit):
            batch = sequences.batch(rows)
            for number in range(len(rows)):
                with autocast(device, precision):
                    losses = losses_in_prompt(model, batch, number, sequences.store.chunk_size)
                labels, has_label = batch.labels[number], batch.labels[number] >= 0
                documents = batch.document_ids[number][has_label]
                sums.add(documents, losses[has_label], labels[has_label], token_bytes)
                advance(1)
    return sums.seen(sequences, np.arange(count), token_bytes)


def losses_in_prompt(model: RetroModel, batch: SequenceBatch, number: int, M: int) -> np.ndarray:
    """Nats of every label [N] of one sequence."""
    tokens, labels, documents = batch.tokens[number], batch.labels[number], batch.document_ids[number]
    device = model.device
    out = _pass(model, tokens, labels, documents, device)
    if batch.neighbors is None or batch.lengths is None:
        return out
    for u in range(batch.lengths.shape[1]):
        first, last = u * M + M - 1, min(u * M + 2 * M - 1, len(tokens))
        document = documents[first]
        read = [
            batch.neighbors[number, u, k, : batch.lengths[number, u, k]]
            for k in reversed(range(batch.lengths.shape[2]))  # the best one last, beside the text
            if batch.lengths[number, u, k]
        ]
        if not read or document < 0:
            continue
        begin = int(np.argmax(documents == document))
        inside = documents[first:last] == document  # as chunked cross-attention: no other document reads them
        before = np.concatenate(read)
        given = np.concatenate((before, tokens[begin:last]))
        wanted = np.concatenate((np.full(len(before) + first - begin, -100), labels[first:last]))
        losses = _pass(model, given, wanted, np.zeros(len(given), np.int64), device)[len(before) + first - begin :]
        out[first:last][inside] = losses[inside]
    return out


def _pass(
    model: RetroModel, tokens: np.ndarray, labels: np.ndarray, documents: np.ndarray, device: torch.device
) -> np.ndarray:
    given, wanted, ids = (
        torch.from_numpy(np.ascontiguousarray(x))[None].to(device) for x in (tokens, labels, documents)
    )
    losses = torch.zeros(len(tokens), device=device)
    is_wanted = wanted[0] >= 0
    with torch.no_grad():
        logits = model.logits(model.hidden(given, None, None, ids)[0, is_wanted]).float()
        losses[is_wanted] = F.cross_entropy(logits, wanted[0, is_wanted], reduction="none")
    return losses.double().cpu().numpy()
