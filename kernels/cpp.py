"""The C++ kernels on CPU tensors (csrc/cpu): checks types, hands over tensors, strides and sizes in the order of module.cpp.

The instruction set is the best that the processor has; RETRO_CPU (scalar, avx2, avx512, avx512_bf16, avx512_amx) forces one.
Shape letters: B batch, N tokens, H query heads, G key/value heads, E head width, L chunks, K neighbors, R keys.
"""

import ctypes
import functools
import math
import os
from dataclasses import dataclass
from pathlib import Path

import retro_kernels
import torch
from retro_kernels.blocks import TYPES as BLOCK_TYPES
from retro_kernels.dropout import drop_below
from retro_kernels.reference import CrossAttentionPart, FeedForwardPart, Matrix, Norm, Part, SelfAttentionPart
from torch import Tensor

try:
    from retro_kernels import _cpu
except ImportError:  # no compiler at installation
    _cpu = None
else:  # an editable installation's hook offers its own to every other
    folders = [os.path.realpath(folder) for folder in retro_kernels.__path__]
    _cpu = _cpu if os.path.dirname(os.path.realpath(_cpu.__file__)) in folders else None

_ACTIVATIONS = {"gelu": 1, "gelu_tanh": 2, "swiglu": 3}
_PRIMITIVES = {"gelu": 1, "gelu_tanh": 2, "silu": 3, "exp2": 4, "erf": 5, "sigmoid": 6, "bfloat16": 7}
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_BLOCKS = 16  # and ggml's number of a type of blocks


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
        torch_cpu = ctypes.CDLL(str(library))
        named = [getattr(torch_cpu, name, None) for name in ("torch_parallel_for", "torch_get_num_threads")]
        functions = [ctypes.cast(function, ctypes.c_void_p).value for function in named if function is not None]
        if len(functions) == len(named):
            _cpu.set_threads(*functions)
    builds = instruction_sets()
    forced = os.environ.get("RETRO_CPU")
    if forced is not None and forced not in builds:
        raise ValueError(f"RETRO_CPU={forced}: this processor has {', '.join(builds)}\n  unset RETRO_CPU")
    return forced or builds[0]


def multiplies_bf16() -> bool:
    """Whether the build in use multiplies pairs of bfloat16."""
    return instruction_set() in ("avx512_bf16", "avx512_amx")


@dataclass(kw_only=True)
class Problem:
    """Everything of an attention but the tensors with gradients. chunk_length 0 = every query sees all keys."""

    lengths: Tensor | None = None  # [b, l, K] or [b]: keys that are valid
    begins: Tensor | None = None  # the same shape: keys before it are masked
    first_keys: Tensor | None = None  # [b, n]: keys before it are masked for that query
    cos: Tensor | None = None
    sin: Tensor | None = None
    seed: Tensor | None = None  # int64, of the hash that says which weights are dropped
    chunk_length: int = 0
    is_causal: bool = False
    query_offset: int = 0
    query_period: int = 0  # 0 = one period
    scale: float = 1.0
    dropout: float = 0.0


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
    position_stride = N if positions is not None and positions.dim() == 2 else 0
    sizes = (_TYPES[y.dtype], B, N, H, E, cos.shape[1], *x_BNHE.stride()[:3], *y.stride()[:3])
    if y.numel():
        _cpu.rope(
            instruction_set(), *sizes, x_BNHE, y, cos, sin, cos.shape[0], place, position_stride, interleaved, inverse
        )
    return y


def gather_neighbors(
    table: Tensor, document: Tensor, row_lengths: Tensor, ids: Tensor, retrieved_length: int, pad_id: int
) -> tuple[Tensor, Tensor]:
    """As `reference.gather_neighbors`; an id outside the table gives length 0."""
    dtype = torch.int64 if table.dtype == torch.uint16 else table.dtype
    tokens = torch.empty((*ids.shape, retrieved_length), dtype=dtype)
    lengths = torch.empty(ids.shape, dtype=torch.int64)
    tensors = (table.contiguous(), document.int().contiguous(), row_lengths.int().contiguous(), ids.long().contiguous())
    sizes = (table.element_size(), ids.numel(), *table.shape, retrieved_length, pad_id)
    _cpu.gather_neighbors(instruction_set(), *sizes, *tensors, tokens, lengths)
    return tokens, lengths


