"""A model's weights in fewer bytes, for generation: bfloat16, or int8 on a CPU."""

import torch

from retro_engine.errors import UsageError, nearest
from retro_engine.model.linear import Int8Linear, Linear
from retro_engine.model.retro import RetroModel

WEIGHTS = ("fp32", "bf16", "int8")


def use_weights(model: RetroModel, weights: str) -> RetroModel:
    """The model for generation with its weights in fp32, bf16 or int8; changes it.

    int8 replaces every matrix, the output head's too (the embedding stays), and computes in fp32 around them.
    """
    if weights not in WEIGHTS:
        raise UsageError(f"dtype={weights!r} does not exist", nearest(weights, list(WEIGHTS)), "fp32, bf16 or int8")
    if weights != "int8":
        return model.to(torch.float32 if weights == "fp32" else torch.bfloat16)
    model.float()
    matrix, bias = model.head_weight, model.output_bias
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Linear):
                assert child.adapter is None, "adapters are merged before weights are rounded"
                setattr(module, name, Int8Linear(child.weight.detach(), child.bias))
    model.head = Int8Linear(matrix.detach(), bias)
    return model
