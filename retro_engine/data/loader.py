"""Chunk ids -> token arrays, from one or more stores: the C++ loader, and its NumPy twin without a compiler.

Shape letters: R tokens per neighbor, M tokens per row. Both map the stores' files and check every block they
touch; ids count through the stores in order.
"""

import os
import time
from collections.abc import Sequence

import numpy as np

from retro_engine.data.store import Store
from retro_engine.errors import StoreError, UsageError

CHECKED_S = 1.0  # between two looks at the sizes of files that C++ reads


def has_native_loader() -> bool:
    try:
        from retro_engine.data import _loader  # noqa: F401
    except ImportError:
        return False
    return True


class NeighborLoader:
    """`gather` on the concatenation of `stores`, which must share tokenizer and chunk size."""

    def __init__(self, stores: Sequence[Store], is_native: bool | None = None, checks_blocks: bool = True):
        """`is_native` None = C++ where it was built; `checks_blocks` False leaves out the checksums (C++ only), for
        stores that were verified before. Raises StoreError when the stores do not go together.
        """
        first = stores[0]
        first.coding.check(*(store.coding for store in stores[1:]))
        self.pad_id = first.pad_id
        self.num_rows = sum(store.num_rows for store in stores)
        self.is_native = has_native_loader() if is_native is None else is_native
        if self.is_native:
            from retro_engine.data._loader import Loader

            shards = [[s.arrays[part] for part in ("tokens", "lengths", "rows")] for t in stores for s in t.shards]
            self._arrays, self._checked_at = [array for arrays in shards for array in arrays], time.monotonic()
            paths = [[os.fsencode(array.path) for array in arrays] for arrays in shards]
            try:
                self._loader = Loader(paths, first.chunk_size, first.vocab_size, checks_blocks)
            except RuntimeError as error:
                raise StoreError(str(error), "", "build it again") from error
        else:
            self._loader = NumpyLoader(stores)

    def gather(
        self, ids: np.ndarray, retrieved_length: int, out: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """ids [...] -> tokens [..., R] and valid lengths [...], i64; -1 = missing, length 0.

        A neighbor is its row and the rows that follow in the same document. `out` [ids, R] i64 receives the tokens
        instead of a new array. Raises UsageError for an id outside the stores, StoreError for a damaged block.
        """
        ids = np.asarray(ids, np.int64)
        if self.is_native and time.monotonic() > self._checked_at + CHECKED_S:
            for array in self._arrays:
                array.check_size()
            self._checked_at = time.monotonic()
        try:
            tokens, lengths = self._loader.gather(ids.reshape(-1), retrieved_length, self.pad_id, out)
        except ValueError as error:
            raise UsageError(str(error)) from error
        except RuntimeError as error:
            raise StoreError(str(error), "what was written is not what is there", "build it again") from error
        return tokens.reshape(*ids.shape, retrieved_length), lengths.reshape(ids.shape)


class NumpyLoader:
    """The C++ Loader's twin, vectorised NumPy over the same files."""

    def __init__(self, stores: Sequence[Store]):
        self.shards = [shard for store in stores for shard in store.shards]
        self.chunk_size, self.vocab_size = stores[0].chunk_size, stores[0].vocab_size
        self.starts = np.cumsum([0] + [shard.arrays["tokens"].values.shape[0] for shard in self.shards])
        self.num_rows = int(self.starts[-1])

    def gather(
        self, ids: np.ndarray, retrieved_length: int, pad_id: int, out: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        if retrieved_length < 1:
            raise ValueError(f"retrieved_length={retrieved_length}: must be at least 1")
        wrong = (ids < -1) | (ids >= self.num_rows)
        if wrong.any():
            raise ValueError(f"chunk id {ids[wrong][0]} is outside 0 ... {self.num_rows - 1} (-1 = missing)")
        if out is not None and out.shape != (len(ids), retrieved_length):
            raise ValueError(f"out has shape {out.shape}; expected {(len(ids), retrieved_length)}")
        tokens = np.empty((len(ids), retrieved_length), np.int64) if out is None else out
        tokens.fill(pad_id)
        lengths = np.zeros(len(ids), np.int64)
        shard_of = np.searchsorted(self.starts, ids, "right") - 1
        for number in np.unique(shard_of[ids >= 0]):
            chosen = np.flatnonzero((shard_of == number) & (ids >= 0))
            part, length = self._gather_shard(number, ids[chosen] - self.starts[number], retrieved_length, pad_id)
            tokens[chosen], lengths[chosen] = part, length
        return tokens, lengths

    def _gather_shard(self, number: int, ids: np.ndarray, R: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
        arrays, M = self.shards[number].arrays, self.chunk_size
        num_rows = arrays["tokens"].values.shape[0]
        span = -(-R // M)
        rows = ids[:, None] + np.arange(span)
        inside = rows < num_rows
        rows = np.where(inside, rows, ids[:, None])
        for part in ("rows", "lengths", "tokens"):
            arrays[part].check_rows(rows)
        in_row = arrays["lengths"].values[:, 0][rows].astype(np.int64)
        if ((in_row < 1) | (in_row > M)).any():
            raise RuntimeError("a row has an impossible length")
        documents = arrays["rows"].values[:, 0][rows]
        inside &= documents == documents[:, :1]
        lengths = np.where(inside, in_row, 0)
        whole_before = np.cumprod(lengths[:, :-1] == M, axis=1)
        lengths[:, 1:] *= whole_before
        total = np.minimum(lengths.sum(1), R)
        tokens = arrays["tokens"].values[rows].reshape(len(ids), span * M)[:, :R].astype(np.int64)
        tokens[np.arange(R) >= total[:, None]] = pad_id
        if tokens.size and tokens.max() >= self.vocab_size:
            raise RuntimeError(f"token id {tokens.max()} is outside the vocabulary of {self.vocab_size}")
        return tokens, total
