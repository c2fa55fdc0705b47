"""Weights of a byte, for generation on a CPU: each output channel is scaled by its largest weight (absmax).

Letters: O outputs, D inputs, T tokens.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from retro_engine.errors import UsageError, nearest
from retro_engine.model import ops

if TYPE_CHECKING:
    from retro_engine.model.retro import RetroModel

WEIGHTS = ("fp32", "bf16", "int8")


class Int8Linear(nn.Module):
    """y = x (scale * weight)' + bias with weights of -127 ... 127."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight_OD: Tensor, bias_O: Tensor | None):
        super().__init__()
        scale_O = weight_OD.abs().amax(1).clamp(min=1e-12).float() / 127
        self.register_buffer("weight", (weight_OD.float() / scale_O[:, None]).round().to(torch.int8).contiguous())
        self.register_buffer("scale", scale_O)
        self.register_buffer("bias", None if bias_O is None else bias_O.detach().float())

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., o]"""
        return ops.linear(x, self.weight, self.bias, self.scale)


def use_weights(model: "RetroModel", weights: str) -> "RetroModel":
    """The model for generation with its weights in fp32, bf16 or int8; changes it.

    int8 replaces every matrix, the output head's too (the embedding stays), and computes in fp32 around them.
    """
    if weights not in WEIGHTS:
        raise UsageError(f"weights={weights!r} does not exist", nearest(weights, list(WEIGHTS)), "fp32, bf16 or int8")
    if weights != "int8":
        return model.to(torch.float32 if weights == "fp32" else torch.bfloat16)
    model.float()
    matrix, bias = model.head_weight, model.output_bias
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child.weight.detach(), child.bias))
    model.head = Int8Linear(matrix.detach(), bias)
    return model
