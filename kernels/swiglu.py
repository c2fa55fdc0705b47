"""silu(gate) * up, the gate of a feed-forward (SwiGLU, arXiv 2002.05202, equation 5).

Reads gate and up and writes y once, where PyTorch writes silu(gate) and reads it again, rounded. On a CPU in C++ where that was
built and nothing but numbers is asked for; with gradients, under autocast and a compiler PyTorch's.
"""

import torch
import torch.nn.functional as F
from retro_kernels import cpp
from retro_kernels.backend import choose
from retro_kernels.checks import is_unobserved
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Two tensors of one shape and type -> theirs. Raises ValueError for others."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype}: expected the same of both"
        )
    is_plain = gate.numel() > 0 and not torch.is_autocast_enabled("cpu") and is_unobserved(gate, up)
    if is_plain and gate.device.type == "cpu" and choose("swiglu", gate, up) == "cpp":
        return cpp.swiglu(gate.contiguous(), up.contiguous())
    return F.silu(gate) * up
