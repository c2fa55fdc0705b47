"""Cross-entropy of the output head that never holds the logits of all tokens.

The head's product, softmax and gradients are made for TOKENS tokens at a time, the gradients already in the
forward pass (as in arXiv 2410.10989 section 3.2): memory and traffic do not grow with tokens x vocabulary.
Letters: T labelled tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from retro_engine.model import ops
from retro_engine.model.linear import is_sharded

TOKENS = 512  # of one slice


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        dtype: torch.dtype,
        group: Any,
        first: int,
    ) -> Tensor:
        needs = any(ctx.needs_input_grad[:3])
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        hidden, weight = hidden_TD.to(dtype), weight_VD.to(dtype)
        total = hidden_TD.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden) if needs else None
        is_frozen = not ctx.needs_input_grad[1]  # a frozen head: a third of the products less
        has_grad_weight = needs and not is_frozen
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias_V, dtype=wide) if needs and bias_V is not None else None
        for start in range(0, hidden.shape[0], TOKENS):
            rows = slice(start, start + TOKENS)
            logits = ops.product(hidden[rows], weight, None if bias_V is None else bias_V.to(dtype))
            if group is None:
                total += ops.cross_entropy_(logits, labels_T[rows], needs).sum()
            else:
                total += _sharded_cross_entropy_(logits, labels_T[rows] - first, group).sum()
            if grad_hidden is not None:  # the logits are their gradient now
                if grad_bias is not None:
                    grad_bias += logits.sum(0, dtype=wide)
                grad_hidden[rows] = ops.product(logits, weight.T)
                if has_grad_weight:
                    grad_weight = _added(grad_weight, logits, hidden[rows], wide)
        if has_grad_weight and grad_weight is None:  # no token has a label
            grad_weight = torch.zeros_like(weight_VD, dtype=wide)
        if grad_hidden is not None and group is not None:
            _over(group, grad_hidden, "sum")
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden_TD.dtype, weight_VD.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        bias = None if grad_bias is None else grad_bias * grad
        return (
            (grad_hidden * grad).to(ctx.dtypes[0]),
            None if grad_weight is None else (grad_weight * grad).to(ctx.dtypes[1]),
            bias,
            None,
            None,
            None,
            None,
        )


def _added(total_VD: Tensor | None, logits_TV: Tensor, hidden_TD: Tensor, wide: torch.dtype) -> Tensor:
    """total + logits' hidden, in place; None = nothing so far, which costs neither zeros nor a sum."""
    is_onednn = ops.is_onednn(logits_TV, hidden_TD)
    if total_VD is not None and logits_TV.dtype == wide and not is_onednn:
        return torch.addmm(total_VD, logits_TV.T, hidden_TD, out=total_VD)
    product_VD = ops.product(hidden_TD.T, logits_TV.T).T if is_onednn else logits_TV.T @ hidden_TD
    return product_VD.to(wide) if total_VD is None else total_VD.add_(product_VD)


def _sharded_cross_entropy_(logits_TV: Tensor, labels_T: Tensor, group: Any) -> Tensor:
    """`ops.cross_entropy_` over the processes of `group`, each with its own entries, from number 0 on."""
    values = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    is_here = ((labels_T >= 0) & (labels_T < values.shape[1]))[:, None]
    labels = torch.where(is_here, labels_T[:, None], 0)
    peak = _over(group, values.amax(-1, keepdim=True), "max")
    right = _over(group, torch.where(is_here, values.gather(-1, labels), 0), "sum") - peak
    probability = values.sub_(peak).exp_()
    normalizer = _over(group, probability.sum(-1, keepdim=True), "sum")
    probability /= normalizer
    logits_TV.copy_(probability.scatter_add_(-1, labels, -is_here.to(values.dtype)))
    return normalizer.log() - right


def _over(group: Any, values: Tensor, how: str) -> Tensor:
    """The sum or maximum over the processes of `group`, in place."""
    dist.all_reduce(values, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM, group)
    return values


def each_cross_entropy(hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax(head(hidden))[label] of each token, 0 where the label is -100, and the most likely token.

    hidden [..., d] goes through `head` TOKENS tokens at a time; both results have the shape of `labels`. Without gradients.
    """
    rows_TD, labels_T = hidden.flatten(0, -2), labels.flatten()
    losses: list[Tensor] = []
    best: list[Tensor] = []
    for start in range(0, len(rows_TD), TOKENS):
        logits = head(rows_TD[start : start + TOKENS])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        wanted = labels_T[start : start + TOKENS]
        losses.append(F.cross_entropy(logits, wanted, ignore_index=-100, reduction="none"))
        best.append(logits.argmax(-1))
    return torch.cat(losses).view(labels.shape), torch.cat(best).view(labels.shape)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(hidden weight' + bias)[label], in fp32.

    hidden [..., d], weight [V, d], bias [V] or None, labels [...] with -100 = no label. The products run in
    autocast's type where it is on, else in hidden's; float64 is summed in float64. A weight that is a DTensor has its
    rows spread over the processes of its mesh, which all have the same hidden and labels.
    """
    group, first = None, 0
    if is_sharded(weight):
        from torch.distributed.tensor import DTensor

        assert isinstance(weight, DTensor)
        group = weight.device_mesh.get_group()
        first = -(-weight.shape[0] // weight.device_mesh.size()) * weight.device_mesh.get_local_rank()
        weight = weight.to_local()
        bias = bias.to_local() if isinstance(bias, DTensor) else bias
    has_label = labels >= 0
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(hidden[has_label], weight, bias, labels[has_label], dtype, group, first)
