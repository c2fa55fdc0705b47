"""A model's weights in fewer bytes, for generation: bfloat16, or int8 on a CPU. Matrix by matrix: two copies of one at most."""

from collections.abc import Callable

import torch
from torch import Tensor

from retro_engine.errors import UsageError, nearest
from retro_engine.model.linear import Int8Linear, Linear
from retro_engine.model.memory import LargePages
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
        _round_matrices(model, drop)
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    tables = [table for table in (model.embedding, model.position_embedding) if table is not None]
    rows = {id(table.weight) for table in tables}  # read by row: these stay in their file where they can
    moves = weights == "int8"  # else each norm holds what lies beside it in the file
    old = [p for p in model.parameters() if p.dtype != dtype or moves and id(p) not in rows]
    room = LargePages(sum(LargePages.size(p.numel(), dtype) for p in old)) if _is_on_cpu(model) and old else None
    for parameter in old:
        data = parameter.data
        parameter.data = data.to(dtype) if room is None else room.take(data.shape, dtype).copy_(data)
        drop(data)
    return model


def _round_matrices(model: RetroModel, drop: Drop) -> None:
    matrix, bias, int8 = model.head_weight, model.output_bias, torch.int8
    found = [
        (module, *item) for module in model.modules() for item in module.named_children() if item[1] is not model.head
    ]
    linears = [(module, name, child) for module, name, child in found if isinstance(child, Linear)]
    sizes = [LargePages.size(w.numel(), int8) for w in (matrix, *(child.weight for *_, child in linears))]
    room = LargePages(sum(sizes)) if _is_on_cpu(model) else None

    def rounded(weight_OD: Tensor, bias_O: Tensor | None) -> Int8Linear:
        made = Int8Linear(weight_OD.detach(), bias_O, None if room is None else room.take(weight_OD.shape, int8))
        drop(weight_OD)
        return made

    for module, name, child in linears:
        assert child.adapter is None, "adapters are merged before weights are rounded"
        setattr(module, name, rounded(child.weight, child.bias))
    model.head = rounded(matrix, bias)


def _is_on_cpu(model: RetroModel) -> bool:
    return model.embedding.weight.device.type == "cpu"
