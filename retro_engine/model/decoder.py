"""One decoder layer: self-attention, chunked cross-attention in the layers that have it, FFN; all pre-norm.

Shape letters: B batch, N tokens, D width, L chunks, K neighbors, R tokens per neighbor, G key/value heads, E head width.
"""

from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from retro_engine.config import ModelConfig
from retro_engine.model import ops
from retro_engine.model.attention import ChunkedCrossAttention, FeedForward, SelfAttention, norm
from retro_engine.model.linear import BlockLinear
from retro_engine.model.recompute import run


class CausalAttention(Protocol):
    """Which keys the queries of a layer's self-attention meet: those of the pass, or a cache's too."""

    def __call__(self, layer: int, attention: SelfAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [b, n, h, e], k and v [b, n, g, e], not rotated -> [b, n, h * e]"""
        ...


class Reading(Protocol):
    """The neighbors of a pass: encoded once, read by the layers that cross-attend (arXiv 2112.04426 section 2.4)."""

    def encode(self, z_BND: Tensor) -> None:
        """`z_BND`: the normed state at the first cross-attending layer."""
        ...

    def encoded(self, layer: int) -> tuple[Tensor, ...]:
        """What `attend` takes for a layer: tensors, so that recomputation knows them."""
        ...

    def attend(self, layer: int, cross: ChunkedCrossAttention, q: Tensor, *encoded: Tensor) -> tuple[Tensor, Tensor]:
        """q [b, n, h, e], not rotated -> [b, n, h * e], and [b, n]: the tokens that get anything."""
        ...


def chunk_read(position: Tensor, M: int) -> Tensor:
    """The chunk whose neighbors a token attends, negative for none: a chunk's last token is the first that may know
    all of it (arXiv 2112.04426 equation 5).
    """
    return (position + 1) // M - 1


Places = TypeVar("Places", int, Tensor)


def offset_read(position: Places, M: int) -> Places:
    """A token's place among the M that attend the same chunk's neighbors."""
    return (position + 1) % M


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.config, self.index = config, index
        width = config.hidden_size
        self.attention_norm = norm(config, width)
        self.attention = SelfAttention(config, is_encoder=False)
        self.is_crossing = index in config.cross_layers
        if self.is_crossing:
            self.cross_norm = norm(config, width)
            self.cross = ChunkedCrossAttention(config)
            self.cross_dropout = nn.Dropout(config.hidden_dropout)
        self.ffn_norm = norm(config, width)
        self.ffn = FeedForward(config, width, config.ffn_hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.recompute: str | None = None

    def forward(self, x_BND: Tensor, attending: CausalAttention, reading: Reading | None) -> Tensor:
        """x [b, n, d] -> [b, n, d]; `reading` None = retrieval off."""
        if not self.is_crossing or reading is None:
            return run(self.recompute, self._plain, x_BND, attending)
        x = run(self.recompute, self.self_attend, x_BND, attending)
        if self.index == self.config.cross_layers[0]:
            reading.encode(self.cross_norm(x))
        return run(self.recompute, self._read, x, reading, *reading.encoded(self.index))

    def _plain(self, x: Tensor, attending: CausalAttention) -> Tensor:
        return self.feed_forward(self.self_attend(x, attending))

    def _read(self, x: Tensor, reading: Reading, *encoded: Tensor) -> Tensor:
        return self.feed_forward(self.cross_attend(x, reading, *encoded))

    def self_attend(self, x: Tensor, attending: CausalAttention) -> Tensor:
        q, k, v = self.attention.project(self.attention_norm(x))
        return x + self.dropout(self.attention.out(attending(self.index, self.attention, q, k, v)))

    def cross_attend(self, x: Tensor, reading: Reading, *encoded: Tensor) -> Tensor:
        """CCA is exactly 0 at tokens that attend nothing (cca_bias_everywhere apart)."""
        q = self.cross.queries(self.cross_norm(x))
        out, attends_BN = reading.attend(self.index, self.cross, q, *encoded)
        if self.config.cca_bias_everywhere:
            out = self.cross.out(torch.where(attends_BN[..., None], out, 0))
        else:
            out = torch.where(attends_BN[..., None], self.cross.out(out), 0)
        return x + self.cross_dropout(out)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.ffn(self.ffn_norm(x)))

    def step_parts(self, attending: ops.Attending, reading: ops.Attending | None) -> list[ops.Part]:
        """The layer for one new token a row: its self-attention, its cross-attention if it has one, its FFN."""
        a, f = self.attention, self.ffn
        weights = (_matrix(a.q), _matrix(a.k), _matrix(a.v), _matrix(a.out))
        parts: list[ops.Part] = [ops.SelfAttentionPart(_norm(self.attention_norm), *weights, attending)]
        if reading is not None:
            norm, q, out = _norm(self.cross_norm), _matrix(self.cross.q), _matrix(self.cross.out)
            parts.append(ops.CrossAttentionPart(norm, q, out, reading, self.config.cca_bias_everywhere))
        gate = None if f.gate is None else _matrix(f.gate)
        norm, activation = _norm(self.ffn_norm), self.config.activation
        return [*parts, ops.FeedForwardPart(norm, gate, _matrix(f.up), _matrix(f.down), activation)]


def _matrix(linear: nn.Module) -> ops.Matrix:
    """The weights of a Linear, an Int8Linear or a BlockLinear."""
    if isinstance(linear, BlockLinear):
        return linear.matrix
    assert getattr(linear, "adapter", None) is None, "adapters are merged before a model decodes"
    return ops.Matrix(linear.weight, linear.bias, getattr(linear, "scale", None))  # type: ignore[arg-type]


def _norm(module: nn.Module) -> ops.Norm:
    is_rms = isinstance(module, nn.RMSNorm)
    return ops.Norm(module.weight, None if is_rms else module.bias, module.eps, is_rms)  # type: ignore[arg-type]
