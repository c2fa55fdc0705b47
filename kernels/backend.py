"""The only place that chooses an implementation of an op.

reference (plain PyTorch, any device and type) | cpp (csrc/cpu: CPU, float32 and bfloat16) | triton and cuda (NVIDIA
GPUs: float32, float16, bfloat16). The environment variable RETRO_BACKEND forces one; one that is not there, or cannot
take the tensors, raises.
"""

import functools
import importlib.util
import os
import warnings
from types import ModuleType

import torch
from retro_kernels import cpp, cuda
from retro_kernels.checks import is_transformed
from torch import Tensor

_HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ("reference", "cpp", "triton", "cuda")
_CUDA_OPS = ("rope", "gather_neighbors")  # what csrc/cuda has; the other ops are Triton's there


_CPP_TYPES = {torch.float32, torch.bfloat16}
_TYPES = {*_CPP_TYPES, torch.float16}


def backend(device: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """What ops on `device` (cpu, cuda) run on for tensors of `dtype`. Raises ValueError as `choose` does."""
    name = _forced() or _default(device)
    takes = {"reference": {dtype}, "cpp": _CPP_TYPES}.get(name, _TYPES)
    return name if dtype in takes or is_forced() else "reference"


def _default(device: str) -> str:
    if device == "cuda":
        return "triton" if _HAS_TRITON and _is_recent() else "reference"
    if device != "cpu" or cpp.is_available():
        return "cpp" if device == "cpu" else "reference"
    if not torch.compiler.is_compiling():
        say_that_cpp_is_missing()
    return "reference"


@functools.cache
def say_that_cpp_is_missing() -> None:
    """Once in a process: an installer shows nothing of a build that failed."""
    warnings.warn(
        "retro_kernels has no C++ extension here: plain PyTorch computes, more slowly\n"
        "  pip install -v says why it was not built (GCC or clang is needed)\n"
        "  RETRO_BACKEND=reference says that it is meant so",
        RuntimeWarning,
        stacklevel=2,
    )


def is_forced() -> bool:
    """Whether RETRO_BACKEND names a backend."""
    return bool(_forced())


def choose(op: str, *tensors: Tensor | None) -> str:
    """The backend of one call of `op` on `tensors`. Raises ValueError when a forced backend cannot take them.

    Dual numbers and what torch.func wraps are for the reference, which PyTorch differentiates in every mode.
    """
    forced = _forced()
    if forced == "cuda" and op not in _CUDA_OPS:
        forced = "triton"
    given = [tensor for tensor in tensors if tensor is not None]
    devices = {tensor.device.type for tensor in given}
    device = next(iter(devices - {"cpu"}), "cpu")
    name = forced or _default(device)
    if name == "triton" and not forced and op in _CUDA_OPS and cuda.is_usable():
        name = "cuda"  # RoPE and gathering: one pass without a compilation at the first call
    types = _CPP_TYPES if name == "cpp" else _TYPES
    expected = "cpu" if name == "cpp" else "cuda"
    fits = devices <= {expected} or os.environ.get("TRITON_INTERPRET") == "1"
    if op != "gather_neighbors":
        dtypes = {tensor.dtype for tensor in given}
        fits = fits and len(dtypes) <= 1 and dtypes <= types
    is_wrapped = is_transformed(*given)
    if name != "reference" and (is_wrapped or not fits):
        if forced:
            kinds = sorted({f"{tensor.dtype} on {tensor.device.type}" for tensor in given})
            kinds += ["wrapped by torch.func or forward-mode differentiation"] if is_wrapped else []
            raise ValueError(
                f"RETRO_BACKEND={forced} cannot run {op}\n  the tensors are {', '.join(kinds)}\n  unset RETRO_BACKEND"
            )
        return "reference"
    return name


def attention_kernels(*tensors: Tensor) -> ModuleType:
    """The module whose attention_forward and attention_backward take these tensors."""
    return cpp if _is_for_cpu(*tensors) else importlib.import_module("retro_kernels.triton_attention")


def rope_kernels(*tensors: Tensor) -> ModuleType:
    """The module whose rope_qk takes these tensors."""
    if _is_for_cpu(*tensors):
        return cpp
    return cuda if choose("rope", *tensors) == "cuda" else importlib.import_module("retro_kernels.triton_rope")


def gather_kernels(ids: Tensor) -> ModuleType:
    """The module whose gather_neighbors takes these ids."""
    if _is_for_cpu(ids):
        return cpp
    is_cuda = choose("gather_neighbors", ids) == "cuda"
    return cuda if is_cuda else importlib.import_module("retro_kernels.triton_gather_neighbors")


def cross_entropy_kernels(logits: Tensor) -> ModuleType:
    """The module whose cross_entropy_ takes these logits."""
    return cpp if _is_for_cpu(logits) else importlib.import_module("retro_kernels.triton_cross_entropy")


def _is_for_cpu(*tensors: Tensor) -> bool:
    """Whether a registered op runs in C++: always for CPU tensors, but where Triton interprets."""
    is_interpreted = os.environ.get("RETRO_BACKEND") == "triton"
    return all(tensor.device.type == "cpu" for tensor in tensors) and not is_interpreted


@functools.cache
def _is_recent() -> bool:
    """Whether the GPU is of the generations that the kernels are compiled for."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _forced() -> str:
    forced = os.environ.get("RETRO_BACKEND", "")
    if forced and forced not in BACKENDS:
        raise ValueError(f"RETRO_BACKEND={forced} is no backend\n  one of {', '.join(BACKENDS)}\n  unset RETRO_BACKEND")
    missing = ""
    if forced == "cpp" and not cpp.is_available():
        missing = "the C++ extension was not built (no compiler at installation)"
    if forced == "triton" and not _HAS_TRITON:
        missing = "triton is not installed"
    if forced == "cuda" and not (torch.cuda.is_available() and cuda.is_usable()):
        missing = "there is no GPU it can use" if cuda.LIBRARY else "the CUDA library was not built (nvcc is needed)"
    if missing:
        raise ValueError(f"RETRO_BACKEND={forced} is not available\n  {missing}\n  unset RETRO_BACKEND")
    return forced
