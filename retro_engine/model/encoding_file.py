"""A published folder of encoded neighbors: those of every chunk of a store, made once by `retro encode`, memory-mapped.

Owns STORE/encodings/ID/ (docs/formats.md): `values-NNNNN.bin`, u2 [tokens, c*g*e], the bf16 keys and values of each token of
each neighbor, not rotated; `index.bin`, i8 [neighbors, 4], for each neighbor the digest of its tokens (two numbers, ascending),
its first token, counted through all files of values, and its length; `manifest.json`. A neighbor is found by its tokens, so
whoever retrieves it, from wherever, reads what was computed from the same.
Letters: W neighbors, R tokens per neighbor, T tokens, U chunks, C keys and values (two a reading layer), G key/value heads,
E head width.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retro_engine.config import ModelConfig
from retro_engine.data import files
from retro_engine.data.array_file import ArrayFile
from retro_engine.errors import StoreError
from retro_engine.model.retro import RetroModel

FORMAT = 1  # of the values and the index
INDEX = "index.bin"
AGAIN = "retro encode RUN STORE makes them"


@dataclass(frozen=True, kw_only=True)
class EncodingOrigin:
    """What encodings depend on: fingerprints of the checkpoint's weights and config, of its tokenizer, and of the store; r."""

    weights: str
    tokenizer: str
    store: str
    r: int

    @property
    def fingerprint(self) -> str:
        return files.fingerprint({**asdict(self), "format": FORMAT, "type": "bf16"})


def num_values(config: ModelConfig) -> int:
    """Of one token: c*g*e."""
    return math.prod(config.encoded_shape)


def digest_of(tokens: bytes) -> bytes:
    """Of a neighbor's valid tokens as i64: 16 bytes."""
    return hashlib.blake2b(tokens, digest_size=16).digest()


def to_values(encoded: Sequence[Tensor]) -> np.ndarray:
    """What `encode_each` gives, [c, t, g, e] a neighbor, as u2 [tokens, c*g*e]."""
    rows = [one.to(torch.bfloat16).transpose(0, 1).flatten(1) for one in encoded]
    return torch.cat(rows).cpu().view(torch.int16).numpy().view(np.uint16)


def from_values(values: np.ndarray, model: RetroModel) -> Tensor:
    """The reverse for one neighbor: [c, t, g, e] in the type and on the device of the model's cache."""
    bits = torch.from_numpy(values.astype(np.uint16).view(np.int16)).view(torch.bfloat16)
    heads = bits.unflatten(1, (-1, model.config.key_value_heads, model.config.head_width))
    return heads.transpose(0, 1).to(model.device, model.cache_dtype)


def make_index(digests: Sequence[bytes], lengths_U: np.ndarray) -> np.ndarray:
    """i8 [neighbors, 4] for neighbors whose values lie one after another; of equal ones the first."""
    marks = np.frombuffer(b"".join(digests), "<i8").reshape(-1, 2)
    firsts = np.cumsum(lengths_U) - lengths_U
    rows = np.column_stack((marks, firsts, lengths_U)).astype(np.int64)
    rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
    is_new = np.ones(len(rows), bool)
    is_new[1:] = (rows[1:, :2] != rows[:-1, :2]).any(1)
    return rows[is_new]


class EncodingFile:
    """The encodings of one folder; any thread may read."""

    def __init__(self, folder: Path):
        """Raises MissingInputError, or StoreError for what is truncated, damaged, newer or contradicts itself."""
        self.folder = folder
        self.manifest = files.read_manifest(folder, "encodings")
        m = self.manifest
        self.origin = EncodingOrigin(weights=m["weights"], tokenizer=m["tokenizer"], store=m["store"], r=m["r"])
        if m["format"] != FORMAT:
            raise StoreError(f"{folder} has format {m['format']}", f"this program reads {FORMAT}", AGAIN)
        names = sorted(m["files"].keys() - {INDEX})
        mark = self.origin.fingerprint
        try:
            self._shards = [ArrayFile(files.child(folder, name), "encodings", mark) for name in names]
            self._index = ArrayFile(folder / INDEX, "enc-index", mark).checked()
        except StoreError as error:
            raise StoreError(error.what, error.why, AGAIN) from error
        self._starts = np.cumsum([0] + [len(shard.values) for shard in self._shards])
        self._check_shapes()

    def _check_shapes(self) -> None:
        width, dtype, starts = self.manifest["values"], np.dtype("<u2"), self._starts
        wrong = [s.path.name for s in self._shards if s.values.shape[1] != width or s.values.dtype != dtype]
        if self._index.shape[1] != 4 or self._index.dtype != np.dtype("<i8"):
            wrong.append(INDEX)
        else:
            marks, _, first, length = self._index.T
            is_right = (first >= 0) & (length >= 1) & (length <= self.origin.r) & (first < starts[-1])
            ends = starts[np.searchsorted(starts, first, "right").clip(max=len(starts) - 1)]
            if not (is_right & (length <= ends - first)).all() or (marks[1:] < marks[:-1]).any():
                wrong.append(INDEX)
        if wrong:
            raise StoreError(
                f"{self.folder} contradicts itself", f"{', '.join(wrong)}: not as its manifest says", AGAIN
            )

    def check(self, read: Sequence[EncodingOrigin]) -> None:
        """Raises StoreError, naming what differs, where these are the encodings of nothing that a model `read`s."""
        for what in ("tokenizer", "r", "weights", "store"):
            found, known = str(getattr(self.origin, what)), [str(getattr(origin, what)) for origin in read]
            if found not in known:
                names = ", ".join(dict.fromkeys(name[:12] for name in known))
                raise StoreError(
                    f"{self.folder} has encodings of {what} {found[:12]}", f"what is read has {what} {names}", AGAIN
                )

    def find(self, tokens: bytes) -> np.ndarray | None:
        """u2 [t, c*g*e] of the neighbor with these valid tokens (as i64); None where it is not here.

        Raises StoreError for a block that is damaged.
        """
        first, second = np.frombuffer(digest_of(tokens), "<i8")
        low, high = (
            np.searchsorted(self._index[:, 0], first, "left"),
            np.searchsorted(self._index[:, 0], first, "right"),
        )
        for row in range(int(low), int(high)):
            if self._index[row, 1] == second and self._index[row, 3] * 8 == len(tokens):
                return self._read(int(self._index[row, 2]), int(self._index[row, 3]))
        return None

    def _read(self, first: int, length: int) -> np.ndarray:
        number = int(np.searchsorted(self._starts, first, "right")) - 1
        shard, first = self._shards[number], first - int(self._starts[number])
        try:
            shard.check_range(first, first + length)
        except StoreError as error:
            raise StoreError(error.what, error.why, AGAIN) from error
        return shard.values[first : first + length]

    def verify(self) -> None:
        """Compare every file with the manifest."""
        files.verify_files(self.folder, self.manifest["files"], needed=(INDEX,))

    def summary(self) -> dict[str, Any]:
        return {
            "kind": "encodings",
            **asdict(self.origin),
            "neighbors": len(self._index),
            "tokens": int(self._starts[-1]),
            "bytes": sum(shard.values.nbytes for shard in self._shards),
            "dtype": "bf16",
            "fingerprint": self.manifest["fingerprint"],
        }
