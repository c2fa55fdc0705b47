"""The layers of a decoder for one new token a row, as a step of decoding has them; no gradients.

Each layer is x + f(norm(x)) with everything of f in one call: on a CPU a few rows cost the reading of the weights, and
what is between the products must cost nothing. Weights are float32, bfloat16 or int8, the cache float32 or bfloat16; in
C++ x and all sums are float32 (arXiv 2112.04426 section 2, one token at a time). A row's result does not depend on the
rows beside it. Elsewhere (a GPU, float64, many rows) the same in PyTorch.
Shape letters: B rows, D width, S keys, G key/value heads, E head width.
"""

import torch
from retro_kernels import cpp, reference
from retro_kernels.backend import choose
from retro_kernels.linear import FEW_ROWS
from retro_kernels.reference import Attending, Matrix, Norm
from torch import Tensor

__all__ = ["Attending", "Matrix", "Norm", "attention_step", "cross_attention_step", "feed_forward_step"]
_FLOATS = (torch.float32, torch.bfloat16)
_WEIGHTS = (*_FLOATS, torch.int8)


def attention_step(x: Tensor, norm: Norm, q: Matrix, k: Matrix, v: Matrix, out: Matrix, attending: Attending) -> Tensor:
    """x [b, d] + out(self-attention) -> [b, d]; writes the new keys and values into `attending`'s cache.

    Raises ValueError for shapes that do not fit, a place outside the cache or a position outside the tables.
    """
    _check_attention(x, q, out, attending, (k, v))
    if _is_for_cpp(x, norm, (q, k, v, out), attending):
        return cpp.attention_step(x.float().contiguous(), norm, q, k, v, out, attending)
    return reference.attention_step(_as(norm, x), norm, q, k, v, out, attending)


def cross_attention_step(
    x: Tensor, norm: Norm, q: Matrix, out: Matrix, attending: Attending, adds_bias: bool = False
) -> Tensor:
    """x [b, d] + out(attention over `attending`) -> [b, d]; 0, or with `adds_bias` out's bias, where no key is valid."""
    _check_attention(x, q, out, attending, ())
    if not attending.keys.shape[1] and not adds_bias:
        return x
    if _is_for_cpp(x, norm, (q, out), attending):
        return cpp.cross_attention_step(x.float().contiguous(), norm, q, out, attending, adds_bias)
    return reference.cross_attention_step(_as(norm, x), norm, q, out, attending, adds_bias)


def feed_forward_step(x: Tensor, norm: Norm, gate: Matrix | None, up: Matrix, down: Matrix, activation: str) -> Tensor:
    """x [b, d] + down(activation(up)) -> [b, d]; activation gelu, gelu_tanh, or swiglu with `gate`."""
    matrices = (up, down) if gate is None else (gate, up, down)
    for matrix in matrices[:-1]:
        _check_matrix("gate and up", matrix, up.weight.shape[0], x.shape[-1])
    _check_matrix("down", down, x.shape[-1], up.weight.shape[0])
    if _is_for_cpp(x, norm, matrices, None):
        return cpp.feed_forward_step(x.float().contiguous(), norm, gate, up, down, activation)
    return reference.feed_forward_step(_as(norm, x), norm, gate, up, down, activation)


def _check_attention(x: Tensor, q: Matrix, out: Matrix, a: Attending, new: tuple[Matrix, ...]) -> None:
    """Raises ValueError for shapes that do not fit; C++ checks the places themselves."""
    (B, S, G, E), D, width = a.keys.shape, x.shape[-1], q.weight.shape[0]
    if a.values.shape != a.keys.shape or x.shape != (B, D) or not width or width % (G * E):
        raise ValueError(
            f"x {tuple(x.shape)}, q {tuple(q.weight.shape)}, keys {tuple(a.keys.shape)}, values {tuple(a.values.shape)}: "
            "expected x [b, d], q [h * e, d] and keys and values [b, s, g, e], h a multiple of g"
        )
    for name, place in (("begins", a.begins), ("starts", a.starts), ("positions", a.positions)):
        if place is not None and place.shape != (B,):
            raise ValueError(f"{name} has shape {tuple(place.shape)}; expected [{B}]")
    if new and a.starts is None:
        raise ValueError(f"starts is None; expected [{B}], the places of the new tokens")
    if a.valid is not None and a.valid.shape != (B, S):
        raise ValueError(f"valid has shape {tuple(a.valid.shape)}; expected [{B}, {S}]")
    if a.cos is not None and (a.sin is None or a.positions is None or a.sin.shape != a.cos.shape):
        raise ValueError("cos, sin and positions must be given together, cos and sin of one shape")
    if a.cos is not None and 2 * a.cos.shape[1] > E:
        raise ValueError(f"cos {tuple(a.cos.shape)} rotates {2 * a.cos.shape[1]} features; the head width is {E}")
    _check_matrix("q", q, width, D)
    for matrix in new:
        _check_matrix("k and v", matrix, G * E, D)
    _check_matrix("out", out, D, width)


def _check_matrix(name: str, m: Matrix, outputs: int, inputs: int) -> None:
    if m.cpp and m.cpp[2:4] == [outputs, inputs]:
        return
    is_fitting = m.weight.shape == (outputs, inputs)
    for part in (m.bias, m.scale):
        is_fitting = is_fitting and (part is None or part.shape == (outputs,))
    if not is_fitting:
        raise ValueError(
            f"{name} has weight {tuple(m.weight.shape)}: expected [{outputs}, {inputs}], bias and scale [{outputs}]"
        )


def _as(norm: Norm, x: Tensor) -> Tensor:
    """x of the weights' type: an op before may have made it float32."""
    return x if norm.weight is None else x.to(norm.weight.dtype)


def _is_for_cpp(x: Tensor, norm: Norm, matrices: tuple[Matrix, ...], a: Attending | None) -> bool:
    if not 0 < len(x) <= FEW_ROWS or x.dtype not in _FLOATS or choose("linear", x) != "cpp":
        return False
    for m in matrices:
        if m.cpp:
            continue  # looked at before
        if m.weight.dtype not in _WEIGHTS or not m.weight.is_contiguous():
            return False
        if m.bias is not None and m.bias.dtype not in _FLOATS:
            return False
    if not norm.cpp and any(part is not None and part.dtype not in _FLOATS for part in (norm.weight, norm.bias)):
        return False
    return a is None or _is_packed(a)


def _is_packed(a: Attending) -> bool:
    """Whether the cache, the places and the tables are as C++ reads them."""
    strides = a.keys.stride()
    if a.keys.dtype not in _FLOATS or strides != a.values.stride() or strides[2:] != (a.keys.shape[3], 1):
        return False
    for place in (a.begins, a.starts, a.positions):
        if place is not None and (place.dtype != torch.int64 or not place.is_contiguous()):
            return False
    for table in (a.cos, a.sin):
        if table is not None and (table.dtype != torch.float32 or not table.is_contiguous()):
            return False
    return a.valid is None or (a.valid.dtype == torch.bool and a.valid.is_contiguous())
