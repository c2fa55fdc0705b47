"""Weights as blocks (kernels/blocks.py): reads o * d floats, writes .56 to 1.06 bytes of each.

In C++ on a CPU where that was built, its twin in PyTorch elsewhere; no gradients. Letters: O rows, D values, X bytes of a row.
"""

import torch.nn.functional as F
from retro_kernels import cpp
from retro_kernels.blocks import BLOCK, TYPES, round_to_blocks
from torch import Tensor

KINDS = ("q4_0", "q4_1", "q8_0")


def quantize(weight_OD: Tensor, kind: str) -> Tensor:
    """[o, d] -> uint8 [o, x], blocks of one of KINDS; the last block of a row is filled with zeros. Raises ValueError."""
    if weight_OD.dim() != 2 or kind not in KINDS or not weight_OD.is_floating_point():
        raise ValueError(
            f"{weight_OD.dtype} {tuple(weight_OD.shape)} to {kind}: expected floats [o, d] and one of {', '.join(KINDS)}"
        )
    rows = weight_OD.detach().float()
    values = F.pad(rows, (0, -rows.shape[1] % BLOCK)).reshape(-1, BLOCK).contiguous()
    is_native = values.device.type == "cpu" and cpp.is_available() and values.numel()
    found = cpp.to_blocks(values, kind) if is_native else round_to_blocks(values, kind)
    return found.reshape(len(rows), TYPES[kind].row_bytes(rows.shape[1]))
