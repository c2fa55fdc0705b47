"""LoRA (arXiv 2106.09685): beside a frozen matrix the product of two narrow ones learns, y = W x + b + alpha/p B (A x).

B begins at 0, so that the first step computes what the base does. `merged` adds the products to the matrices; what
generates, serves, quantizes or exports a model reads merged weights and knows of no adapter. Shape letters: D inputs, O
outputs, P rank.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retro_engine.config import LoraConfig
from retro_engine.errors import StoreError
from retro_engine.model.linear import Linear
from retro_engine.model.retro import RetroModel

A, B = ".adapter.a", ".adapter.b"  # what the names of an adapter's matrices end in, after the linear layer's


def is_adapter(name: str) -> bool:
    """Whether a parameter, by name, belongs to an adapter."""
    return name.endswith((A, B))


class Adapter(nn.Module):
    """What is added to the output of one linear layer."""

    def __init__(self, linear: Linear, lora: LoraConfig, generator: torch.Generator):
        super().__init__()
        outputs, inputs = linear.weight.shape
        a_PD = torch.randn(lora.rank, inputs, generator=generator) * inputs**-0.5
        self.a = nn.Parameter(a_PD.to(linear.weight))
        self.b = nn.Parameter(torch.zeros(outputs, lora.rank).to(linear.weight))
        self.dropout = nn.Dropout(lora.dropout)
        self.scale = lora.scale

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """y [..., o] of the matrix, x [..., d] -> [..., o]; the narrow product is scaled, the wide one added where it is made."""
        narrow = F.linear(self.dropout(x), self.a) * self.scale
        return torch.addmm(y.flatten(0, -2), narrow.flatten(0, -2), self.b.T).view_as(y)


def add_adapters(model: RetroModel, lora: LoraConfig, learns: Callable[[str], bool], seed: int) -> None:
    """Give every linear layer that is named in `lora.targets`, and does not learn itself, an adapter; changes the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and not learns(f"{name}.weight"):
            kind = [part for part in name.split(".") if not part.isdecimal()][-1]  # neighbor_projection.k.0 is a k
            if kind in lora.chosen:
                module.adapter = Adapter(module, lora, generator)


def merged(state: dict[str, Tensor], lora: LoraConfig, name: str) -> dict[str, Tensor]:
    """The weights of a plain model that computes what a model with adapters, of which `state` is, does.

    Products and sums are in fp32 at least. Raises StoreError for adapters that fit no matrix; `name` is the file's.
    """
    plain = {key: value for key, value in state.items() if not is_adapter(key)}
    for key in sorted({key.removesuffix(A).removesuffix(B) for key in state.keys() - plain.keys()}):
        weight_OD, a_PD, b_OP = plain.get(f"{key}.weight"), state.get(key + A), state.get(key + B)
        if weight_OD is None or a_PD is None or b_OP is None:
            raise StoreError(f"{name} does not fit the model", f"{key} is no linear layer with both of its matrices")
        outputs, inputs = weight_OD.shape if weight_OD.dim() == 2 else (0, 0)
        shapes = (tuple(b_OP.shape), tuple(a_PD.shape))
        if shapes != ((outputs, lora.rank), (lora.rank, inputs)):
            why = f"{key} is {tuple(weight_OD.shape)}, its adapter {shapes[0]} x {shapes[1]} of rank {lora.rank}"
            raise StoreError(f"{name} does not fit the model", why)
        dtype = torch.promote_types(torch.promote_types(weight_OD.dtype, b_OP.dtype), torch.float32)
        product_OD = b_OP.to(dtype) @ a_PD.to(dtype) * lora.scale
        plain[f"{key}.weight"] = (weight_OD.to(dtype) + product_OD).to(weight_OD.dtype)
    return plain
