"""y = x w' + bias for a few rows of x, as a step of decoding has them; where a gradient or a derivative is asked for, PyTorch's.

Reads o * d weights once and t * d inputs, writes t * o: while t is small the roofline is the memory's bandwidth, so
bf16 weights take half of the time and int8 weights a quarter. Sums are float32, and each of a few rows' results is the same
whatever rows are beside it. On a CPU in C++ where that was built; all else is PyTorch's. In C++ inputs that meet int8 weights
are rounded to bytes (`blocks.rounded`) and products of bytes are exact; where the processor multiplies pairs of
bfloat16, what meets bfloat16 weights is rounded to it.
Shape letters: T rows, D inputs, O outputs.
"""

import threading

import torch
import torch.nn.functional as F
from retro_kernels import cpp, reference
from retro_kernels.backend import choose
from retro_kernels.checks import carries_derivative, is_autocast
from retro_kernels.products import product
from retro_kernels.reference import Matrix
from torch import Tensor

_kept = threading.local()
MOST_KEPT = 1 << 23  # weights, 16 MiB
MANY_ROWS = 64  # from there on PyTorch's blocks, and the matrix unit where there is one, are faster


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x [..., d], weight [o, d], bias [o] -> [..., o], of one type; or weight int8 with float32 scale [o] and bias.

    Raises ValueError for other shapes or types.
    """
    outputs, D = weight.shape
    parts = [part for part in (x, weight, bias, scale) if part is not None]
    if x.shape[-1] != D or any(part is not None and part.shape != (outputs,) for part in (bias, scale)):
        raise ValueError(
            f"shapes {[tuple(p.shape) for p in parts]}: expected x [..., {D}], weight [{outputs}, {D}], "
            f"bias and scale [{outputs}]"
        )
    if scale is None:
        is_typed = all(part.dtype == x.dtype for part in parts)
    else:
        is_typed = weight.dtype == torch.int8 and all(part.dtype == torch.float32 for part in parts[2:])
    if not is_typed or any(part.device != x.device for part in parts):
        kinds = sorted({f"{part.dtype} on {part.device.type}" for part in parts})
        raise ValueError(
            f"the tensors are {', '.join(kinds)}: expected one type and device, or int8 weights with float32 scale and bias"
        )
    matrix, is_many = Matrix(weight, bias, scale), x.numel() > MANY_ROWS * D
    is_packed = x.dtype in (torch.float32, torch.bfloat16) and all(part.is_contiguous() for part in parts[1:])
    if torch.compiler.is_compiling() or scale is None and is_autocast(x):
        return reference.linear(x, matrix)
    x = x.resolve_neg()  # a sign that is still to be applied
    is_packed = is_packed and not any(part.is_neg() for part in parts[1:])
    if not x.numel() or not is_packed or carries_derivative(*parts) or choose("linear", x) != "cpp":
        return reference.linear(x, matrix)
    if is_many and scale is None:
        return product(x, weight, bias)
    if is_many and _fits_matrix_unit(matrix):
        y = cpp.many_rows(x.reshape(-1, D).float().contiguous(), matrix)
        return y.to(x.dtype).reshape(*x.shape[:-1], outputs)
    if is_many and scale is not None and cpp.multiplies_bf16():
        y = F.linear(x.bfloat16(), cpp.widened(weight, scale, _room(weight.numel())))
        return (y if bias is None else y + bias).to(x.dtype)
    y = cpp.linear(x.reshape(-1, D).float().contiguous(), matrix)
    return y.to(x.dtype).reshape(*x.shape[:-1], outputs)


def _fits_matrix_unit(matrix: Matrix) -> bool:
    """Whether its many rows' products are made there: bytes are read 32 at a time, for 16 outputs or more."""
    outputs, D = matrix.shape
    return cpp.has_matrix_unit() and outputs >= 16 and (matrix.blocks is not None or D % 32 == 0)


def _room(count: int) -> Tensor:
    """Of bfloat16, for a while: a thread's own, kept so that its pages need not be asked for at every call, unless it is large."""
    if count > MOST_KEPT:
        return torch.empty(count, dtype=torch.bfloat16)
    if not hasattr(_kept, "room") or _kept.room.numel() < count:
        _kept.room = torch.empty(count, dtype=torch.bfloat16)
    room: Tensor = _kept.room
    return room


def linear_in_blocks(x: Tensor, matrix: Matrix) -> Tensor:
    """x [..., d], a matrix in blocks with a bias in float32 or bfloat16 -> [..., o] of x's type; no gradients.

    Any number of rows: each block is unpacked once for all of them, and a row's result is the same whatever rows are beside
    it, up to MANY_ROWS and above. Inputs are rounded to bytes, 32 at a time (`blocks.rounded`), products summed exactly in a block
    and in float32 over blocks; more than MANY_ROWS meet in a matrix unit where there is one, rounded to bfloat16 as the weights
    are. Raises ValueError for other shapes, RuntimeError where a derivative would be lost.
    """
    outputs, D = matrix.shape
    if matrix.blocks is None or x.shape[-1] != D or (matrix.bias is not None and matrix.bias.shape != (outputs,)):
        raise ValueError(f"x {tuple(x.shape)}: expected x [..., {D}], a weight in blocks, bias [{outputs}]")
    if carries_derivative(x):
        raise RuntimeError("weights in blocks have no gradient\n  x carries one\n  call it under torch.no_grad()")
    parts = [matrix.weight, *([] if matrix.bias is None else [matrix.bias])]
    is_packed = all(part.is_contiguous() and part.device == x.device for part in parts)
    if not x.numel() or not is_packed or x.dtype == torch.float64 or choose("linear", x) != "cpp":
        return reference.linear(x, matrix)
    is_many = x.numel() > MANY_ROWS * D and _fits_matrix_unit(matrix)
    multiply = cpp.many_rows if is_many else cpp.linear
    y = multiply(x.reshape(-1, D).float().contiguous().resolve_neg(), matrix)
    return y.to(x.dtype).reshape(*x.shape[:-1], outputs)
