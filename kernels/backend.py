"""The only place that chooses an implementation of an op.

reference (plain PyTorch, any device and type) | cpp (csrc/cpu: CPU, float32 and bfloat16) | triton and cuda (NVIDIA
GPUs: float32, float16, bfloat16). The environment variable RETRO_BACKEND forces one; one that is not there, or cannot
take the tensors, raises.
"""

import importlib.util
import os
from types import ModuleType

import torch
from retro_kernels import cpp, cuda
from torch import Tensor

_HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ("reference", "cpp", "triton", "cuda")
_CUDA_OPS = ("rope", "gather_neighbors")  # what csrc/cuda has; the other ops are Triton's there


def backend(device: str = "cpu") -> str:
    """What ops on `device` (cpu, cuda) run on where their tensors allow it. Raises ValueError as `choose` does."""
    forced = _forced()
    if forced:
        return forced
    if device == "cuda":
        return "triton" if _HAS_TRITON else "reference"
    return "cpp" if cpp.is_available() else "reference"


def is_forced() -> bool:
    """Whether RETRO_BACKEND names a backend."""
    return bool(_forced())


def choose(op: str, *tensors: Tensor | None) -> str:
    """The backend of one call of `op` on `tensors`. Raises ValueError when a forced backend cannot take them."""
    forced = _forced()
    if forced == "cuda" and op not in _CUDA_OPS:
        forced = "triton"
    given = [tensor for tensor in tensors if tensor is not None]
    is_gpu = any(tensor.is_cuda for tensor in given)
    name = forced or backend("cuda" if is_gpu else "cpu")
    if name == "triton" and not forced and op in _CUDA_OPS and cuda.LIBRARY is not None:
        name = "cuda"  # RoPE and gathering: one pass without a compilation at the first call
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    types = (torch.float32, torch.bfloat16) + (() if name == "cpp" else (torch.float16,))
    fits = all(tensor.is_cuda == (name in ("triton", "cuda")) or is_interpreted for tensor in given)
    if op != "gather_neighbors":
        fits = fits and all(tensor.dtype in types and tensor.dtype == given[0].dtype for tensor in given)
    if name != "reference" and not fits:
        if forced:
            kinds = sorted({f"{tensor.dtype} on {tensor.device.type}" for tensor in given})
            raise ValueError(
                f"RETRO_BACKEND={forced} cannot run {op}\n  the tensors are {', '.join(kinds)}\n  unset RETRO_BACKEND"
            )
        return "reference"
    return name


def attention_kernels(*tensors: Tensor) -> ModuleType:
    """The module whose attention_forward and attention_backward take these tensors."""
    if choose("attention", *tensors) == "cpp":
        return cpp
    return importlib.import_module("retro_kernels.triton_attention")


def rope_kernels(*tensors: Tensor) -> ModuleType:
    """The module whose rope_qk takes these tensors."""
    return {"cpp": cpp, "cuda": cuda}.get(choose("rope", *tensors)) or importlib.import_module(
        "retro_kernels.triton_rope"
    )


def gather_kernels(ids: Tensor) -> ModuleType:
    """The module whose gather_neighbors takes these ids."""
    return {"cpp": cpp, "cuda": cuda}.get(choose("gather_neighbors", ids)) or importlib.import_module(
        "retro_kernels.triton_gather_neighbors"
    )


def _forced() -> str:
    forced = os.environ.get("RETRO_BACKEND", "")
    if forced and forced not in BACKENDS:
        raise ValueError(f"RETRO_BACKEND={forced} is no backend\n  one of {', '.join(BACKENDS)}\n  unset RETRO_BACKEND")
    missing = ""
    if forced == "cpp" and not cpp.is_available():
        missing = "the C++ extension was not built (no compiler at installation)"
    if forced == "triton" and not _HAS_TRITON:
        missing = "triton is not installed"
    if forced == "cuda" and (cuda.LIBRARY is None or not torch.cuda.is_available()):
        missing = "there is no GPU" if cuda.LIBRARY else "the CUDA library was not built (nvcc is needed)"
    if missing:
        raise ValueError(f"RETRO_BACKEND={forced} is not available\n  {missing}\n  unset RETRO_BACKEND")
    return forced
