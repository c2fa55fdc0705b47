"""y = x w' + bias for a few rows of x, as a step of decoding has them; no gradients.

Reads o * d weights once and t * d inputs, writes t * o: while t is small the roofline is the memory's bandwidth. Each
row's result is the same whatever rows are beside it. float32 on a CPU in C++ where that was built; all else is PyTorch's.
Shape letters: T rows, D inputs, O outputs.
"""

import torch
from retro_kernels import cpp, reference
from retro_kernels.backend import choose
from torch import Tensor

FEW_ROWS = 16  # from there on a BLAS is as fast


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., d], weight [o, d], bias [o] -> [..., o]. Raises ValueError for other shapes or types."""
    outputs, D = weight.shape
    parts = [part for part in (x, weight, bias) if part is not None]
    if x.shape[-1] != D or (bias is not None and bias.shape != (outputs,)):
        raise ValueError(
            f"shapes {[tuple(p.shape) for p in parts]}: expected x [..., {D}], weight [{outputs}, {D}], bias [{outputs}]"
        )
    if any(part.dtype != x.dtype or part.device != x.device for part in parts):
        kinds = sorted({f"{part.dtype} on {part.device.type}" for part in parts})
        raise ValueError(f"the tensors are {', '.join(kinds)}: expected one type and device")
    is_few = 0 < x.numel() <= FEW_ROWS * D and x.dtype == torch.float32 and all(p.is_contiguous() for p in parts[1:])
    if not is_few or not cpp.has_linear() or choose("linear", *parts) != "cpp":
        return reference.linear(x, weight, bias)
    return cpp.linear(x.reshape(-1, D).contiguous(), weight, bias).unflatten(0, x.shape[:-1])
