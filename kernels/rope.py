"""Rotary position embedding of queries and keys (arXiv 2104.09864), half-split or interleaved, full or partial.

y = (a cos t - b sin t, b cos t + a sin t) for each rotated pair (a, b) at angle t = position / base^(2p/rotary).
Reads x once and writes y once: 2 x bytes(x) is the roofline. Inputs are never overwritten. Half-precision inputs are
rotated in fp32; the gradient is the inverse rotation.
"""

import torch
from retro_kernels import reference
from retro_kernels.backend import choose, rope_kernels
from retro_kernels.checks import check_range, check_tables, is_unobserved
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False) -> Tensor:
    """Rotate x [b, n, h, e] by cos and sin [positions, rotary/2]; positions [n] or [b, n], None = 0 ... n-1.

    The features past `rotary` pass through; cos and sin get no gradient. Raises ValueError naming the argument, its shape and the rule.
    """
    _check("x", x, cos, sin, positions)
    if choose("rope", x) != "reference":
        if is_unobserved(x):
            return rope_kernels(x).rope_qk(x, x[:, :, :0], cos, sin, positions, interleaved, False)[0]
        return _rope(x, cos, sin, positions, interleaved, False)
    return reference.rope(x, cos, sin, positions, interleaved)


def rope_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """`rope` of q and of k, whose head counts may differ, in one launch."""
    _check("q", q, cos, sin, positions)
    _check("k", k, cos, sin, positions)
    if q.shape[:2] != k.shape[:2] or q.dtype != k.dtype or q.device != k.device:
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype} on {q.device} and k {tuple(k.shape)} {k.dtype} on {k.device}: "
            "expected the same b, n, type and device"
        )
    if choose("rope", q, k) != "reference":
        if is_unobserved(q, k):
            return rope_kernels(q, k).rope_qk(q, k, cos, sin, positions, interleaved, False)
        return _rope_qk(q, k, cos, sin, positions, interleaved, False)
    return reference.rope(q, cos, sin, positions, interleaved), reference.rope(k, cos, sin, positions, interleaved)


def _check(name: str, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    if x.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected [b, n, h, e]")
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name} is {x.dtype}: expected a floating-point type")
    if x.numel() and x.stride(-1) != 1:
        raise ValueError(f"{name} {tuple(x.shape)} has strides {x.stride()}: the last dimension must be contiguous")
    check_tables(cos, sin, x.shape[1] if positions is None else 0, x.shape[3])
    for table in (cos, sin):
        if table.device != x.device:
            raise ValueError(f"cos and sin are on {table.device}, {name} is on {x.device}: expected one device")
    if positions is not None and positions.shape not in (x.shape[1:2], x.shape[:2]):
        raise ValueError(
            f"positions has shape {tuple(positions.shape)}; expected [n] or [b, n] of {name} {tuple(x.shape)}"
        )
    check_range("positions", positions, cos.shape[0] - 1)


@torch.library.custom_op("retro_kernels::rope", mutates_args=())
def _rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool) -> Tensor:
    return rope_kernels(x).rope_qk(x, x[:, :, :0], cos, sin, positions, interleaved, inverse)[0]


@torch.library.custom_op("retro_kernels::rope_qk", mutates_args=())
def _rope_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    return rope_kernels(q, k).rope_qk(q, k, cos, sin, positions, interleaved, inverse)


@_rope.register_fake
def _(x, cos, sin, positions, interleaved, inverse):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@_rope_qk.register_fake
def _(q, k, cos, sin, positions, interleaved, inverse):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *_, cos, sin, positions, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _gradient(ctx, grad):  # type: ignore[no-untyped-def]
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    return _rope(grad, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse), None, None, None, None, None


def _gradients(ctx, grad_q, grad_k):  # type: ignore[no-untyped-def]
    grad_q, grad_k = (grad if grad.stride(-1) == 1 else grad.contiguous() for grad in (grad_q, grad_k))
    grads = _rope_qk(grad_q, grad_k, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
    return *grads, None, None, None, None, None


_rope.register_autograd(_gradient, setup_context=_keep)
_rope_qk.register_autograd(_gradients, setup_context=_keep)
