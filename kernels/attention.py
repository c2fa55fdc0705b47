"""Attention over a range of keys: causal over packed documents, or all keys of a short block.

o_i = softmax(scale q_i' k_S) v_S over S = [begin, end) of the batch row and, where asked for, keys at or before the
query and at or after its document's first token. An empty S gives exactly 0. With cos and sin, query i is rotated at
position query_offset + i mod query_period, key s at s. Reads q, k, v once and writes o once: bytes(q + k + v + o).
Letters: B batch, N queries, S keys, H query heads, G key/value heads, E head width.
"""

import math

import torch
from retro_kernels import flash, reference
from retro_kernels.attention_op import new_op
from retro_kernels.backend import choose, is_forced
from retro_kernels.checks import autocast, check_heads, check_range, check_tables
from retro_kernels.dropout import check as check_dropout
from retro_kernels.dropout import new_seed
from retro_kernels.rope import rope
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    first_keys: Tensor | None = None,
    key_begins: Tensor | None = None,
    key_ends: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    query_offset: int = 0,
    query_period: int | None = None,
    scale: float | None = None,
    is_packed: bool = False,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q [b, n, h, e]; k, v [b, s, h_kv, e] -> [b, n, h, e].

    is_causal: query i sees keys up to i + s - n. first_keys [b, n]: the first key that each query sees. key_begins,
    key_ends [b]: the range of keys that count. cos, sin [positions, rotary/2] rotate inside and get no gradient. `scale`
    None = 1/sqrt(e), `query_period` None = n. `is_packed` states that first_keys are where the query's document begins,
    documents side by side: then flash-attn's ragged batches may compute it. `dropout` is of the attention weights, `seed` int64 []
    says which (kernels/dropout.py); None = drawn from torch's generator. `return_lse` adds the natural log-sum-exp of the scores
    [b, h, n] in fp32 (float64 of float64), +inf where nothing is attended, by which attentions of one query over different keys are merged; it has
    no gradient. Raises ValueError naming the argument, its shape and the rule.
    """
    q, k, v = autocast(q, k, v)
    _check(q, k, v, is_causal, first_keys, key_begins, key_ends)
    if query_offset < 0 or query_period is not None and query_period < 1:
        raise ValueError(f"query_offset={query_offset}, query_period={query_period}: expected at least 0 and 1")
    period = query_period or max(1, q.shape[1])
    check_tables(cos, sin, max(k.shape[1], query_offset + min(period, q.shape[1])), q.shape[3])
    scale = q.shape[3] ** -0.5 if scale is None else scale
    check_dropout(dropout)
    seed = new_seed(q) if dropout and seed is None else seed
    is_plain = is_causal and not (dropout or return_lse) and key_begins is None and key_ends is None
    is_plain = is_plain and q.shape[1] == k.shape[1]
    backend = choose("attention", q, k, v)
    if backend == "triton" and is_plain and not is_forced() and flash.takes(q, first_keys, is_packed):
        if cos is not None and sin is not None:
            place = torch.arange(q.shape[1], device=q.device)
            q, k = rope(q, cos, sin, query_offset + place % period), rope(k, cos, sin, place)
        return flash.causal_attention(q, k, v, first_keys, scale)
    if backend != "reference":
        tensors, numbers = (key_ends, key_begins, first_keys, cos, sin, seed), (query_offset, period, scale, dropout)
        o, lse = _attention(q, k[:, None, None], v[:, None, None], *tensors, 0, is_causal, *numbers)
        return (o, lse.detach() * math.log(2)) if return_lse else o
    arguments = (is_causal, first_keys, key_begins, key_ends, cos, sin, query_offset, period, scale)
    o = reference.attention(q, k, v, *arguments, dropout, seed)
    if not return_lse:
        return o
    with torch.no_grad():
        return o, reference.log_sum_exp(q, k, *arguments)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    first_keys: Tensor | None,
    key_begins: Tensor | None,
    key_ends: Tensor | None,
) -> None:
    check_heads(q, k, v, "[b, s, h_kv, e]")
    if is_causal and k.shape[1] < q.shape[1]:
        raise ValueError(f"is_causal with {q.shape[1]} queries and {k.shape[1]} keys: expected at least as many keys")
    for name, tensor, shape in (
        ("first_keys", first_keys, q.shape[:2]),
        ("key_begins", key_begins, q.shape[:1]),
        ("key_ends", key_ends, q.shape[:1]),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")
    for name, tensor in (("first_keys", first_keys), ("key_begins", key_begins), ("key_ends", key_ends)):
        check_range(name, tensor, k.shape[1])


def _twin(  # type: ignore[no-untyped-def]
    q, k, v, key_ends, key_begins, first_keys, cos, sin, seed, _, is_causal, query_offset, query_period, scale, dropout
):
    ranges, numbers = (first_keys, key_begins, key_ends), (query_offset, query_period, scale, dropout)
    return reference.attention(q, k[:, 0, 0], v[:, 0, 0], is_causal, *ranges, cos, sin, *numbers, seed)


_attention = new_op("attention", _twin)
