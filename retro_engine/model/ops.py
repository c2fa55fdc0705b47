"""The ops the network is made of; the only import of retro_kernels.

Shape letters: B batch, N queries, S keys, H query heads, G key/value heads, E head width, P rotated pairs.
"""

import torch
import torch.nn.functional as F
from retro_kernels.chunked_cross_attention import chunked_cross_attention
from retro_kernels.rope import rope, rope_qk
from torch import Tensor

__all__ = ["attention", "chunked_cross_attention", "rope", "rope_qk", "rotary_tables"]


def attention(
    q_BNHE: Tensor,
    k_BSGE: Tensor,
    v_BSGE: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k' / sqrt(e)) v; `mask` is boolean, True = attend, broadcastable to [b, h, n, s]."""
    return F.scaled_dot_product_attention(
        q_BNHE.transpose(1, 2),
        k_BSGE.transpose(1, 2),
        v_BSGE.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        enable_gqa=q_BNHE.shape[2] != k_BSGE.shape[2],
    ).transpose(1, 2)


def rotary_tables(
    num_positions: int, rotary_width: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, rotary/2] of position / base^(2p/rotary); inverse frequencies in fp32."""
    exponent = torch.arange(0, rotary_width, 2, device=device).float() / rotary_width
    inverse_frequency = (1.0 / base**exponent).to(dtype)
    angle = torch.outer(torch.arange(num_positions, device=device).to(dtype), inverse_frequency)
    return angle.cos(), angle.sin()
