"""The CUDA C++ kernels (csrc/cuda): RoPE and neighbor gathering, called through a C interface.

The library is built at installation where nvcc is; it loads without a GPU. Shape letters as in kernels/reference.py.
"""

import ctypes
import functools
from pathlib import Path

import retro_kernels
import torch
from torch import Tensor

# The library, of several the newest; None = it was not built.
LIBRARY = max(
    (path for folder in retro_kernels.__path__ for path in Path(folder).glob("_cuda*.so")),
    key=lambda path: path.stat().st_mtime,
    default=None,
)
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def _library() -> ctypes.CDLL:
    if LIBRARY is None:
        raise RuntimeError("the CUDA library was not built: nvcc is needed at installation")
    library = ctypes.CDLL(str(LIBRARY))
    library.retro_error_name.restype = ctypes.c_char_p
    return library


@functools.cache
def is_usable() -> bool:
    """Whether the library was built and its CUDA runtime works with the driver."""
    return LIBRARY is not None and _library().retro_probe() == 0


def rope_qk(
    q_BNHE: Tensor, k_BNGE: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q and k rotated, or rotated back; k may have no heads."""
    B, N, H, E = q_BNHE.shape
    q_out = torch.empty(q_BNHE.shape, dtype=q_BNHE.dtype, device=q_BNHE.device)
    k_out = torch.empty(k_BNGE.shape, dtype=k_BNGE.dtype, device=k_BNGE.device)
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    place = None if positions is None else positions.long().contiguous()
    strides = [s for t in (q_BNHE, q_out, k_BNGE, k_out) for s in t.stride()[:3]]
    with torch.cuda.device(q_BNHE.device):
        error = _library().retro_rope(
            *(_TYPES[q_BNHE.dtype], _address(q_BNHE), _address(q_out), _address(k_BNGE), _address(k_out)),
            *(_address(cos), _address(sin), _address(place)),
            *(ctypes.c_int64(N if place is not None and place.dim() == 2 else 0), ctypes.c_int64(cos.shape[0])),
            (ctypes.c_int64 * 12)(*strides),
            *(ctypes.c_int64(x) for x in (B, N, H, k_BNGE.shape[2], E, cos.shape[1])),
            *(int(interleaved), int(inverse), _stream(q_BNHE)),
        )
    _check(error)
    return q_out, k_out


def gather_neighbors(
    table: Tensor, document: Tensor, row_lengths: Tensor, ids: Tensor, retrieved_length: int, pad_id: int
) -> tuple[Tensor, Tensor]:
    """As `reference.gather_neighbors`; the table may be host memory that `register_host` was given."""
    dtype = torch.int64 if table.dtype == torch.uint16 else table.dtype
    tokens = torch.empty((*ids.shape, retrieved_length), dtype=dtype, device=ids.device)
    lengths = torch.empty(ids.shape, dtype=torch.int64, device=ids.device)
    table = table.contiguous()
    document, row_lengths, ids = document.int().contiguous(), row_lengths.int().contiguous(), ids.long().contiguous()
    with torch.cuda.device(ids.device):
        error = _library().retro_gather_neighbors(
            *(table.element_size(), _address(table), int(not table.is_cuda)),
            *(_address(document), _address(row_lengths), _address(ids), _address(tokens), _address(lengths)),
            *(ctypes.c_int64(x) for x in (ids.numel(), table.shape[0], table.shape[1], retrieved_length, pad_id)),
            _stream(ids),
        )
    _check(error)
    return tokens, lengths


def register_host(table: Tensor) -> None:
    """Let the GPU read a contiguous CPU tensor in place. Raises RuntimeError naming CUDA's error."""
    _check(_library().retro_register_host(_address(table), ctypes.c_int64(table.numel() * table.element_size())))


def unregister_host(table: Tensor) -> None:
    """The end of `register_host`."""
    _check(_library().retro_unregister_host(_address(table)))


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


def _stream(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream(tensor.device).cuda_stream)


def _check(error: int) -> None:
    if error:
        raise RuntimeError(f"CUDA: {_library().retro_error_name(error).decode()}")
