"""The only place that chooses an implementation of an op.

reference (plain PyTorch, any device and type) | cpp (csrc/cpu: CPU, float32 and bfloat16) | triton and cuda (NVIDIA
GPUs). The environment variable RETRO_BACKEND forces one; one that is not there, or cannot take the tensors, raises.
"""

import importlib.util
import os

import torch
from retro_kernels import cpp
from torch import Tensor

BACKENDS = ("reference", "cpp", "triton", "cuda")
_CUDA_OPS = ("rope", "gather_neighbors")  # what csrc/cuda has; the other ops are Triton's there


def backend(device: str = "cpu") -> str:
    """What ops on `device` (cpu, cuda) run on where their tensors allow it. Raises ValueError as `choose` does."""
    forced = _forced()
    if forced:
        return forced
    if device == "cuda":
        return "triton" if _has_triton() else "reference"
    return "cpp" if cpp.is_available() else "reference"


def choose(op: str, *tensors: Tensor | None) -> str:
    """The backend of one call of `op` on `tensors`. Raises ValueError when a forced backend cannot take them."""
    forced = _forced()
    if forced == "cuda" and op not in _CUDA_OPS:
        forced = "triton"
    name = forced or backend("cuda" if any(t is not None and t.is_cuda for t in tensors) else "cpu")
    if name == "cpp" and not cpp.takes(*tensors) or name in ("triton", "cuda") and not _on_gpu(*tensors):
        if forced:
            kinds = sorted({f"{t.dtype} on {t.device.type}" for t in tensors if t is not None})
            raise ValueError(
                f"RETRO_BACKEND={forced} cannot run {op}\n  the tensors are {', '.join(kinds)}\n  unset RETRO_BACKEND"
            )
        return "reference"
    return name


def _forced() -> str:
    forced = os.environ.get("RETRO_BACKEND", "")
    if forced and forced not in BACKENDS:
        raise ValueError(f"RETRO_BACKEND={forced} is no backend\n  one of {', '.join(BACKENDS)}\n  unset RETRO_BACKEND")
    missing = {
        "cpp": None if cpp.is_available() else "the C++ extension was not built (no compiler at installation)",
        "triton": None if _has_triton() else "triton is not installed",
        "cuda": None if _has_cuda() else "the CUDA extension was not built (nvcc and a CUDA build of torch are needed)",
    }.get(forced)
    if missing:
        raise ValueError(f"RETRO_BACKEND={forced} is not available\n  {missing}\n  unset RETRO_BACKEND")
    return forced


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _has_cuda() -> bool:
    return importlib.util.find_spec("retro_kernels._cuda") is not None


def _on_gpu(*tensors: Tensor | None) -> bool:
    """Whether Triton takes them: on a GPU (or interpreted), fp32, fp16 or bf16."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    types = (torch.float32, torch.float16, torch.bfloat16)
    given = [tensor for tensor in tensors if tensor is not None]
    return all((t.is_cuda or is_interpreted) and t.dtype in types and t.dtype == given[0].dtype for t in given)
