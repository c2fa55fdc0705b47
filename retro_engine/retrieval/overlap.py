"""How much of the text to be predicted stands in the neighbors already: the leakage measure, and a filter. And how many of a
chunk's own tokens a neighbor shares.

A chunk's neighbors help to predict the m tokens after it. The overlap of a neighbor is the share of those tokens
that are covered by n-grams which the neighbor holds too. Letters: Q chunks, B sequences, N tokens, L chunks, K neighbors,
R tokens per neighbor, M chunk length.
"""

import numpy as np

from retro_engine.data.batches import SequenceBatch, Sequences
from retro_engine.errors import UsageError
from retro_engine.jit import numba

NGRAM = 8  # tokens
REPEATED = 0.9  # a neighbor that states more of what follows is of a copy, whole or nearly
MAX_CHUNKS = 4096


def overlaps(batch: SequenceBatch, chunk_size: int, n: int = NGRAM) -> np.ndarray:
    """[B, L, K] share in 0 ... 1 of each chunk's predicted tokens that its neighbor states in runs of n or more."""
    assert batch.neighbors is not None
    assert batch.lengths is not None
    return _overlaps(batch.labels, batch.document_ids, batch.neighbors, batch.lengths, chunk_size, n)


def chunk_overlaps(batch: SequenceBatch, chunk_size: int, n: int = NGRAM) -> np.ndarray:
    """[B, L] the largest overlap of a chunk's neighbors."""
    found = overlaps(batch, chunk_size, n)
    return found.max(-1) if found.shape[-1] else np.zeros(found.shape[:2])


def repeated_share(sequences: Sequences, max_chunks: int = MAX_CHUNKS) -> float:
    """The share of chunks, of at most `max_chunks`, whose neighbors state more than REPEATED of what follows."""
    count = total = 0
    for batch in sequences.batches(64):
        found = chunk_overlaps(batch, sequences.store.chunk_size)
        last = batch.document_ids.reshape(*found.shape, -1)[..., -1]
        count, total = count + int((found > REPEATED).sum()), total + int((last >= 0).sum())
        if total >= max_chunks:
            break
    return count / max(1, total)


def check_share(flag: str, value: float | None) -> None:
    """Raises UsageError for a share of overlap that nothing, or no neighbor, could be above."""
    if value is not None and not 0 <= value < 1:
        raise UsageError(f"--{flag} {value} cannot be used", "a share from 0 up to, but not, 1")


def drop_leaks(batch: SequenceBatch, chunk_size: int, limit: float, n: int = NGRAM) -> int:
    """Make neighbors missing whose overlap is above `limit`; how many there were. Changes the batch's lengths."""
    assert batch.lengths is not None
    leaks = (overlaps(batch, chunk_size, n) > limit) & (batch.lengths > 0)
    batch.lengths[leaks] = 0
    return int(leaks.sum())


def stated_shares(
    targets_QM: np.ndarray, target_lengths_Q: np.ndarray, neighbors_QKR: np.ndarray, lengths_QK: np.ndarray, n: int
) -> np.ndarray:
    """[Q, K] share of each target's tokens that lie in runs of n or more which the neighbor holds too.

    A target shorter than n is one run of its own length.
    """
    return _stated_shares(
        targets_QM.astype(np.int64), target_lengths_Q.astype(np.int64), neighbors_QKR, lengths_QK.astype(np.int64), n
    )


def shared_tokens(
    chunks_QM: np.ndarray, chunk_lengths_Q: np.ndarray, neighbors_QKM: np.ndarray, lengths_QK: np.ndarray
) -> np.ndarray:
    """[Q, K] share of each chunk's different tokens that the neighbor has, in any order (arXiv 2305.16243, 2505.14309)."""
    return _shared_tokens(
        chunks_QM.astype(np.int64), chunk_lengths_Q.astype(np.int64), neighbors_QKM, lengths_QK.astype(np.int64)
    )


@numba.njit(cache=True)
def _shared_tokens(chunks, chunk_lengths, neighbors, lengths):  # type: ignore[no-untyped-def]
    Q, K = lengths.shape
    out = np.zeros((Q, K))
    for q in range(Q):
        own = np.unique(chunks[q, : chunk_lengths[q]])
        for k in range(K):
            count = 0
            for token in own:
                for p in range(lengths[q, k]):
                    if neighbors[q, k, p] == token:
                        count += 1
                        break
            out[q, k] = count / max(1, len(own))
    return out


@numba.njit(cache=True)
def _stated_shares(targets, target_lengths, neighbors, lengths, n):  # type: ignore[no-untyped-def]
    Q, K = lengths.shape
    out = np.zeros((Q, K))
    covered = np.zeros(targets.shape[1], np.bool_)
    for q in range(Q):
        count = target_lengths[q]
        run = min(n, count)
        if run == 0:
            continue
        for k in range(K):
            covered[:] = False
            for i in range(count - run + 1):
                for p in range(lengths[q, k] - run + 1):
                    length = 0
                    while length < run and neighbors[q, k, p + length] == targets[q, i + length]:
                        length += 1
                    if length == run:
                        covered[i : i + run] = True
                        break
            out[q, k] = covered.sum() / count
    return out


@numba.njit(cache=True)
def _overlaps(labels, documents, neighbors, lengths, m, n):  # type: ignore[no-untyped-def]
    B, L, K = lengths.shape
    out = np.zeros((B, L, K))
    covered = np.zeros(m, np.bool_)
    for b in range(B):
        for u in range(L):
            first = u * m + m - 1  # the labels of tokens first ... first + m - 1 are what is predicted
            last = min(first + m, labels.shape[1])
            count = 0
            while (
                first + count < last
                and labels[b, first + count] >= 0
                and documents[b, first + count] == documents[b, first]
            ):
                count += 1
            for k in range(K):
                covered[:] = False
                for i in range(count - n + 1):
                    for p in range(lengths[b, u, k] - n + 1):
                        length = 0
                        while length < n and neighbors[b, u, k, p + length] == labels[b, first + i + length]:
                            length += 1
                        if length == n:
                            covered[i : i + n] = True
                            break
                if count:
                    out[b, u, k] = covered.sum() / count
    return out