def cross_entropy_(logits_TV: Tensor, labels_T: Tensor, has_gradient: bool) -> Tensor:
    """As `reference.cross_entropy_`; contiguous."""
    losses, labels = torch.empty(logits_TV.shape[0]), labels_T.contiguous()
    _cpu.cross_entropy(
        instruction_set(), _TYPES[logits_TV.dtype], *logits_TV.shape, logits_TV, labels, losses, has_gradient
    )
    return losses


def linear(x_TD: Tensor, matrix: Matrix) -> Tensor:
    """float32, contiguous -> [t, o]."""
    y = torch.empty(x_TD.shape[0], matrix.shape[0])
    if y.numel():
        _cpu.linear(instruction_set(), x_TD.shape[0], *_matrix(matrix), x_TD, y)
    return y


def has_matrix_unit() -> bool:
    """Whether the build in use multiplies in one (AMX)."""
    return instruction_set() == "avx512_amx"


def many_rows(x_TD: Tensor, matrix: Matrix) -> Tensor:
    """float32, contiguous -> [t, o], by the matrix unit; 16 outputs or more, weights in blocks or int8 [o, a multiple of 32]."""
    y = torch.empty(x_TD.shape[0], matrix.shape[0])
    if y.numel():
        _cpu.many_rows(instruction_set(), x_TD.shape[0], *_matrix(matrix), x_TD, y)
    return y


def widened(weight_OD: Tensor, scale_O: Tensor, out: Tensor) -> Tensor:
    """int8 [o, d] times float32 [o] -> bfloat16 [o, d] at the beginning of `out`, all contiguous."""
    outputs, D = weight_OD.shape
    y = out[: outputs * D].view(outputs, D)
    _cpu.widen(instruction_set(), outputs, D, weight_OD, scale_O, y)
    return y


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x [..., d], contiguous -> the same shape."""
    y, D = torch.empty_like(x), x.shape[-1]
    _cpu.norm(instruction_set(), _TYPES[x.dtype], *_norm(Norm(weight, None, eps, is_rms=True), D), x.numel() // D, x, y)
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Contiguous -> the same shape."""
    y = torch.empty_like(gate)
    _cpu.swiglu(instruction_set(), _TYPES[y.dtype], y.numel(), gate, up, y)
    return y


def to_blocks(values: Tensor, kind: str) -> Tensor:
    """As `blocks.round_to_blocks`; contiguous."""
    out = torch.empty(len(values), BLOCK_TYPES[kind].bytes, dtype=torch.uint8)
    _cpu.to_blocks(instruction_set(), _BLOCKS + BLOCK_TYPES[kind].number, values, out, len(values))
    return out


