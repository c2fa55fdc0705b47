"""The layers every part of the network shares: norm, self-attention, cross-attention, FFN.

Shape letters: B batch, N tokens, S keys, D width, H query heads, G key/value heads, E head width, F FFN width.
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from retro_engine.config import ModelConfig, base_head_width
from retro_engine.model import ops
from retro_engine.model.linear import Linear, project

Rotary = tuple[Tensor, Tensor] | None  # cos and sin [positions, rotary/2], or no positions


def left_to_pytorch(config: ModelConfig) -> list[str]:
    """The attentions that a model which is trained on documents computes outside the kernels: their masks are no ranges."""
    left = [] if config.reset_attention else ["self-attention (model.reset_attention=false)"]
    if config.cross_layers and config.enc_cross_attention and config.mask_neighbors and not config.cca_reset:
        left.append("the encoder's cross-attention (model.cca_reset=false)")
    return left


class RMSNorm(nn.RMSNorm):
    """PyTorch's module, computed by `ops`."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


def norm(config: ModelConfig, width: int) -> nn.Module:
    kind = RMSNorm if config.normalization == "rmsnorm" else nn.LayerNorm
    return kind(width, eps=config.layernorm_epsilon)


def attention_scale(config: ModelConfig, head_width: int, base_head_width: int) -> float:
    """1/sqrt(e), or with muP sqrt(e_base)/e (arXiv 2203.03466 definition 4.1): equal at the base width."""
    return math.sqrt(base_head_width) / head_width if config.mup else head_width**-0.5


class SelfAttention(nn.Module):
    """Multi-head or grouped-query self-attention with RoPE; `is_encoder` = the encoder's widths and heads."""

    def __init__(self, config: ModelConfig, is_encoder: bool):
        super().__init__()
        width = config.encoder_width if is_encoder else config.hidden_size
        heads = config.encoder_heads if is_encoder else config.num_attention_heads
        groups = config.encoder_key_value_heads if is_encoder else config.key_value_heads
        self.head_width = width // heads
        self.q = Linear(width, width, bias=config.has_qk_bias)
        self.k = Linear(width, groups * self.head_width, bias=config.has_qk_bias)
        self.v = Linear(width, groups * self.head_width, bias=config.has_v_bias)
        self.out = Linear(width, width, bias=config.bias)
        self.scale = attention_scale(config, self.head_width, base_head_width(config, is_encoder))
        self.dropout = config.attention_dropout
        self.interleaved = config.rotary_interleaved

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., d] -> queries [..., h, e], keys and values [..., g, e]; not rotated."""
        q, k, v = (part.unflatten(-1, (-1, self.head_width)) for part in project(x, self.q, self.k, self.v))
        return q, k, v

    def attend(
        self,
        q_BNHE: Tensor,
        k_BNGE: Tensor,
        v_BNGE: Tensor,
        rotary: Rotary,
        is_causal: bool,
        first_keys: Tensor | None = None,
        key_ends: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """[b, n, h * e], before the output matrix; ranges as `ops.attention`'s, `mask` for what no range can say."""
        dropout = self.dropout if self.training else 0.0
        rotates_inside = mask is None and not self.interleaved  # the fused rotation is half-split
        if rotary is not None and not rotates_inside:
            q_BNHE, k_BNGE = ops.rope_qk(q_BNHE, k_BNGE, *rotary, positions=None, interleaved=self.interleaved)
        if mask is not None:
            return ops.masked_attention(q_BNHE, k_BNGE, v_BNGE, mask, dropout=dropout, scale=self.scale).flatten(-2)
        return ops.attention(
            q_BNHE,
            k_BNGE,
            v_BNGE,
            is_causal,
            first_keys,
            key_ends=key_ends,
            rotary=rotary if rotates_inside else None,
            dropout=dropout,
            scale=self.scale,
        ).flatten(-2)


