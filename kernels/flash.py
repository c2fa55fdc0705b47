"""Causal self-attention on a GPU with the kernels that others keep: SDPA for whole sequences, flash-attn's varlen for packed ones.

flash-attn is used where it is installed, in half precision; packed documents become one ragged batch, never a mask.
Letters as in kernels/attention.py.
"""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None


def takes(q: Tensor, first_keys: Tensor | None, is_packed: bool) -> bool:
    """Whether one of the two is to be used instead of this library's own kernel."""
    if not q.is_cuda:
        return False
    if first_keys is None:
        return True
    is_half = q.dtype in (torch.float16, torch.bfloat16)
    if not (is_packed and HAS_FLASH_ATTN and is_half) or torch.compiler.is_compiling():
        return False  # the ragged batch's sizes are data: neither a compiled nor a captured graph can hold them
    return not torch.cuda.is_current_stream_capturing()


def causal_attention(q: Tensor, k: Tensor, v: Tensor, first_keys: Tensor | None, scale: float) -> Tensor:
    """Rotated q [b, n, h, e] and k, and v [b, n, h_kv, e] -> [b, n, h, e]; first_keys [b, n] as `attention` has it."""
    if first_keys is not None:
        from flash_attn import flash_attn_varlen_func

        return packed(flash_attn_varlen_func, q, k, v, first_keys, scale)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=True,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def packed(
    varlen_function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, first_keys: Tensor, scale: float
) -> Tensor:
    """One ragged batch of all documents of all sequences: a document begins where a token's first key is itself."""
    B, N = first_keys.shape
    is_first = first_keys == torch.arange(N, device=q.device)
    is_first[:, 0] = True  # no document goes on in the next sequence
    begins = is_first.flatten().nonzero().squeeze(1)
    ends = torch.cat((begins, begins.new_full((1,), B * N))).int()
    flat = (x.flatten(0, 1) for x in (q, k, v))
    return varlen_function(*flat, ends, ends, N, N, softmax_scale=scale, causal=True, deterministic=True).unflatten(
        0, (B, N)
    )
