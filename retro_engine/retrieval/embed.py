"""Chunk -> vector: a hashed n-gram random projection that needs no download.

Every word and pair of neighboring words of a chunk's tokens is hashed to a fixed random direction; a chunk is
the normalised sum, weighted down for repeats. Letters: U chunks, M tokens per row, Z embedding width.
"""

import numpy as np

WIDTH = 256  # Z
SEED = 0x9E3779B97F4A7C15


def embed(tokens_UM: np.ndarray, lengths_U: np.ndarray, width: int = WIDTH) -> np.ndarray:
    """Unit vectors [U, Z] f32 of rows of token ids; an empty row gives zeros."""
    U, M = tokens_UM.shape
    out = np.zeros((U, width), np.float32)
    valid = np.arange(M) < lengths_U[:, None]
    grams = [(_mix(tokens_UM.astype(np.uint64)), valid)]
    if M > 1:
        pairs = _mix(
            tokens_UM[:, :-1].astype(np.uint64) * np.uint64(0x100000001B3) + _mix(tokens_UM[:, 1:].astype(np.uint64))
        )
        grams.append((pairs, valid[:, 1:]))
    for hashes, use in grams:
        row, column = np.nonzero(use)
        chosen = hashes[row, column]
        for part in range(4):  # four signed features a gram
            bits = _mix(chosen + np.uint64((part + 1) * SEED % 2**64))
            sign = np.where(bits >> np.uint64(63), np.float32(1), np.float32(-1))
            np.add.at(out, (row, (bits % np.uint64(width)).astype(np.int64)), sign)
    norms = np.linalg.norm(out, axis=1, keepdims=True)
    return np.divide(out, norms, out=np.zeros_like(out), where=norms > 0)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
