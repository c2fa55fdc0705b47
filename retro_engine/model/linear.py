"""The matrices of the network: their weights as they are trained, or for generation in int8 or in blocks.

Shape letters: D inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retro_engine.model import ops

_ROUNDED = 1 << 17  # weights that are rounded at once, in the processor's cache


class Linear(nn.Linear):
    """nn.Linear, with an op of its own for the few rows of a decoding step, and room for what learns beside it."""

    adapter: nn.Module | None  # model/lora.py

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.adapter = None

    def forward(self, x: Tensor) -> Tensor:
        return self.adapted(ops.linear(x, self.weight, self.bias), x)

    def adapted(self, y: Tensor, x: Tensor) -> Tensor:
        """The output for x, given what the matrix alone makes of it."""
        return y if self.adapter is None else self.adapter(y, x)


class Int8Linear(nn.Module):
    """y = x (scale * weight)' + bias with weights of -127 ... 127; each output channel is scaled by its largest one (absmax)."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight_OD: Tensor, bias_O: Tensor | None, rounded_OD: Tensor | None = None):
        """`rounded_OD`: int8, where the weights shall lie."""
        super().__init__()
        scale_O = torch.empty(len(weight_OD), device=weight_OD.device)
        if rounded_OD is None:
            rounded_OD = torch.empty(weight_OD.shape, dtype=torch.int8, device=weight_OD.device)
        step = max(1, _ROUNDED // weight_OD.shape[1])
        room = torch.empty((min(step, len(weight_OD)), weight_OD.shape[1]), device=weight_OD.device)
        for rows in (slice(first, first + step) for first in range(0, len(weight_OD), step)):
            part, scale, values = weight_OD[rows].float(), scale_O[rows], room[: len(weight_OD[rows])]
            torch.amax(torch.abs(part, out=values), 1, out=scale)
            scale.clamp_(min=1e-12).div_(127)
            rounded_OD[rows] = torch.div(part, scale[:, None], out=values).round_()
        self.register_buffer("weight", rounded_OD)
        self.register_buffer("scale", scale_O)
        self.register_buffer("bias", None if bias_O is None else bias_O.detach().float())

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def num_weights(self) -> int:
        return self.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., o]"""
        return ops.linear(x, self.weight, self.bias, self.scale)


class BlockLinear(nn.Module):
    """y = x w' + bias with w in blocks of `kind` (kernels/blocks.py): uint8, a row of them an output."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, blocks_OX: Tensor, kind: str, in_features: int, bias_O: Tensor | None = None):
        super().__init__()
        self.kind, self.in_features = kind, in_features
        self.register_buffer("weight", blocks_OX)
        self.register_buffer("bias", None if bias_O is None else bias_O.detach().float())

    @property
    def matrix(self) -> ops.Matrix:
        return ops.Matrix(self.weight, self.bias, blocks=self.kind, inputs=self.in_features)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def num_weights(self) -> int:
        return self.out_features * self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., o]"""
        return ops.linear_in_blocks(x, self.matrix)


class BlockEmbedding(nn.Module):
    """The rows of a table in blocks of `kind`, in fp32; the weight may be an output matrix's too."""

    weight: Tensor

    def __init__(self, blocks_VX: Tensor, kind: str, embedding_dim: int):
        super().__init__()
        self.kind, self.embedding_dim = kind, embedding_dim
        self.register_buffer("weight", blocks_VX)

    @property
    def num_weights(self) -> int:
        return len(self.weight) * self.embedding_dim

    def forward(self, tokens: Tensor) -> Tensor:
        """[...] -> [..., d]"""
        return ops.dequantize(F.embedding(tokens, self.weight), self.kind, self.embedding_dim)


ROUNDED = (Int8Linear, BlockLinear, BlockEmbedding)  # their weights are for generation alone


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor (known by its attribute: importing that class takes a second)."""
    return hasattr(tensor, "placements")


def project(x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
    """The outputs of several linear layers on the same input [..., d].

    In training one product with the stacked matrices (fewer and larger ones for a GPU; on a CPU no difference was seen
    beyond the noise). Apart where the matrices are sharded over processes, and without gradients, where few rows make
    stacking dearer than it is worth, and where they are rounded.
    """
    if is_sharded(linears[0].weight):
        from torch.distributed.tensor import DTensor, Replicate

        assert isinstance(linears[0].weight, DTensor)
        x = DTensor.from_local(x, linears[0].weight.device_mesh, [Replicate()])  # its gradient is summed once for all
    if not torch.is_grad_enabled() or is_sharded(x) or not isinstance(linears[0], Linear):
        return tuple(linear(x) for linear in linears)
    sizes = [linear.out_features for linear in linears]
    bias: Tensor | None = None
    if any(linear.bias is not None for linear in linears):
        parts = [x.new_zeros(n) if linear.bias is None else linear.bias for n, linear in zip(sizes, linears)]
        bias = torch.cat([part.to(linears[0].weight.dtype) for part in parts])
    outputs = ops.linear(x, torch.cat([linear.weight for linear in linears]), bias).split(sizes, -1)
    return tuple(linear.adapted(y, x) for linear, y in zip(linears, outputs))
