"""A model's weights in fewer bytes, for generation: bfloat16, or on a CPU int8 or blocks of four bits. Matrix by matrix: two
copies of one at most.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from retro_engine.errors import UsageError, nearest
from retro_engine.model import ops
from retro_engine.model.linear import BlockEmbedding, BlockLinear, Int8Linear, Linear
from retro_engine.model.memory import LargePages
from retro_engine.model.retro import RetroModel

WEIGHTS = ("fp32", "bf16", "int8", "int4")
MATRICES, WORDS = "q4_1", "q8_0"  # blocks of int4: of the layers, of the embedding and the output matrix
Drop = Callable[[Tensor], None]


def keep(tensor: Tensor) -> None:
    """A tensor whose memory is its own: it goes with the last who names it."""


def check_weights(weights: str) -> None:
    """Raises UsageError for what is none of WEIGHTS."""
    if weights not in WEIGHTS:
        raise UsageError(
            f"dtype={weights!r} does not exist",
            nearest(weights, list(WEIGHTS)),
            f"{', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]}",
        )


def use_weights(model: RetroModel, weights: str, drop: Drop = keep) -> RetroModel:
    """The model for generation with its weights in fp32, bf16, int8 or int4; changes it.

    int8 replaces every matrix, the output head's too (the embedding stays), and computes in fp32 around them. int4 has
    blocks of 32 weights (kernels/blocks.py), in the layers of four bits with a scale and a least value, in the embedding and the
    output head, which take most of the error that four would make, of eight bits with a scale. `drop` is told which tensors are
    read no more, or seldom (a row of the embedding a token).
    """
    check_weights(weights)
    if weights == "int8":
        _round_to_bytes(model, drop)
    elif weights == "int4":
        _round_to_blocks(model, drop)
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    tables = [table for table in (model.embedding, model.position_embedding) if table is not None]
    rows = {id(table.weight) for table in tables}  # read by row: these stay in their file where they can
    moves = weights in ("int8", "int4")  # else each norm holds what lies beside it in the file
    old = [p for p in model.parameters() if p.dtype != dtype or moves and id(p) not in rows]
    room = LargePages(sum(LargePages.size(p.numel(), dtype) for p in old)) if _is_on_cpu(model) and old else None
    for parameter in old:
        data = parameter.data
        parameter.data = data.to(dtype) if room is None else room.take(data.shape, dtype).copy_(data)
        drop(data)
    return model


def _linears(model: RetroModel) -> list[tuple[nn.Module, str, Linear]]:
    """All but the output head: in which module, by which name."""
    found = [(module, *item) for module in model.modules() for item in module.named_children()]
    linears = [(module, name, m) for module, name, m in found if isinstance(m, Linear) and m is not model.head]
    assert all(m.adapter is None for *_, m in linears), "adapters are merged before weights are rounded"
    return linears


def _round_to_bytes(model: RetroModel, drop: Drop) -> None:
    matrix, bias, int8, linears = model.head_weight, model.output_bias, torch.int8, _linears(model)
    sizes = [LargePages.size(w.numel(), int8) for w in (matrix, *(child.weight for *_, child in linears))]
    room = LargePages(sum(sizes)) if _is_on_cpu(model) else None

    def rounded(weight_OD: Tensor, bias_O: Tensor | None) -> Int8Linear:
        made = Int8Linear(weight_OD.detach(), bias_O, None if room is None else room.take(weight_OD.shape, int8))
        drop(weight_OD)
        return made

    for module, name, child in linears:
        setattr(module, name, rounded(child.weight, child.bias))
    model.head = rounded(matrix, bias)


def _round_to_blocks(model: RetroModel, drop: Drop) -> None:
    def blocks(weight_OD: Tensor, kind: str) -> Tensor:
        made = ops.quantize(weight_OD.detach().float(), kind)
        drop(weight_OD)
        return made

    for module, name, child in _linears(model):
        made = BlockLinear(blocks(child.weight, MATRICES), MATRICES, child.in_features, child.bias)
        setattr(module, name, made)
    table, matrix, bias, width = model.embedding.weight, model.head_weight, model.output_bias, model.config.hidden_size
    words = blocks(table, WORDS)
    model.head = BlockLinear(words if matrix is table else blocks(matrix, WORDS), WORDS, width, bias)
    setattr(model, "embedding", BlockEmbedding(words, WORDS, width))  # noqa: B010 (its type is that of training)


def _is_on_cpu(model: RetroModel) -> bool:
    return model.embedding.weight.device.type == "cpu"
