"""A model's weights in fewer bytes, for generation: bfloat16, or int8 on a CPU. Matrix by matrix: two copies of one at most."""

from collections.abc import Callable

import torch
from torch import Tensor

from retro_engine.errors import UsageError, nearest
from retro_engine.model.linear import Int8Linear, Linear
from retro_engine.model.retro import RetroModel

WEIGHTS = ("fp32", "bf16", "int8")
Drop = Callable[[Tensor], None]


def keep(tensor: Tensor) -> None:
    """A tensor whose memory is its own: it goes with the last who names it."""


def check_weights(weights: str) -> None:
    """Raises UsageError for what is none of WEIGHTS."""
    if weights not in WEIGHTS:
        raise UsageError(f"dtype={weights!r} does not exist", nearest(weights, list(WEIGHTS)), "fp32, bf16 or int8")


def use_weights(model: RetroModel, weights: str, drop: Drop = keep) -> RetroModel:
    """The model for generation with its weights in fp32, bf16 or int8; changes it.

    int8 replaces every matrix, the output head's too (the embedding stays), and computes in fp32 around them. `drop` is told
    which tensors are read no more, or seldom (a row of the embedding a token).
    """
    check_weights(weights)
    if weights == "int8":
        matrix, bias = model.head_weight, model.output_bias
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, Linear):
                    assert child.adapter is None, "adapters are merged before weights are rounded"
                    setattr(module, name, Int8Linear(child.weight.detach(), child.bias))
                    drop(child.weight)
        model.head = Int8Linear(matrix.detach(), bias)
        drop(matrix)
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    for parameter in model.parameters():
        old = parameter.data
        if old.dtype != dtype:
            parameter.data = old.to(dtype)
            drop(old)
    return model
