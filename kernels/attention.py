"""Attention over a range of keys: causal over packed documents, or all keys of a short block.

o_i = softmax(scale q_i' k_S) v_S over S = [begin, end) of the batch row and, where asked for, keys at or before the
query and at or after its document's first token. An empty S gives exactly 0. With cos and sin, query i is rotated at
position query_offset + i mod query_period, key s at s. Reads q, k, v once and writes o once: bytes(q + k + v + o).
Letters: B batch, N queries, S keys, H query heads, G key/value heads, E head width.
"""

import torch
from retro_kernels import cpp, reference
from retro_kernels.backend import attention_kernels, choose
from torch import Tensor

MAX_HEAD_WIDTH = 256


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
) -> Tensor:
    """q [b, n, h, e]; k, v [b, s, h_kv, e] -> [b, n, h, e].

    is_causal: query i sees keys up to i + s - n. first_keys [b, n]: the first key that each query sees. key_begins,
    key_ends [b]: the range of keys that count. cos, sin [positions, rotary/2] rotate inside. `scale` None = 1/sqrt(e),
    `query_period` None = n. Raises ValueError naming the argument, its shape and the rule.
    """
    _check(q, k, v, is_causal, first_keys, key_begins, key_ends)
    period = query_period or max(1, q.shape[1])
    check_tables(cos, sin, max(k.shape[1], query_offset + min(period, q.shape[1])), q.shape[3])
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if choose("attention", q, k, v) != "reference":
        arguments = (first_keys, key_begins, key_ends, cos, sin, is_causal, query_offset, period, scale)
        return _attention(q, k, v, *arguments)[0]
    return reference.attention(
        q, k, v, is_causal, first_keys, key_begins, key_ends, cos, sin, query_offset, period, scale
    )


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """The rules that every attention shares. Raises ValueError."""
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: expected one type")
    if not q.device == k.device == v.device:
        raise ValueError(f"q is on {q.device}, k on {k.device}, v on {v.device}: expected one device")
    if not q.dtype.is_floating_point:
        raise ValueError(f"q is {q.dtype}: expected a floating-point type")
    if q.shape[-1] > MAX_HEAD_WIDTH or q.shape[-1] % 2:
        raise ValueError(
            f"q {tuple(q.shape)} has head width {q.shape[-1]}: expected an even one up to {MAX_HEAD_WIDTH}"
        )
    if k.shape[-2] == 0 or q.shape[2] % k.shape[-2]:
        raise ValueError(f"q has {q.shape[2]} heads, k has {k.shape[-2]}: the first must be a multiple of the second")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.numel() and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} has strides {tensor.stride()}: the last dimension must be contiguous"
            )


def check_tables(cos: Tensor | None, sin: Tensor | None, num_positions: int, head_width: int) -> None:
    """cos and sin [positions, rotary/2], together or not at all. Raises ValueError."""
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must be given together")
    if cos is None or sin is None:
        return
    if cos.shape != sin.shape or cos.dim() != 2:
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)}: expected the same [positions, rotary/2]")
    if 2 * cos.shape[1] > head_width:
        raise ValueError(f"cos {tuple(cos.shape)} rotates {2 * cos.shape[1]} features; the head width is {head_width}")
    if cos.shape[0] < num_positions:
        raise ValueError(f"cos has {cos.shape[0]} positions; {num_positions} are needed")


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    first_keys: Tensor | None,
    key_begins: Tensor | None,
    key_ends: Tensor | None,
) -> None:
    if q.dim() != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected [b, n, h, e]")
    if k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)}: expected the same [b, s, h_kv, e]")
    if (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        raise ValueError(f"k {tuple(k.shape)} and q {tuple(q.shape)}: batch and head width must agree")
    check_heads(q, k, v)
    if is_causal and k.shape[1] < q.shape[1]:
        raise ValueError(f"is_causal with {q.shape[1]} queries and {k.shape[1]} keys: expected at least as many keys")
    for name, tensor, shape in (
        ("first_keys", first_keys, q.shape[:2]),
        ("key_begins", key_begins, q.shape[:1]),
        ("key_ends", key_ends, q.shape[:1]),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")
    for name, tensor in (("key_begins", key_begins), ("key_ends", key_ends)):
        check_range(name, tensor, k.shape[1])


def check_range(name: str, values: Tensor | None, top: int, low: int = 0) -> None:
    """Values in low ... top; on a GPU, and while compiling, they are data and stay unread. Raises ValueError."""
    if values is None or not values.numel() or values.is_cuda or torch.compiler.is_compiling():
        return
    least, most = int(values.min()), int(values.max())
    if least < low or most > top:
        raise ValueError(f"{name} {tuple(values.shape)} spans {least} ... {most}; expected {low} ... {top}")


@torch.library.custom_op("retro_kernels::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_keys: Tensor | None,
    key_begins: Tensor | None,
    key_ends: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    is_causal: bool,
    query_offset: int,
    query_period: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    problem = _problem(first_keys, key_begins, key_ends, cos, sin, is_causal, query_offset, query_period, scale)
    return attention_kernels(q, k, v).attention_forward(q, k[:, None, None], v[:, None, None], problem)


def _problem(
    first_keys: Tensor | None,
    key_begins: Tensor | None,
    key_ends: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    is_causal: bool,
    query_offset: int,
    query_period: int,
    scale: float,
) -> cpp.Problem:
    return cpp.Problem(
        lengths=key_ends,
        begins=key_begins,
        first_keys=first_keys,
        is_causal=is_causal,
        cos=cos,
        sin=sin,
        query_offset=query_offset,
        query_period=query_period,
        scale=scale,
    )


@_attention.register_fake
def _(q, k, v, first_keys, key_begins, key_ends, cos, sin, is_causal, query_offset, query_period, scale):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@torch.library.custom_op("retro_kernels::attention_backward", mutates_args=())
def _attention_backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    first_keys: Tensor | None,
    key_begins: Tensor | None,
    key_ends: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    is_causal: bool,
    query_offset: int,
    query_period: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = _problem(first_keys, key_begins, key_ends, cos, sin, is_causal, query_offset, query_period, scale)
    backward = attention_kernels(q, k, v).attention_backward
    grad_q, grad_k, grad_v = backward(grad_o, q, k[:, None, None], v[:, None, None], o, lse, problem)
    return grad_q, grad_k[:, 0, 0], grad_v[:, 0, 0]


@_attention_backward.register_fake
def _(grad_o, q, k, v, o, lse, *rest):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, first_keys, key_begins, key_ends, cos, sin, *ctx.numbers = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, first_keys, key_begins, key_ends, cos, sin)


def _gradients(ctx, grad_o, grad_lse):  # type: ignore[no-untyped-def]
    q, k, v, o, lse, *data = ctx.saved_tensors
    none = (None,) * 9
    if grad_o is None:
        return None, None, None, *none
    return *_attention_backward(grad_o, q, k, v, o, lse, *data, *ctx.numbers), *none


_attention.register_autograd(_gradients, setup_context=_keep)
