"""Chunked cross-attention of RETRO (arXiv 2112.04426 section 2.4), causal shift and masks included.

Tokens um+m-1 ... um+2m-2 attend, under one softmax, all valid tokens of chunk u's neighbors. With cos and sin
the query at offset i is rotated at position i + m - 1 and the key i' of each neighbor at i'.
Reads q, k, v once and writes o once: bytes(q + k + v + o) is the roofline; padding is not read.
"""

import math

import torch
from retro_kernels import reference
from retro_kernels.attention_op import new_op
from retro_kernels.backend import choose
from retro_kernels.checks import autocast, check_heads, check_range, check_tables
from retro_kernels.dropout import check as check_dropout
from retro_kernels.dropout import new_seed
from torch import Tensor


def chunked_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    neighbor_lengths: Tensor | None = None,
    chunk_length: int = 64,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    scale: float | None = None,
    query_offset: int | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """q [b, n, h, e]; k, v [b, l, K, r, h_kv, e]; neighbor_lengths [b, l, K] -> [b, n, h, e].

    Exactly 0 before token m-1 and where a chunk has no valid neighbor; `neighbor_lengths` None = all full,
    0 = missing. l is floor(n / chunk_length). `scale` None = 1/sqrt(e). `query_offset` None = chunk_length - 1.
    `dropout` is of the attention weights, `seed` int64 [] says which (kernels/dropout.py); None = drawn from torch's generator. `return_lse` adds the natural log-sum-exp of the
    scores [b, h, n] in fp32 (float64 of float64), +inf where nothing is attended; it has no gradient, nor have cos and sin.
    Raises ValueError naming the argument, its shape and the rule.
    """
    offset = chunk_length - 1 if query_offset is None else query_offset
    q, k, v = autocast(q, k, v)
    _check(q, k, v, neighbor_lengths, chunk_length, cos, sin, offset)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    check_dropout(dropout)
    seed = new_seed(q) if dropout and seed is None else seed
    if choose("chunked_cross_attention", q, k, v) != "reference":
        tensors = (neighbor_lengths, None, None, cos, sin, seed)
        o, lse = _chunked_cross_attention(q, k, v, *tensors, chunk_length, False, offset, 0, scale, dropout)
        return (o, lse.detach() * math.log(2)) if return_lse else o
    arguments = (q, k, v, neighbor_lengths, chunk_length, cos, sin, scale, offset)
    o = reference.chunked_cross_attention(*arguments, dropout, seed)
    if not return_lse:
        return o
    with torch.no_grad():
        return o, reference.chunked_log_sum_exp(q, k, neighbor_lengths, chunk_length, cos, sin, scale, offset)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    chunk_length: int,
    cos: Tensor | None,
    sin: Tensor | None,
    query_offset: int,
) -> None:
    check_heads(q, k, v, "[b, l, K, r, h_kv, e]")
    if chunk_length < 1 or k.shape[1] != q.shape[1] // chunk_length:
        raise ValueError(
            f"k has {k.shape[1]} chunks; n={q.shape[1]} tokens in chunks of {chunk_length} make "
            f"{q.shape[1] // max(1, chunk_length)}"
        )
    if lengths is not None and lengths.shape != k.shape[:3]:
        raise ValueError(
            f"neighbor_lengths has shape {tuple(lengths.shape)}; expected [b, l, K] = {tuple(k.shape[:3])}"
        )
    check_range("neighbor_lengths", lengths, k.shape[3])
    if query_offset < 0:
        raise ValueError(f"query_offset={query_offset}: must not be negative")
    check_tables(cos, sin, max(query_offset + chunk_length, k.shape[3]), q.shape[3])


def _twin(q, k, v, lengths, begins, first_keys, cos, sin, seed, M, is_causal, offset, period, scale, dropout):  # type: ignore[no-untyped-def]
    return reference.chunked_cross_attention(q, k, v, lengths, M, cos, sin, scale, offset, dropout, seed)


_chunked_cross_attention = new_op("chunked_cross_attention", _twin)
