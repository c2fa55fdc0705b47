"""One decoder layer: self-attention, chunked cross-attention in the layers that have it, FFN; all pre-norm.

Shape letters: B batch, N tokens, D width, L chunks, K neighbors, R tokens per neighbor, G key/value heads, E head width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from retro_engine.config import ModelConfig
from retro_engine.model import ops
from retro_engine.model.attention import ChunkedCrossAttention, FeedForward, Rotary, SelfAttention, norm
from retro_engine.model.recompute import run


@dataclass
class Reading:
    """What the chunked cross-attention of the layers reads, and who reads it."""

    encode: Callable[[Tensor], None]  # neighbors, from the normed state at the first cross-attending layer
    encoded: Callable[[int], tuple[Tensor, ...]]  # for a layer: keys and values, or what `keys_values` makes them of
    keys_values: Callable[[int, Tensor], tuple[Tensor, Tensor]]  # [b, l, k, r, g, e] each
    lengths_BLK: Tensor | None  # valid tokens of each neighbor; None = all full
    attends_BN: Tensor  # the tokens that get anything
    rotary: Rotary
    front: int  # tokens of padding that make a short first chunk whole


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

    def forward(
        self, x_BND: Tensor, rotary: Rotary, first_keys: Tensor | None, mask: Tensor | None, reading: Reading | None
    ) -> Tensor:
        """x [b, n, d] -> [b, n, d]; `reading` None = retrieval off."""
        if not self.is_crossing or reading is None:
            return run(self.recompute, self._plain, x_BND, rotary, first_keys, mask)
        x = run(self.recompute, self._self_attend, x_BND, rotary, first_keys, mask)
        if self.index == self.config.cross_layers[0]:
            reading.encode(self.cross_norm(x))
        return run(self.recompute, self._read, x, reading, *reading.encoded(self.index))

    def _plain(self, x: Tensor, rotary: Rotary, first_keys: Tensor | None, mask: Tensor | None) -> Tensor:
        return self.feed_forward(self._self_attend(x, rotary, first_keys, mask))

    def _self_attend(self, x: Tensor, rotary: Rotary, first_keys: Tensor | None, mask: Tensor | None) -> Tensor:
        q, k, v = self.attention.project(self.attention_norm(x))
        attended = self.attention.attend(q, k, v, rotary, True, first_keys, mask=mask)
        return x + self.dropout(self.attention.out(attended))

    def _read(self, x: Tensor, reading: Reading, *encoded: Tensor) -> Tensor:
        """CCA and FFN; CCA is exactly 0 at tokens that attend nothing (cca_bias_everywhere apart)."""
        c = self.config
        k, v = encoded if len(encoded) == 2 else reading.keys_values(self.index, encoded[0])
        q = self.cross.queries(self.cross_norm(x))
        if reading.front:
            q = nn.functional.pad(q, (0, 0, 0, 0, reading.front, 0))
        cos, sin = reading.rotary if reading.rotary is not None else (None, None)
        out = ops.chunked_cross_attention(
            q,
            k,
            v,
            reading.lengths_BLK,
            c.chunk_size,
            cos,
            sin,
            self.cross.scale,
            query_offset=c.chunk_size - 1 if c.cca_query_offset else 0,
            dropout=self.cross.dropout if self.training else 0.0,
        )[:, reading.front :].flatten(-2)
        if c.cca_bias_everywhere:
            out = self.cross.out(torch.where(reading.attends_BN[..., None], out, 0))
        else:
            out = torch.where(reading.attends_BN[..., None], self.cross.out(out), 0)
        return self.feed_forward(x + self.cross_dropout(out))

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.ffn(self.ffn_norm(x)))

    def step_parts(self, attending: ops.Attending, reading: ops.Attending | None) -> list[ops.Part]:
        """The layer for one new token a row: its self-attention, its cross-attention if it has one, its FFN."""
        a, f = self.attention, self.ffn
        weights = (_matrix(a.q), _matrix(a.k), _matrix(a.v), _matrix(a.out))
        parts: list[ops.Part] = [ops.SelfAttention(_norm(self.attention_norm), *weights, attending)]
        if reading is not None:
            norm, q, out = _norm(self.cross_norm), _matrix(self.cross.q), _matrix(self.cross.out)
            parts.append(ops.CrossAttention(norm, q, out, reading, self.config.cca_bias_everywhere))
        gate = None if f.gate is None else _matrix(f.gate)
        norm, activation = _norm(self.ffn_norm), self.config.activation
        return [*parts, ops.FeedForward(norm, gate, _matrix(f.up), _matrix(f.down), activation)]


def _matrix(linear: nn.Module) -> ops.Matrix:
    """The weights of a Linear or an Int8Linear."""
    return ops.Matrix(linear.weight, linear.bias, getattr(linear, "scale", None))  # type: ignore[arg-type]


def _norm(module: nn.Module) -> ops.Norm:
    is_rms = isinstance(module, nn.RMSNorm)
    return ops.Norm(module.weight, None if is_rms else module.bias, module.eps, is_rms)  # type: ignore[arg-type]
