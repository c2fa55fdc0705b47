"""The ops the network is made of; the only import of retro_kernels.

Shape letters: B batch, N queries, S keys, H query heads, G key/value heads, E head width, P rotated pairs.
"""

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from retro_kernels import cpp, reference
from retro_kernels.attention import attention as kernels_attention
from retro_kernels.backend import choose, is_forced
from retro_kernels.blocks import TYPES as BLOCK_TYPES
from retro_kernels.blocks import dequantize
from retro_kernels.chunked_cross_attention import chunked_cross_attention
from retro_kernels.cross_entropy import cross_entropy_
from retro_kernels.cuda import register_host
from retro_kernels.gather_neighbors import gather_neighbors
from retro_kernels.linear import linear as kernels_linear
from retro_kernels.linear import linear_in_blocks
from retro_kernels.norm import rms_norm
from retro_kernels.products import is_onednn, product
from retro_kernels.products import library as product_library
from retro_kernels.products import use as use_products
from retro_kernels.quantize import quantize
from retro_kernels.rope import rope, rope_qk
from retro_kernels.step import (
    Attending,
    CrossAttentionPart,
    FeedForwardPart,
    Matrix,
    Norm,
    Part,
    SelfAttentionPart,
    Steps,
)
from retro_kernels.swiglu import swiglu
from torch import Tensor

from retro_engine.errors import UsageError

__all__ = [
    "BLOCK_TYPES",
    "Attending",
    "CrossAttentionPart",
    "FeedForwardPart",
    "Matrix",
    "Norm",
    "Part",
    "SelfAttentionPart",
    "Steps",
    "attention",
    "attention_lse",
    "check_environment",
    "chunked_cross_attention",
    "cross_entropy_",
    "dequantize",
    "gather_neighbors",
    "instruction_set",
    "is_onednn",
    "linear",
    "linear_in_blocks",
    "masked_attention",
    "quantize",
    "product",
    "product_library",
    "register_host",
    "rms_norm",
    "rope",
    "rope_qk",
    "steps_in_cpp",
    "swiglu",
    "rotary_tables",
    "use_products",
]


def steps_in_cpp(x: Tensor) -> bool:
    """Whether C++ computes the rows of `Steps` that have this tensor's type and place."""
    return x.dtype in (torch.float32, torch.bfloat16) and choose("linear", x) == "cpp"


def check_environment() -> None:
    """Raise UsageError where RETRO_BACKEND, RETRO_CPU or RETRO_PRODUCTS names what is not there, before anything is computed."""
    try:
        is_forced()
        if "RETRO_CPU" in os.environ and cpp.is_available():
            cpp.instruction_set()
        if os.environ.get("RETRO_PRODUCTS"):
            product_library()
    except ValueError as error:  # the kernels' own, which has the lines of ours
        lines = [line.strip() for line in str(error).splitlines()]
        raise UsageError(lines[0], lines[1] if len(lines) > 2 else "", lines[-1] if len(lines) > 1 else "") from error


def attention(
    q_BNHE: Tensor,
    k_BSGE: Tensor,
    v_BSGE: Tensor,
    is_causal: bool,
    first_keys: Tensor | None = None,
    key_begins: Tensor | None = None,
    key_ends: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    query_offset: int = 0,
    query_period: int | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """`retro_kernels.attention` of a model: its ranges, its rotary tables."""
    cos, sin = rotary if rotary is not None else (None, None)
    return kernels_attention(
        q_BNHE,
        k_BSGE,
        v_BSGE,
        is_causal=is_causal,
        first_keys=first_keys,
        key_begins=key_begins,
        key_ends=key_ends,
        cos=cos,
        sin=sin,
        query_offset=query_offset,
        query_period=query_period,
        scale=scale,
        is_packed=True,
        dropout=dropout,
    )


def attention_lse(
    q_BNHE: Tensor,
    k_BSGE: Tensor,
    v_BSGE: Tensor,
    is_causal: bool,
    key_begins: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention, and the log-sum-exp of its scores [b, h, n], by which it is merged with one over other keys; no gradients."""
    found = kernels_attention(
        q_BNHE, k_BSGE, v_BSGE, is_causal=is_causal, key_begins=key_begins, scale=scale, return_lse=True
    )
    assert isinstance(found, tuple)
    return found


def instruction_set() -> str:
    """What the C++ kernels use of this processor, as RETRO_CPU names it; empty where they were not built."""
    return cpp.instruction_set() if cpp.is_available() else ""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """`retro_kernels.product`, or without gradients `retro_kernels.linear`, which is the faster one for a few rows; scale: of
    int8.
    """
    if scale is not None:
        return kernels_linear(x, weight, bias, scale)
    if type(weight) not in (Tensor, torch.nn.Parameter) or x.dtype != weight.dtype:
        return F.linear(x, weight, bias)
    return product(x, weight, bias) if torch.is_grad_enabled() else kernels_linear(x, weight, bias)


def masked_attention(
    q_BNHE: Tensor,
    k_BSGE: Tensor,
    v_BSGE: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k' scale) v, scale None = 1/sqrt(e), for masks that are no ranges; True = attend, broadcastable to [b, h, n, s].

    A query that attends nothing gets 0, as in every op.
    """
    return reference.masked_attention(q_BNHE, k_BSGE, v_BSGE, mask, is_causal, dropout=dropout, scale=scale)


def rotary_tables(
    num_positions: int,
    rotary_width: int,
    base: float,
    dtype: torch.dtype,
    device: torch.device,
    factors: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, rotary/2] of position / base^(2p/rotary) / factor p; inverse frequencies in fp32."""
    exponent = torch.arange(0, rotary_width, 2, device=device).float() / rotary_width
    inverse_frequency = 1.0 / base**exponent
    if factors is not None:
        inverse_frequency = inverse_frequency / torch.tensor(factors, device=device)
    inverse_frequency = inverse_frequency.to(dtype)
    angle = torch.outer(torch.arange(num_positions, device=device).to(dtype), inverse_frequency)
    return angle.cos(), angle.sin()
