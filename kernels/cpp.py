"""The C++ kernels on CPU tensors (csrc/cpu): checks types, hands over addresses, strides and sizes.

The instruction set is the best that the processor has; RETRO_CPU (scalar, avx2, avx512, avx512_bf16) forces one.
Shape letters: B batch, N tokens, H query heads, G key/value heads, E head width, L chunks, K neighbors, R keys.
"""

import ctypes
import functools
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from retro_kernels.dropout import drop_below
from retro_kernels.reference import CrossAttention, FeedForward, Matrix, Part, SelfAttention
from torch import Tensor

try:
    from retro_kernels import _cpu
except ImportError:  # no compiler at installation
    _cpu = None

_ACTIVATIONS = {"gelu": 1, "gelu_tanh": 2, "swiglu": 3}
_PRIMITIVES = {"gelu": 1, "gelu_tanh": 2, "silu": 3, "exp2": 4, "erf": 5, "sigmoid": 6, "bfloat16": 7}
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


def is_available() -> bool:
    """Whether the extension was built."""
    return _cpu is not None


def instruction_sets() -> list[str]:
    """The builds that this processor can run, best first; none where the extension was not built."""
    return _cpu.builds() if _cpu is not None else []


@functools.cache
def instruction_set() -> str:
    """The build in use. Raises ValueError when RETRO_CPU names one that this processor has not."""
    assert _cpu is not None
    library = next(Path(torch.__file__).parent.glob("lib/*torch_cpu.*"), None)
    if library is not None:
        function = getattr(ctypes.CDLL(str(library)), "torch_parallel_for", None)
        if function is not None:
            _cpu.set_parallel_for(ctypes.cast(function, ctypes.c_void_p).value)
    builds = instruction_sets()
    forced = os.environ.get("RETRO_CPU")
    if forced is not None and forced not in builds:
        raise ValueError(f"RETRO_CPU={forced}: this processor has {', '.join(builds)}\n  unset RETRO_CPU")
    return forced or builds[0]


def multiplies_bf16() -> bool:
    """Whether the build in use multiplies pairs of bfloat16."""
    return instruction_set() == "avx512_bf16"


@dataclass
class Problem:
    """Everything of an attention but the tensors with gradients. chunk_length 0 = every query sees all keys."""

    chunk_length: int = 0
    lengths: Tensor | None = None  # [b, l, K] or [b]: keys that are valid
    begins: Tensor | None = None  # the same shape: keys before it are masked
    first_keys: Tensor | None = None  # [b, n]: keys before it are masked for that query
    is_causal: bool = False
    cos: Tensor | None = None
    sin: Tensor | None = None
    query_offset: int = 0
    query_period: int = 0  # 0 = one period
    scale: float = 1.0
    dropout: float = 0.0
    seed: Tensor | None = None  # int64, of the hash that says which weights are dropped