class CrossAttention(nn.Module):
    """Queries, keys and values of the encoder's cross-attention, from a neighbor to its chunk [.., d]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, groups = config.encoder_width, config.encoder_key_value_heads
        self.head_width = width // config.encoder_heads
        self.q = Linear(width, width, bias=config.has_qk_bias)
        self.k = Linear(config.hidden_size, groups * self.head_width, bias=config.has_qk_bias)
        self.v = Linear(config.hidden_size, groups * self.head_width, bias=config.has_v_bias)
        self.out = Linear(width, width, bias=config.bias)
        self.scale = attention_scale(config, self.head_width, base_head_width(config, True))
        self.dropout = config.attention_dropout

    def queries(self, x: Tensor) -> Tensor:
        """[..., c] -> [..., h, e]"""
        return self.q(x).unflatten(-1, (-1, self.head_width))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., d] -> twice [..., g, e]"""
        k, v = (part.unflatten(-1, (-1, self.head_width)) for part in project(x, self.k, self.v))
        return k, v


class ChunkedCrossAttention(nn.Module):
    """Queries and output of a decoder layer's chunked cross-attention; its keys and values are in NeighborProjection."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, self.head_width = config.hidden_size, config.head_width
        self.q = Linear(width, width, bias=config.has_qk_bias)
        self.out = Linear(width, width, bias=config.bias)
        self.scale = attention_scale(config, self.head_width, base_head_width(config, False))
        self.dropout = config.attention_dropout
        self.chunk_size = config.chunk_size
        self.query_offset = config.chunk_size - 1 if config.cca_query_offset else 0

    def queries(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., h, e]"""
        return self.q(x).unflatten(-1, (-1, self.head_width))

    def attend(
        self,
        q_BNHE: Tensor,
        k_BLKRGE: Tensor,
        v_BLKRGE: Tensor,
        lengths_BLK: Tensor | None,
        rotary: Rotary,
        stride: int | None = None,
    ) -> Tensor:
        """[b, n, h * e], before the output matrix, of a sequence's tokens from its first on; nothing is rotated yet. `stride`:
        tokens that read the same neighbors; None = a chunk's. Positions are a chunk's in either case.
        """
        cos, sin = rotary if rotary is not None else (None, None)
        dropout = self.dropout if self.training else 0.0
        return ops.chunked_cross_attention(
            q_BNHE,
            k_BLKRGE,
            v_BLKRGE,
            lengths_BLK,
            stride or self.chunk_size,
            cos,
            sin,
            self.scale,
            self.query_offset,
            dropout,
        ).flatten(-2)


class NeighborProjection(nn.Module):
    """Keys and values of the encoded neighbors for every cross-attending decoder layer, in one product."""

    k: Sequence[Linear]  # nn.ModuleLists
    v: Sequence[Linear]

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_width, width = config.head_width, config.key_value_heads * config.head_width
        layers = range(len(config.cross_layers))
        keys = [Linear(config.encoder_width, width, bias=config.has_qk_bias) for _ in layers]
        values = [Linear(config.encoder_width, width, bias=config.has_v_bias) for _ in layers]
        self.k, self.v = nn.ModuleList(keys), nn.ModuleList(values)  # type: ignore[assignment]

    def forward(self, encoded: Tensor, only: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """[..., c] -> for each cross-attending layer (or the `only` one, counted from 0) keys and values [..., g, e]."""
        places = list(range(len(self.k))) if only is None else [only]
        linears = [self.k[i] for i in places] + [self.v[i] for i in places]
        parts = [part.unflatten(-1, (-1, self.head_width)) for part in project(encoded, *linears)]
        return list(zip(parts[: len(places)], parts[len(places) :]))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202), GELU(erf), or GELU with tanh for erf (arXiv 1606.08415 section 2)."""

    def __init__(self, config: ModelConfig, width: int, ffn_width: int):
        super().__init__()
        self.gate = Linear(width, ffn_width, bias=config.bias) if config.activation == "swiglu" else None
        self.up = Linear(width, ffn_width, bias=config.bias)
        self.down = Linear(ffn_width, width, bias=config.bias)
        self.dropout = nn.Dropout(config.ffn_dropout)
        self.approximation = "tanh" if config.activation == "gelu_tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            gate, up = project(x, self.gate, self.up)
            return self.down(self.dropout(ops.swiglu(gate, up)))
        return self.down(self.dropout(F.gelu(self.up(x), approximate=self.approximation)))
