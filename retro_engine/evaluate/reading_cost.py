"""What reading costs: the same texts predicted with their neighbors kept, with none kept, and in the prompt, each timed.

Kept or not, a text is taken in as generation takes in a prompt: piece by piece, into a cache. In the prompt each chunk is a
pass of its own (in_prompt.py). Texts are the documents of sequences, one after the other.
Letters: T tokens of a text, L whole chunks of it, K neighbors, R tokens per neighbor.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from retro_engine.data.batches import SequenceBatch, Sequences
from retro_engine.evaluate.in_prompt import losses_in_prompt
from retro_engine.evaluate.losses import evaluating
from retro_engine.model.decode_cache import new_cache
from retro_engine.model.decoding import prefill
from retro_engine.model.encodings import Encodings
from retro_engine.model.prefix import Encode
from retro_engine.model.retro import RetroModel

WAYS = ("kept", "not kept", "in the prompt")
PIECE_CHUNKS = 4  # of a prompt, taken in at once
KEPT_BYTES = 4 << 30  # at most, of one text's neighbors


@dataclass(kw_only=True)
class ReadingCost:
    """Of all texts together, by way of reading; every way predicts the same tokens."""

    seconds: dict[str, float]
    nats: dict[str, float]
    texts: int = 0
    tokens: int = 0


@torch.no_grad()
def reading_cost(
    model: RetroModel,
    sequences: Sequences,
    limit: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> ReadingCost:
    """`limit` batches of 8 sequences, as `evaluate` takes them. The ways take turns, text by text."""
    cost = ReadingCost(seconds=dict.fromkeys(WAYS, 0.0), nats=dict.fromkeys(WAYS, 0.0))
    with evaluating(model):
        for text in texts_of(sequences, limit):
            encodings = Encodings(model, KEPT_BYTES)
            _losses(model, text, encodings.of)  # now they are kept
            works = {
                "kept": partial(_losses, model, text, encodings.of),
                "not kept": partial(_losses, model, text, None),
                "in the prompt": partial(losses_in_prompt, model, text, 0, sequences.store.chunk_size),
            }
            has_label = text.labels[0] >= 0
            for way, work in works.items():
                start = time.perf_counter()
                losses = work()
                cost.seconds[way] += time.perf_counter() - start
                cost.nats[way] += float(losses[has_label].sum())
            cost.texts += 1
            cost.tokens += int(has_label.sum())
            advance(1)
    return cost


def texts_of(sequences: Sequences, limit: int | None = None) -> Iterator[SequenceBatch]:
    """Every document's part of every sequence as a batch of one, with the neighbors of its whole chunks."""
    M = sequences.store.chunk_size
    for batch in sequences.batches(8, limit=limit):
        assert batch.neighbors is not None and batch.lengths is not None
        for row, documents in enumerate(batch.document_ids):
            for document in np.unique(documents[documents >= 0]):
                places = np.flatnonzero(documents == document)
                part = slice(row, row + 1), slice(int(places[0]), int(places[-1]) + 1)
                chunks = slice(row, row + 1), slice(part[1].start // M, part[1].stop // M)
                yield SequenceBatch(
                    batch.tokens[part],
                    batch.labels[part],
                    document_ids=batch.document_ids[part],
                    neighbors=batch.neighbors[chunks],
                    lengths=batch.lengths[chunks],
                )


def _losses(model: RetroModel, text: SequenceBatch, encode: Encode | None) -> np.ndarray:
    """Nats [t] of a text that is taken in with its neighbors."""
    M, device = model.config.chunk_size, model.device
    assert text.neighbors is not None and text.lengths is not None
    tokens, neighbors, lengths = (
        torch.from_numpy(np.ascontiguousarray(part)).to(device) for part in (text.tokens, text.neighbors, text.lengths)
    )
    T, (K, R) = tokens.shape[1], neighbors.shape[2:]
    cache = new_cache(model, 1, T, K * R, encode)
    out = []
    for start in range(0, T, PIECE_CHUNKS * M):
        stop = min(start + PIECE_CHUNKS * M, T)
        whole = slice(start // M, stop // M)
        logits = prefill(model, cache, tokens[:, start:stop], neighbors[:, whole], lengths[:, whole])[0]
        labels = torch.from_numpy(np.ascontiguousarray(text.labels[0, start:stop])).to(device)
        out.append(F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="none"))
    return torch.cat(out).double().cpu().numpy()