def rope_qk(
    q_BNHE: Tensor, k_BNGE: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q and k rotated, or rotated back; k may have no heads."""
    q_out = _rope(q_BNHE, cos, sin, positions, interleaved, inverse)
    return q_out, _rope(k_BNGE, cos, sin, positions, interleaved, inverse)


def _rope(
    x_BNHE: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> Tensor:
    B, N, H, E = x_BNHE.shape
    y = torch.empty((B, N, H, E), dtype=x_BNHE.dtype)
    cos, sin, place = cos.detach().float().contiguous(), sin.detach().float().contiguous(), _integers(positions)
    stride = N if positions is not None and positions.dim() == 2 else 0
    sizes = (B, N, H, E, cos.shape[1], cos.shape[0], stride, int(interleaved), int(inverse))
    if y.numel():
        addresses = (x_BNHE.data_ptr(), y.data_ptr(), cos.data_ptr(), sin.data_ptr(), _address(place))
        _cpu.rope(instruction_set(), _TYPES[y.dtype], sizes, (*x_BNHE.stride()[:3], *y.stride()[:3]), addresses)
    return y


def gather_neighbors(
    table: Tensor, document: Tensor, row_lengths: Tensor, ids: Tensor, retrieved_length: int, pad_id: int
) -> tuple[Tensor, Tensor]:
    """As `reference.gather_neighbors`; an id outside the table gives length 0."""
    dtype = torch.int64 if table.dtype == torch.uint16 else table.dtype
    tokens = torch.empty((*ids.shape, retrieved_length), dtype=dtype)
    lengths = torch.empty(ids.shape, dtype=torch.int64)
    tensors = (table.contiguous(), document.int().contiguous(), row_lengths.int().contiguous(), ids.long().contiguous())
    addresses = [tensor.data_ptr() for tensor in (*tensors, tokens, lengths)]
    sizes = (table.element_size(), ids.numel(), *table.shape, retrieved_length, pad_id)
    _cpu.gather_neighbors(instruction_set(), sizes, addresses)
    return tokens, lengths


def cross_entropy_(logits_TV: Tensor, labels_T: Tensor, has_gradient: bool) -> Tensor:
    """As `reference.cross_entropy_`; contiguous."""
    losses, labels = torch.empty(logits_TV.shape[0]), labels_T.contiguous()
    addresses = (logits_TV.data_ptr(), labels.data_ptr(), losses.data_ptr())
    sizes = (*logits_TV.shape, int(has_gradient))
    _cpu.cross_entropy(instruction_set(), _TYPES[logits_TV.dtype], sizes, addresses)
    return losses


def linear(x_TD: Tensor, matrix: Matrix) -> Tensor:
    """float32, contiguous -> [t, o]."""
    y = torch.empty(x_TD.shape[0], matrix.weight.shape[0])
    if y.numel():
        _cpu.linear(instruction_set(), [x_TD.shape[0], x_TD.data_ptr(), y.data_ptr(), *_matrix(matrix)])
    return y


def primitive(name: str, x: Tensor) -> Tensor:
    """A function that the kernels compute themselves (`bfloat16` rounds to it), of float32: so that all of its domain is tested."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _cpu.apply(instruction_set(), _PRIMITIVES[name], (x.data_ptr(), y.data_ptr()), x.numel())
    return y


def new_steps(parts: tuple[Part, ...]) -> object:
    """What `steps` takes; holds addresses, not the memory."""
    fields, factors = zip(*(_part(part) for part in parts))
    return _cpu.Steps(instruction_set(), fields, factors)


def steps(made: object, x_BD: Tensor, first: int, last: int) -> Tensor:
    """`reference.step` of parts first ... last - 1; float32, contiguous."""
    y = torch.empty_like(x_BD)
    made.run(x_BD.data_ptr(), y.data_ptr(), x_BD.shape[0], first, last)  # type: ignore[attr-defined]
    return y


def _part(part: Part) -> tuple[list[int], tuple[float, float]]:
    """The fields of a part, kind first, as csrc/cpu/module.cpp reads them; its norm's eps and its scale."""
    if isinstance(part, FeedForward):
        gate = (0,) * 7 if part.gate is None else _matrix(part.gate)
        activation = _ACTIVATIONS[part.activation]
        return [2, activation, *_norm(part), *gate, *_matrix(part.up), *_matrix(part.down)], (part.norm.eps, 0.0)
    attending, factors = _attending(part), (part.norm.eps, part.attending.scale)
    if isinstance(part, CrossAttention):
        return [1, int(part.adds_bias), *_norm(part), *_matrix(part.q), *_matrix(part.out), *attending], factors
    matrices = (*_matrix(part.q), *_matrix(part.k), *_matrix(part.v), *_matrix(part.out))
    return [0, *_norm(part), *matrices, *attending], factors


def _matrix(m: Matrix) -> tuple[int, ...]:
    bias_type = 0 if m.bias is None else _TYPES[m.bias.dtype]
    addresses = (m.weight.data_ptr(), _address(m.bias), _address(m.scale))
    return (_TYPES[m.weight.dtype], bias_type, *m.weight.shape, *addresses)


def _norm(part: Part) -> tuple[int, ...]:
    norm, width = part.norm, (part.up if isinstance(part, FeedForward) else part.q).weight.shape[1]
    weight_type = 0 if norm.weight is None else _TYPES[norm.weight.dtype]
    return (width, int(norm.is_rms), weight_type, _address(norm.weight), _address(norm.bias))


def _attending(part: SelfAttention | CrossAttention) -> tuple[int, ...]:
    a = part.attending
    B, S, G, E = a.keys.shape
    positions, pairs = (0, 0) if a.cos is None else a.cos.shape
    heads = part.q.weight.shape[0] // E
    sizes = (B, heads, G, E, pairs, int(a.interleaved), _TYPES[a.keys.dtype], *a.keys.stride()[:3])
    ranges = (_address(a.begins), _address(a.starts), _address(a.valid), _address(a.positions))
    tables = (_address(a.cos), _address(a.sin))
    return (*sizes, S, positions, a.keys.data_ptr(), a.values.data_ptr(), *ranges, *tables)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """q [b, n, h, e], k and v [b, l, K, r, g, e] -> o like q and the log-sum-exp [b, h, n] in log2 units.

    What no query writes is 0 in o and +inf in the log-sum-exp.
    """
    o = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("inf"))
    if o.numel() and k.numel():
        _call(q, k, v, o, lse, problem, ())
    return o, lse


def attention_backward(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, problem: Problem
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; deterministic."""
    grad_q = torch.zeros(q.shape, dtype=q.dtype)
    grad_k, grad_v = torch.empty(k.shape, dtype=k.dtype), torch.empty(k.shape, dtype=k.dtype)
    if o.numel() and k.numel():
        _call(q, k, v, o, lse, problem, (grad_o.contiguous(), grad_q, grad_k, grad_v))
    else:
        grad_k.zero_()
        grad_v.zero_()
    return grad_q, grad_k, grad_v


def _call(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, problem: Problem, gradients: tuple[Tensor, ...]
) -> None:
    B, N, H, E = q.shape
    _, L, K, R, G, _ = k.shape
    M, num_queries = problem.chunk_length, problem.chunk_length or N
    cos, sin = _table(problem.cos), _table(problem.sin)
    sizes = (
        *(B, L, G, H // G, E, N, num_queries, M, max(0, M - 1), K, R),
        *(0 if cos is None else cos.shape[1], problem.query_offset, problem.query_period or num_queries),
        int(problem.is_causal),
    )
    grad_kv = gradients[2] if gradients else k
    strides = (*q.stride()[:3], *o.stride()[:3], *k.stride()[:5], *v.stride()[:5], *grad_kv.stride()[:5])
    integers = [_integers(x) for x in (problem.lengths, problem.begins, problem.first_keys)]
    tensors = (q, k, v, o, lse, *integers, cos, sin)
    addresses = [_address(tensor) for tensor in (*tensors, *gradients)]
    seed = int(problem.seed) if problem.dropout and problem.seed is not None else 0
    dropout = (drop_below(problem.dropout), seed & 0xFFFFFFFF, seed >> 32)
    factors = (problem.scale, 1 / (1 - problem.dropout))
    _cpu.attention(instruction_set(), _TYPES[q.dtype], sizes, factors, dropout, strides, addresses)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _table(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().to("cpu", torch.float32).contiguous()


def _integers(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().to(torch.int64).contiguous()
