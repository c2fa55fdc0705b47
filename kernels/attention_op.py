"""What PyTorch is told of an attention: an op of tensors and numbers with its fake, its gradient and the gradient's gradient.

The numbers are the fields of `cpp.Problem` in their order. Letters as in kernels/cpp.py.
"""

# mypy: allow-untyped-defs
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from retro_kernels import cpp, reference
from retro_kernels.backend import attention_kernels
from retro_kernels.checks import is_unobserved
from torch import Tensor

_FIELDS = [field.name for field in fields(cpp.Problem)]
_SCHEMA = (
    "Tensor? lengths, Tensor? begins, Tensor? first_keys, Tensor? cos, Tensor? sin, Tensor? seed, "
    "SymInt chunk_length, bool is_causal, SymInt query_offset, SymInt query_period, float scale, float dropout"
)


def new_op(name: str, twin: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """q [b, n, h, e], k and v [b, l, K, r, h_kv, e] and a problem's fields -> o and the log-sum-exp in log2 units.

    `twin` is the same in plain PyTorch, o alone; gradients of gradients are its.
    """

    @torch.library.custom_op(
        f"retro_kernels::{name}",
        mutates_args=(),
        schema=f"(Tensor q, Tensor k, Tensor v, {_SCHEMA}) -> (Tensor, Tensor)",
    )
    def forward(q, k, v, *values):
        return attention_kernels(q, k, v).attention_forward(q, k, v, _problem(values))

    @torch.library.custom_op(
        f"retro_kernels::{name}_backward",
        mutates_args=(),
        schema="(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
        f"{_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    )
    def backward(grad_o, q, k, v, o, lse, *values):
        return attention_kernels(q, k, v).attention_backward(grad_o, q, k, v, o, lse, _problem(values))

    @forward.register_fake
    def _(q, k, v, *values):
        return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)

    @backward.register_fake
    def _(grad_o, q, k, v, o, lse, *values):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def keep(ctx, inputs, output):
        (q, k, v, *tensors), ctx.numbers = inputs[:9], inputs[9:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(q, k, v, *output, *tensors)

    def gradients(ctx, grad_o, grad_lse):
        q, k, v, o, lse, *tensors = ctx.saved_tensors
        none = (None,) * len(_FIELDS)
        if grad_o is None:
            return None, None, None, *none
        if torch.is_grad_enabled():  # a gradient of this gradient may be asked for
            again = lambda q, k, v: twin(q, k, v, *tensors, *ctx.numbers)  # noqa: E731
            return *reference.gradients(again, grad_o, q, k, v), *none
        return *backward(grad_o, q, k, v, o, lse, *tensors, *ctx.numbers), *none

    forward.register_autograd(gradients, setup_context=keep)

    def called(q, k, v, *values):
        if is_unobserved(q, k, v):
            return attention_kernels(q, k, v).attention_forward(q, k, v, _problem(values))
        return forward(q, k, v, *values)

    return called


def _problem(values: tuple[Any, ...]) -> cpp.Problem:
    return cpp.Problem(**dict(zip(_FIELDS, values, strict=True)))
