"""Activation checkpointing: a layer's activations are computed again in the backward pass (arXiv 1604.06174).

selective keeps the outputs of matrix products and attention and computes the cheap rest again (norms, activations,
residuals; the idea of arXiv 2205.05198 section 5, with fused attention in its place); full keeps a layer's input alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

KEPT = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.linear.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def run(recompute: str | None, layer: Callable[..., Any], *arguments: Any) -> Any:
    """layer(*arguments); `recompute` None, "selective" or "full" says what its backward pass computes again."""
    if recompute is None or not torch.is_grad_enabled():
        return layer(*arguments)
    if recompute == "full":
        return checkpoint(layer, *arguments, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(layer, *arguments, use_reentrant=False, context_fn=contexts)


def _policy(_: Any, op: Any, *__: Tensor, **___: Any) -> CheckpointPolicy:
    is_kept = op in KEPT or op.namespace == "retro_kernels"
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
