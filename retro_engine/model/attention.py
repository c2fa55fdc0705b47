"""The layers every part of the network shares: norm, fused projection, self-attention, cross-attention, FFN.

Shape letters: B batch, N tokens, S keys, D width, H query heads, G key/value heads, E head width, F FFN width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retro_engine.config import ModelConfig
from retro_engine.model import ops

Rotary = tuple[Tensor, Tensor] | None  # cos and sin [positions, rotary/2], or no positions


class Projection(nn.Module):
    """One matrix for several outputs of widths `sizes`; the first `num_biased` of them have a bias."""

    def __init__(self, in_width: int, sizes: list[int], num_biased: int):
        super().__init__()
        self.sizes = sizes
        self.weight = nn.Parameter(torch.empty(sum(sizes), in_width))
        biased = sum(sizes[:num_biased])
        self.bias = nn.Parameter(torch.zeros(biased)) if biased else None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        bias: Tensor | None = self.bias
        if bias is not None and bias.shape[0] < self.weight.shape[0]:
            bias = F.pad(bias, (0, self.weight.shape[0] - bias.shape[0]))
        return F.linear(x, self.weight, bias).split(self.sizes, -1)


def norm(config: ModelConfig, width: int) -> nn.Module:
    kind = nn.RMSNorm if config.normalization == "rmsnorm" else nn.LayerNorm
    return kind(width, eps=config.layernorm_epsilon)


class SelfAttention(nn.Module):
    """Multi-head or grouped-query self-attention with RoPE."""

    def __init__(self, config: ModelConfig, width: int, num_heads: int, key_value_heads: int):
        super().__init__()
        self.num_heads, self.key_value_heads, self.head_width = num_heads, key_value_heads, width // num_heads
        sizes = [width, key_value_heads * self.head_width, key_value_heads * self.head_width]
        self.qkv = Projection(width, sizes, 3 if config.bias else 2 if config.has_qk_bias else 0)
        self.out = nn.Linear(width, width, bias=config.bias)
        self.dropout = config.attention_dropout
        self.interleaved = config.rotary_interleaved

    def project(self, x_BND: Tensor, rotary: Rotary, positions: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated keys and values: [b, n, h, e] and twice [b, n, g, e]."""
        q, k, v = self.qkv(x_BND)
        q = q.unflatten(-1, (self.num_heads, self.head_width))
        k = k.unflatten(-1, (self.key_value_heads, self.head_width))
        v = v.unflatten(-1, (self.key_value_heads, self.head_width))
        if rotary is not None:
            q, k = ops.rope_qk(q, k, *rotary, positions=positions, interleaved=self.interleaved)
        return q, k, v

    def forward(
        self,
        x_BND: Tensor,
        rotary: Rotary,
        is_causal: bool,
        first_keys: Tensor | None = None,
        key_ends: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """[b, n, d] -> [b, n, d]; the ranges are `ops.attention`'s, `mask` stands for what no range can say."""
        if mask is not None:
            q, k, v = self.project(x_BND, rotary)
            attended = ops.masked_attention(q, k, v, mask, dropout=self.dropout if self.training else 0.0)
            return self.out(attended.flatten(-2))
        inside = None if self.interleaved else rotary  # the fused rotation is half-split
        q, k, v = self.project(x_BND, rotary if self.interleaved else None)
        dropout = self.dropout if self.training else 0.0
        return self.out(
            ops.attention(q, k, v, is_causal, first_keys, None, key_ends, inside, dropout=dropout).flatten(-2)
        )


class CrossAttention(nn.Module):
    """The projections of a cross-attention from `width` features to keys and values of `key_width`."""

    def __init__(self, config: ModelConfig, width: int, num_heads: int, key_value_heads: int, key_width: int):
        super().__init__()
        self.num_heads, self.key_value_heads, self.head_width = num_heads, key_value_heads, width // num_heads
        self.q = Projection(width, [width], 1 if config.has_qk_bias else 0)
        sizes = [key_value_heads * self.head_width] * 2
        self.kv = Projection(key_width, sizes, 2 if config.bias else 1 if config.has_qk_bias else 0)
        self.out = nn.Linear(width, width, bias=config.bias)
        self.dropout = config.attention_dropout

    def queries(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., h, e]"""
        return self.q(x)[0].unflatten(-1, (self.num_heads, self.head_width))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., key_width] -> twice [..., g, e]"""
        k, v = self.kv(x)
        shape = (self.key_value_heads, self.head_width)
        return k.unflatten(-1, shape), v.unflatten(-1, shape)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202) or GELU(erf)."""

    def __init__(self, config: ModelConfig, width: int, ffn_width: int):
        super().__init__()
        self.is_gated = config.activation == "swiglu"
        sizes = [ffn_width, ffn_width] if self.is_gated else [ffn_width]
        self.up = Projection(width, sizes, len(sizes) if config.bias else 0)
        self.down = nn.Linear(ffn_width, width, bias=config.bias)
        self.dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_gated:
            gate, up = self.up(x)
            return self.down(self.dropout(F.silu(gate) * up))
        return self.down(self.dropout(F.gelu(self.up(x)[0])))