def primitive(name: str, x: Tensor) -> Tensor:
    """A function that the kernels compute themselves (`bfloat16` rounds to it), of float32: so that all of its domain is tested."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _cpu.apply(instruction_set(), _PRIMITIVES[name], x, y, x.numel())
    return y


def new_steps(parts: tuple[Part, ...]) -> object:
    """What `steps` takes; holds addresses, not the memory."""
    return _cpu.Steps(instruction_set(), [_part(part) for part in parts])


def steps(made: object, x_BD: Tensor, first: int, last: int) -> Tensor:
    """`reference.step` of parts first ... last - 1; float32, contiguous."""
    y = torch.empty_like(x_BD)
    made.run(x_BD.data_ptr(), y.data_ptr(), x_BD.shape[0], first, last)  # type: ignore[attr-defined]
    return y


def _part(part: Part) -> tuple[object, ...]:
    norm = _norm(part.norm, (part.up if isinstance(part, FeedForwardPart) else part.q).shape[1])
    if isinstance(part, FeedForwardPart):
        gate = (0, 0, 0, 0, None, None, None) if part.gate is None else _matrix(part.gate)
        return 2, *norm, *gate, *_matrix(part.up), *_matrix(part.down), _ACTIVATIONS[part.activation]
    attending = _attending(part)
    if isinstance(part, CrossAttentionPart):
        return 1, *norm, *_matrix(part.q), *_matrix(part.out), *attending, part.adds_bias
    matrices = (*_matrix(part.q), *_matrix(part.k), *_matrix(part.v), *_matrix(part.out))
    return 0, *norm, *matrices, *attending, False


def _matrix(m: Matrix) -> tuple[object, ...]:
    kind = _TYPES[m.weight.dtype] if m.blocks is None else _BLOCKS + BLOCK_TYPES[m.blocks].number
    return kind, 0 if m.bias is None else _TYPES[m.bias.dtype], *m.shape, m.weight, m.bias, m.scale


def _norm(norm: Norm, width: int) -> tuple[object, ...]:
    weight_type = 0 if norm.weight is None else _TYPES[norm.weight.dtype]
    return width, norm.is_rms, weight_type, norm.weight, norm.bias, norm.eps


def _attending(part: SelfAttentionPart | CrossAttentionPart) -> tuple[object, ...]:
    a = part.attending
    rows, S, G, E = a.keys.shape
    positions, pairs = (0, 0) if a.cos is None else a.cos.shape
    sizes = (a.count, part.q.shape[0] // E, G, E, pairs)
    cache = (_TYPES[a.keys.dtype], a.keys, a.values, rows, *a.keys.stride()[:3], S)
    places = (a.rows, a.begins, a.starts, a.valid, a.positions)
    return *sizes, *cache, *places, a.cos, a.sin, positions, a.interleaved, a.scale


def attention_forward(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """q [b, n, h, e], k and v [b, l, K, r, g, e] -> o like q and the log-sum-exp [b, h, n] in log2 units.

    What no query writes is 0 in o and +inf in the log-sum-exp.
    """
    o = _queries_room(q, k, problem)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("inf"))
    if o.numel() and k.numel():
        _attention(q, k, v, o, lse, problem, (None,) * 4)
    return o, lse


def attention_backward(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, problem: Problem
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; deterministic."""
    grad_q = _queries_room(q, k, problem)
    grad_k, grad_v = torch.empty(k.shape, dtype=k.dtype), torch.empty(k.shape, dtype=k.dtype)
    if o.numel() and k.numel():
        _attention(q, k, v, o, lse, problem, (grad_o.contiguous(), grad_q, grad_k, grad_v))
    else:
        grad_k.zero_()
        grad_v.zero_()
    return grad_q, grad_k, grad_v


def _queries_room(q: Tensor, k: Tensor, problem: Problem) -> Tensor:
    """Where a number is written for each of q's; zeros where no query attends, before the first chunk's end."""
    if not q.numel() or not k.numel():
        return torch.zeros(q.shape, dtype=q.dtype)
    x = torch.empty(q.shape, dtype=q.dtype)
    x[:, : max(0, problem.chunk_length - 1)] = 0
    return x


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    problem: Problem,
    gradients: tuple[Tensor | None, ...],
) -> None:
    """`gradients`: of o, q, k and v; None = forward."""
    B, N, H, E = q.shape
    _, L, K, R, G, _ = k.shape
    M, num_queries = problem.chunk_length, problem.chunk_length or N
    cos, sin = _table(problem.cos), _table(problem.sin)
    grad_k = k if gradients[2] is None else gradients[2]
    sizes = (_TYPES[q.dtype], B, L, G, H // G, E, N, num_queries, M, max(0, M - 1), K, R)
    strides = (*q.stride()[:3], *o.stride()[:3], *k.stride()[:5], *v.stride()[:5], *grad_k.stride()[:5])
    ranges = (*(_integers(x) for x in (problem.lengths, problem.begins, problem.first_keys)), problem.is_causal)
    pairs = 0 if cos is None else cos.shape[1]
    rotation = (cos, sin, pairs, problem.query_offset, problem.query_period or num_queries)
    seed = int(problem.seed) if problem.dropout and problem.seed is not None else 0
    dropout = (drop_below(problem.dropout), seed & 0xFFFFFFFF, seed >> 32, 1 / (1 - problem.dropout))
    tensors = (q, k, v, o, lse)
    parts = _parts(B * L * G, num_queries * (H // G))
    _cpu.attention(
        instruction_set(), *sizes, *strides, *tensors, *ranges, *rotation, problem.scale, *dropout, parts, *gradients
    )


def _parts(problems: int, rows: int) -> int:
    """Items that each problem's queries are cut into, so that every thread has as much to do: each packs the keys anew."""
    threads = torch.get_num_threads()
    enough = threads // math.gcd(problems, threads) if problems < 4 * threads else 1
    return max(1, min(enough, rows // 128))


def _table(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().to("cpu", torch.float32).contiguous()


def _integers(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().to(torch.int64).contiguous()
