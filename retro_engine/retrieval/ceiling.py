"""The copy ceiling: how much retrieval can give on a corpus, before anyone trains.

The share of held-out tokens that some 2-gram match in the neighbors predicts and no 2-gram match in the text
before it does. Letters: S sequences, N tokens, L chunks, K neighbors, R tokens per neighbor.
"""

import numpy as np

from retro_engine.data.batches import SequenceBatch, Sequences
from retro_engine.jit import numba

CONTEXT = 128  # tokens of the own text that are looked at
REALIZED = 0.5  # the share of the ceiling that small models reach at best (docs/retrieval-ready.md)
MAX_TOKENS = 200_000
LARGE = 0.25  # ceilings of text that is not made of other documents are below .1
MANY_REPEATED = 0.05


def copy_ceiling(sequences: Sequences, max_tokens: int = MAX_TOKENS) -> tuple[float, int]:
    """The ceiling over at most `max_tokens` labelled tokens of `sequences`, and how many there were."""
    copied = total = 0
    for batch in sequences.batches(64):
        copied += int(copyable(batch, sequences.store.chunk_size).sum())
        total += int((batch.labels >= 0).sum())
        if total >= max_tokens:
            break
    return copied / max(1, total), total


def copyable(batch: SequenceBatch, chunk_size: int) -> np.ndarray:
    """[S, N] whether a token's label can be copied from the neighbors it attends, and not from the text before it."""
    assert batch.neighbors is not None
    assert batch.lengths is not None
    return _copyable(batch.tokens, batch.labels, batch.document_ids, batch.neighbors, batch.lengths, chunk_size)


def describe_ceiling(share: float, count: int, repeated: float = 0.0) -> str:
    """What to hope for; a warning where the neighbors state so much of what follows that it tells of copies.

    `repeated`: the share of chunks whose neighbors state nine tenths of what follows (`overlap.repeated_share`).
    """
    if share > LARGE or repeated > MANY_REPEATED:
        return (
            f"WARNING: the neighbors state what follows: duplicates? {share:.1%} of {count:,} held-out tokens can be copied "
            f"from them and not from the text before (copy ceiling), and of {repeated:.1%} of the chunks they state more "
            "than nine tenths of what follows, word for word\n"
            "  what is gained there by reading is not gained on new text; copies are left out, near-copies are not\n"
            "  retro neighbors STORE --near-duplicates .8 --leak-limit .3 --name clean leaves them out"
        )
    if share == 0:
        return f"copy ceiling: nothing in {count:,} held-out tokens can be copied from neighbors: nothing to gain here"
    return (
        f"copy ceiling: {share:.1%} of {count:,} held-out tokens can be copied from neighbors and not from the text "
        f"before them; expect at most about {share * REALIZED:.1%} fewer bits per byte"
    )


@numba.njit(cache=True)
def _copyable(tokens, labels, documents, neighbors, lengths, chunk_size):  # type: ignore[no-untyped-def]
    out = np.zeros(tokens.shape, np.bool_)
    for s in range(tokens.shape[0]):
        for t in range(tokens.shape[1]):
            label = labels[s, t]
            if label < 0:
                continue
            chunk = (t + 1) // chunk_size - 1
            if t == 0 or documents[s, t - 1] != documents[s, t] or chunk < 0:
                continue
            last = (chunk + 1) * chunk_size - 1
            if documents[s, last] != documents[s, t]:
                continue
            before, here = tokens[s, t - 1], tokens[s, t]
            is_known = False
            for p in range(max(1, t - CONTEXT), t):
                is_match = tokens[s, p] == here and tokens[s, p - 1] == before and tokens[s, p + 1] == label
                if is_match and documents[s, p - 1] == documents[s, t]:
                    is_known = True
                    break
            if is_known:
                continue
            for k in range(neighbors.shape[2]):
                is_found = False
                for p in range(1, lengths[s, chunk, k] - 1):
                    is_bigram = neighbors[s, chunk, k, p] == here and neighbors[s, chunk, k, p - 1] == before
                    if is_bigram and neighbors[s, chunk, k, p + 1] == label:
                        is_found = True
                        break
                if is_found:
                    out[s, t] = True
                    break
    return out
