"""Neighbors that were encoded before: their keys and values at every layer that reads them, least used forgotten first.

Where a neighbor's encoding depends on nothing else (an encoder with `enc_cross_attention=[]`, or neighbors in front of the
decoder's own keys), the same tokens give the same, whoever retrieves them. Encodings are kept by the tokens themselves: of
a document that was replaced other tokens are retrieved, so the old ones are never read again. Weights that change forget
everything.
Letters: W neighbors, R tokens per neighbor, T tokens of one neighbor, C keys of all reading layers, then their values, G key/value
heads, E head width.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from retro_engine.config import ModelConfig
from retro_engine.errors import UsageError
from retro_engine.model.encoding_file import EncodingFile, from_values, num_values
from retro_engine.model.prefix import stacked
from retro_engine.model.retro import RetroModel

Weights = tuple[tuple[int, int], ...]


@dataclass
class EncodingStats:
    """`hits` and `misses`: neighbors that were read from memory or files, or encoded, since it was made."""

    hits: int = 0
    misses: int = 0
    nbytes: int = 0


@torch.no_grad()
def encode_each(model: RetroModel, tokens_WR: Tensor, lengths_W: Tensor) -> list[Tensor]:
    """[c, t, g, e] of each neighbor, t its length, in the cache's type; not rotated."""
    encoded_CWRGE = model.encode_alone(tokens_WR, lengths_W).to(model.cache_dtype)
    return [encoded_CWRGE[:, row, :length].clone() for row, length in enumerate(lengths_W.tolist())]


_SINKS: "WeakKeyDictionary[RetroModel, tuple[object, Tensor]]" = WeakKeyDictionary()


@torch.no_grad()
def encode_sink(model: RetroModel) -> Tensor:
    """[c, s, g, e]: the keys and values of what stands before neighbors in front, in the cache's type. Kept until the weights
    change: making it takes as long as a token.
    """
    key = weights_of(model), model.config.sink_id, model.cache_dtype
    if (known := _SINKS.get(model)) is not None and known[0] == key:
        return known[1]
    sinks = stacked(model.sinks())[:, 0].to(model.cache_dtype)
    _SINKS[model] = key, sinks
    return sinks


def weights_of(model: RetroModel) -> Weights:
    """Which memory the weights lie in, and how often it was written to."""
    return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in _tensors(model))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """All of its parameters and buffers, in half of the time that `parameters` and `buffers` take: every question asks."""
    for table in (module._parameters, module._buffers):
        yield from (tensor for tensor in table.values() if tensor is not None)
    for child in module._modules.values():
        if child is not None:
            yield from _tensors(child)


def check_encodes_alone(config: ModelConfig) -> None:
    """Raises UsageError for a model of which no encoded neighbor can be kept."""
    if not config.retrieval:
        raise UsageError("encoded neighbors cannot be kept", "this model is a plain decoder (model.retrieval=false)")
    if not config.encodes_alone:
        raise UsageError(
            "encoded neighbors cannot be kept",
            f"model.enc_cross_attention={config.enc_cross_attention}: they depend on the chunk that reads them",
            "train with model.enc_cross_attention=[], or keep none (0 bytes)",
        )


class Encodings:
    """At most `max_bytes` of a model's encoded neighbors, shared by all that decode with it; any thread may ask."""

    def __init__(self, model: RetroModel, max_bytes: int, encoded: Sequence[EncodingFile] = ()):
        """`encoded`: what is there already, checked to be of these weights; with it `max_bytes` may be 0.

        Raises UsageError for a model whose encoder reads the query too, and for less memory than a neighbor takes.
        """
        c = model.config
        check_encodes_alone(c)
        largest = c.r * num_values(c) * model.cache_dtype.itemsize
        if max_bytes < largest and (max_bytes or not encoded):
            raise UsageError(
                f"{max_bytes} bytes for encoded neighbors",
                f"one neighbor of {c.r} tokens takes {largest}",
                "give more, or 0 to keep none",
            )
        self.model, self.max_bytes, self.stats = model, max_bytes, EncodingStats()
        self._files = list(encoded)
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()  # [c, t, g, e], not rotated
        self._weights = weights_of(model)
        self._lock = threading.Lock()

    def of(self, tokens_WR: Tensor, lengths_W: Tensor, apart: bool = False) -> list[Tensor]:
        """As `encode_each`; what comes is shared, and not to be written to. `apart`: one by one, so that what is beside a
        neighbor changes no bit of it.
        """
        keys = [row[:length].tobytes() for row, length in zip(tokens_WR.cpu().numpy(), lengths_W.tolist())]
        found = self._known(keys)
        missing = {key: row for row, key in enumerate(keys) if key not in found}
        rows = list(missing.values())
        parts = [[row] for row in rows] if apart else [rows] if rows else []
        made = [one for part in parts for one in encode_each(self.model, tokens_WR[part], lengths_W[part])]
        self._keep(dict(zip(missing, made)))
        found |= zip(missing, made)
        return [found[key] for key in keys]

    @property
    def device(self) -> torch.device:
        return self.model.device

    def has_room(self, num_tokens: int) -> bool:
        """Whether so many more are kept without anything being forgotten."""
        num_bytes = num_tokens * num_values(self.model.config) * self.model.cache_dtype.itemsize
        return self.stats.nbytes + num_bytes <= self.max_bytes

    def forget(self) -> None:
        """All that is kept in memory, and what was counted."""
        with self._lock:
            self._kept.clear()
            self.stats = EncodingStats()

    def _known(self, keys: list[bytes]) -> dict[bytes, Tensor]:
        with self._lock:
            weights = weights_of(self.model)
            if weights != self._weights:
                self._kept.clear()
                self._files.clear()
                self._weights, self.stats.nbytes = weights, 0
            found = {key: self._kept[key] for key in keys if key in self._kept}
            for key in found:
                self._kept.move_to_end(key)
            files = list(self._files)
        for key in dict.fromkeys(keys):
            if key not in found and (values := _in_files(files, key)) is not None:
                found[key] = from_values(values, self.model)
        with self._lock:
            hits = sum(key in found for key in keys)
            self.stats.hits += hits
            self.stats.misses += len(keys) - hits
        return found

    def _keep(self, made: dict[bytes, Tensor]) -> None:
        with self._lock:
            for key, one in made.items():
                if key not in self._kept:  # another thread may have made it meanwhile
                    self._kept[key] = one
                    self.stats.nbytes += one.nbytes
            while self.stats.nbytes > self.max_bytes:
                self.stats.nbytes -= self._kept.popitem(last=False)[1].nbytes


def _in_files(encoded: Sequence[EncodingFile], key: bytes) -> np.ndarray | None:
    return next((values for file in encoded if (values := file.find(key)) is not None), None)
