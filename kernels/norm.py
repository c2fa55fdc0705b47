"""RMSNorm (arXiv 1910.07467, equation 4) over the last axis; PyTorch's own LayerNorm leaves nothing to gain.

Reads x and writes y once; PyTorch's RMSNorm of bf16 on a CPU is eight passes over fp32. Sums are float32. On a CPU in C++ where
that was built and nothing but numbers is asked for; with gradients, under autocast and a compiler PyTorch's.
Shape letters: D width.
"""

import torch
import torch.nn.functional as F
from retro_kernels import cpp
from retro_kernels.backend import choose
from retro_kernels.checks import is_unobserved
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x [..., d] / rms(x) * weight [d] -> [..., d], of one type. Raises ValueError for other shapes."""
    if not x.dim() or weight is not None and weight.shape != x.shape[-1:]:
        shapes = [tuple(part.shape) for part in (x, weight) if part is not None]
        raise ValueError(f"x and weight {shapes}: expected [..., d] and [d]")
    if _is_for_cpp(x, weight):
        return cpp.rms_norm(x.contiguous(), weight, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _is_for_cpp(*tensors: Tensor | None) -> bool:
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.is_autocast_enabled("cpu") or not given[0].numel() or not is_unobserved(*given):
        return False
    is_packed = all(tensor.is_contiguous() for tensor in given[1:])
    return is_packed and given[0].device.type == "cpu" and choose("norm", *given) == "cpp"
