"""The layers of a decoder for one new token a row, as a step of decoding has them; no gradients.

Each part of a layer is x + f(norm(x)). On a CPU a few rows cost the reading of the weights, and what is between the
products must cost nothing: all parts are one call of C++, and one parallel region, whatever the number of rows. Weights are
float32, bfloat16, int8 or in blocks (kernels/blocks.py), the cache float32 or bfloat16; in C++ x and all sums are float32
(arXiv 2112.04426 section 2, one token at a time), and what meets narrow weights is rounded as `linear` has it. A row's
result does not depend on the rows beside it. Elsewhere (a GPU, float64) the same in PyTorch.
Shape letters: B rows, D width, S keys, G key/value heads, E head width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from retro_kernels import cpp, reference
from retro_kernels.backend import choose
from retro_kernels.checks import carries_derivative
from retro_kernels.reference import (
    Attending,
    CrossAttentionPart,
    FeedForwardPart,
    Matrix,
    Norm,
    Part,
    SelfAttentionPart,
)
from torch import Tensor

__all__ = ["Attending", "CrossAttentionPart", "FeedForwardPart", "Matrix", "Norm", "Part", "SelfAttentionPart", "Steps"]
_FLOATS = (torch.float32, torch.bfloat16)
_WEIGHTS = (*_FLOATS, torch.int8)


class Steps:
    """Parts of layers, one after another. What does not change from step to step is looked at once, here.

    Every call reads the values of weights, cache and places anew, and looks at all of it again where a tensor has other memory
    (`.data =`, `.to()`, `share_memory_()`). What takes several calls a step may `look` once and `run` each. A copy, pickled or
    not, is made of the parts alone. Raises ValueError for shapes that do not fit.
    """

    def __init__(self, parts: Sequence[Part]):
        if not parts:
            raise ValueError("there are no parts")
        self.parts = tuple(parts)
        self._tensors = tuple({id(tensor): tensor for part in parts for tensor in _tensors(part)}.values())
        self._prepare()

    def __reduce__(self) -> tuple[Any, ...]:
        return Steps, (self.parts,)

    def _prepare(self) -> None:
        """Remember what C++ is told of the parts."""
        first = self.parts[0]
        self.width = (first.up if isinstance(first, FeedForwardPart) else first.q).shape[1]
        for part in self.parts:
            _check(part, self.width)
        counts = {part.attending.count for part in self.parts if not isinstance(part, FeedForwardPart)}
        if len(counts) > 1:
            raise ValueError(f"the parts attend {sorted(counts)} rows; expected one number")
        self.rows = counts.pop() if counts else None
        self._is_packed = all(_is_packed(part) for part in self.parts)
        self._cpp: object = None
        self._memory = _memory(self._tensors)
        self._held = [tensor.detach() for tensor in self._tensors]  # else an address could return with other contents

    def __call__(self, x_BD: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """Parts first ... last - 1: [b, d] -> [b, d]; writes the new keys and values into the caches.

        Raises ValueError for another shape, a place outside the cache or a position outside the tables, and RuntimeError where a
        gradient or a derivative would be lost.
        """
        self.look()
        return self.run(x_BD, first, last)

    def look(self) -> None:
        """Prepare anew what has moved. Before every `run` whose tensors may have got other memory."""
        if _memory(self._tensors) != self._memory:
            self._prepare()

    def takes(self, x_BD: Tensor) -> bool:
        """Whether C++ computes rows such as these: then no bit of a row depends on those beside it."""
        return len(x_BD) > 0 and x_BD.dtype in _FLOATS and self._is_packed and choose("linear", x_BD) == "cpp"

    def run(self, x_BD: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """A call without `look`: only while nothing can have moved since the last one."""
        if carries_derivative(x_BD, *(self._tensors if torch.is_grad_enabled() else ())):
            raise RuntimeError(
                "a step of decoding has no gradient\n  x or a weight requires one, or is a dual number\n  call it under "
                "torch.no_grad(), or the model's full pass"
            )
        rows = x_BD.shape[0] if self.rows is None else self.rows
        if x_BD.shape != (rows, self.width):
            raise ValueError(f"x has shape {tuple(x_BD.shape)}; expected [{rows}, {self.width}]")
        last = len(self.parts) if last is None else last
        if not 0 <= first < last <= len(self.parts):
            raise ValueError(f"parts {first} ... {last - 1} were asked for; there are {len(self.parts)}")
        if self.takes(x_BD):
            self._cpp = self._cpp or cpp.new_steps(self.parts)
            return cpp.steps(self._cpp, x_BD.float().contiguous().resolve_neg(), first, last)
        for part in self.parts[first:last]:
            weight = part.norm.weight  # an op before may have made x float32
            x_BD = reference.step(x_BD if weight is None else x_BD.to(weight.dtype), part)
        return x_BD


def _tensors(part: object) -> Iterator[Tensor]:
    """All that a part reads and writes."""
    for item in fields(part):  # type: ignore[arg-type]
        value = getattr(part, item.name)
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Matrix | Norm | Attending):
            yield from _tensors(value)


def _memory(tensors: tuple[Tensor, ...]) -> tuple[list[int], list[tuple[int, ...]], list[int]]:
    """Where they lie, and how; called at every step."""
    return list(map(Tensor.data_ptr, tensors)), list(map(Tensor.stride, tensors)), list(map(Tensor.numel, tensors))


def _check(part: Part, D: int) -> None:
    """Raises ValueError for shapes that do not fit; C++ checks the places themselves."""
    for name, value in (("weight", part.norm.weight), ("bias", part.norm.bias)):
        if value is not None and value.shape != (D,):
            raise ValueError(f"the norm has {name} {tuple(value.shape)}; expected [{D}]")
    if isinstance(part, FeedForwardPart):
        if (part.gate is not None) != (part.activation == "swiglu"):
            raise ValueError(f"activation {part.activation}: swiglu has a gate, gelu and gelu_tanh have none")
        wide = part.up.shape[0]
        for matrix in (part.up,) if part.gate is None else (part.gate, part.up):
            _check_matrix("gate and up", matrix, wide, D)
        _check_matrix("down", part.down, D, wide)
        return
    a = part.attending
    (_, S, G, E), B, width = a.keys.shape, a.count, part.q.shape[0]
    if a.values.shape != a.keys.shape or not width or width % (G * E):
        raise ValueError(
            f"q {part.q.shape}, keys {tuple(a.keys.shape)}, values {tuple(a.values.shape)}: expected "
            "q [h * e, d] and keys and values [b, s, g, e], h a multiple of g"
        )
    for name, place in (("begins", a.begins), ("starts", a.starts), ("positions", a.positions)):
        if place is not None and place.shape != (B,):
            raise ValueError(f"{name} has shape {tuple(place.shape)}; expected [{B}]")
    if a.valid is not None and a.valid.shape != (B, S):
        raise ValueError(f"valid has shape {tuple(a.valid.shape)}; expected [{B}, {S}]")
    if a.cos is not None and (a.sin is None or a.positions is None or a.sin.shape != a.cos.shape):
        raise ValueError("cos, sin and positions must be given together, cos and sin of one shape")
    if a.cos is not None and 2 * a.cos.shape[1] > E:
        raise ValueError(f"cos {tuple(a.cos.shape)} rotates {2 * a.cos.shape[1]} features; the head width is {E}")
    _check_matrix("q", part.q, width, D)
    _check_matrix("out", part.out, D, width)
    if isinstance(part, SelfAttentionPart):
        if a.starts is None:
            raise ValueError(f"starts is None; expected [{B}], the places of the new tokens")
        for matrix in (part.k, part.v):
            _check_matrix("k and v", matrix, G * E, D)


def _check_matrix(name: str, m: Matrix, outputs: int, inputs: int) -> None:
    is_fitting = m.shape == (outputs, inputs)
    for part in (m.bias, m.scale):
        is_fitting = is_fitting and (part is None or part.shape == (outputs,))
    if not is_fitting:
        raise ValueError(f"{name} has weight {m.shape}: expected [{outputs}, {inputs}], bias and scale [{outputs}]")


def _is_packed(part: Part) -> bool:
    """Whether weights, cache, places and tables are as C++ reads them."""
    matrices = [matrix for matrix in vars(part).values() if isinstance(matrix, Matrix)]
    weights, scales = [m.weight for m in matrices], [m.scale for m in matrices if m.scale is not None]
    others = [x for x in (part.norm.weight, part.norm.bias, *(m.bias for m in matrices)) if x is not None]
    if any(x.device.type != "cpu" or not x.is_contiguous() for x in (*weights, *others, *scales)):
        return False
    if any(m.weight.dtype not in _WEIGHTS and m.blocks is None for m in matrices) or any(
        x.dtype not in _FLOATS for x in others
    ):
        return False
    if any(x.dtype != torch.float32 for x in scales):
        return False
    if isinstance(part, FeedForwardPart):
        return True
    a = part.attending
    strides = a.keys.stride()
    if a.keys.dtype not in _FLOATS or a.values.dtype != a.keys.dtype:
        return False
    if strides != a.values.stride() or strides[3] != 1:
        return False
    for place in (a.rows, a.begins, a.starts, a.positions):
        if place is not None and (place.dtype != torch.int64 or not place.is_contiguous()):
            return False
    for table in (a.cos, a.sin):
        if table is not None and (table.dtype != torch.float32 or not table.is_contiguous()):
            return False
    return a.valid is None or (a.valid.dtype == torch.bool and a.valid.is_contiguous())
