"""Attention on NVIDIA GPUs in Triton: chunked cross-attention, the encoder's attentions and packed causal attention.

Which tile, how many warps and stages, and the launch; triton_attention_programs.py has what runs. Of K and V each is read once a
tile of queries, and written gradients once: kernels/traffic.py counts the bytes.
"""

import math
from typing import Any

import torch
import triton
from retro_kernels.dropout import drop_below
from retro_kernels.triton_attention_programs import _attention_backward, _attention_backward_whole, _attention_forward
from torch import Tensor


def is_whole(capability: int, head_width: int, rows: int, is_fp32: bool, is_causal: bool, drops: bool) -> bool:
    """Whether one program computes all gradients of a problem: where its registers hold dQ beside a tile of keys.

    Without wgmma the queries would be in registers too, in several layouts, and spill; so do more rows.
    """
    has_wgmma = 90 <= capability < 120
    most_rows = 128 if head_width <= 64 else 64
    if is_fp32 or is_causal or not has_wgmma or head_width > 128 or rows > most_rows:
        return False
    return not (drops and capability >= 100 and head_width <= 64)  # a few bytes spill there


def tile_of(
    capability: int, head_width: int, rows: int, is_fp32: bool, is_causal: bool, drops: bool, is_backward: bool
) -> dict[str, int]:
    """Query rows and keys of a tile, warps and stages: a static table, no tuning at run time.

    `capability` is 10 x major + minor; `rows` the queries times heads of a problem. tests/gates compiles the entries
    and reads registers, spills and shared memory: two CTAs of a multiprocessor or two stages, and no spills in half precision.
    """
    has_wgmma = 90 <= capability < 120  # or tcgen05; 12x are consumer parts without either
    stages = 2
    if is_backward:
        if is_fp32:
            tile, stages = (32, 32, 8) if head_width <= 64 else (16, 16, 4), 1
        elif is_whole(capability, head_width, rows, is_fp32, is_causal, drops):
            # Where more than dQ is held, few keys at a time: more spill. On 10.0 the sums are in tensor memory.
            is_narrow = head_width <= 64 and rows <= 64 and not drops
            tile = (64, 64, 4 if capability < 100 else 8) if is_narrow else (64 if rows <= 64 else 128, 16, 8)
        elif head_width <= 64:
            tile = (64, 64, 8) if has_wgmma else (32, 16, 4)
        else:
            tile, stages = (32, 32, 8), 2 if head_width <= 128 else 1
    elif is_fp32 or head_width > 128:
        tile, stages = (32, 32, 8 if is_fp32 and head_width > 64 else 4), 1
    else:
        few = is_causal and capability >= 120  # 64 keys spill there
        tile = (64, 32 if few else 64, 4) if head_width <= 64 else (64, 64, 8)
        if rows > 64 and head_width <= 64 and not (is_causal or drops):  # else each 64 rows read all keys again
            tile = (256, 16 if capability >= 120 else 32, 8)
        stages = 3 if capability in (80, 87) or has_wgmma else 2  # the others have 99 KiB of shared memory
    is_one_tile = is_backward and is_whole(
        capability, head_width, rows, is_fp32, is_causal, drops
    )  # smaller ones spill
    BM = tile[0] if is_one_tile else max(16, min(tile[0], triton.next_power_of_2(rows)))
    return {"BM": BM, "BN": tile[1], "num_warps": tile[2], "num_stages": stages}


def constants(
    head_width: int,
    rotated: int,
    num_segments: int,
    group: int,
    is_causal: bool,
    flags: tuple[bool, bool, bool],
    upcast: bool,
    drops: bool = False,
    is_wide: bool = False,
) -> dict[str, Any]:
    """The kernels' constexpr arguments beside the tile: `flags` = key_begins, key_ends, first_keys are given."""
    half = head_width // 2
    names = ("HAS_BEGINS", "HAS_ENDS", "HAS_FIRST")
    return {
        "NUM": num_segments,
        "G": group,
        "P": rotated,
        "HALF": half,
        "EH": max(16, triton.next_power_of_2(half)),
        "E": max(16, triton.next_power_of_2(head_width)),
        "CAUSAL": is_causal,
        **dict(zip(names, flags)),
        "UPCAST": upcast,
        "DROPS": drops,
        "WIDE": is_wide,
    }


def _is_wide(*tensors: Tensor) -> bool:
    """Whether rows of one problem (the tokens of q, o; the keys of a segment) lie 2^31 values apart."""
    return any(x.shape[-3] * abs(x.stride(-3)) >= 2**31 for x in tensors)


def _which(q: Tensor, k: Tensor, problem: Any) -> tuple[int, int, int, bool, bool, bool]:
    """What tile_of chooses by: capability (where this is interpreted that of an H100), head width, rows, fp32, causal, dropout."""
    major, minor = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
    rows = (problem.chunk_length or q.shape[1]) * (q.shape[2] // k.shape[4])
    return 10 * major + minor, q.shape[3], rows, q.dtype == torch.float32, problem.is_causal, problem.dropout > 0


def _launch_arguments(
    q: Tensor, k: Tensor, v: Tensor, problem: Any, is_backward: bool
) -> tuple[dict[str, Any], tuple[int, ...], tuple[int, int], int]:
    """constexprs and options, the scalar sizes, (query tiles, segment tiles) and the number of (b, u) pairs."""
    B, N, H, E = q.shape
    _, L, K, R, G, _ = k.shape
    M, num_queries = problem.chunk_length, problem.chunk_length or N
    flags = (problem.begins is not None, problem.lengths is not None, problem.first_keys is not None)
    rotated = 0 if problem.cos is None else problem.cos.shape[1]
    tile = tile_of(*_which(q, k, problem), is_backward)
    upcast = not q.is_cuda and q.dtype == torch.bfloat16  # interpreted
    drops, is_wide = problem.dropout > 0, _is_wide(q, k, v)
    options = constants(E, rotated, K, H // G, problem.is_causal, flags, upcast, drops, is_wide) | tile
    sizes = (N, L, H, R, num_queries, M, max(0, M - 1), problem.query_offset, problem.query_period or num_queries)
    tiles = (-(-num_queries * (H // G) // tile["BM"]), -(-R // tile["BN"]))
    return options, sizes, tiles, B * L


def _data(problem: Any, like: Tensor) -> tuple[Any, ...]:
    """begins, ends, first_keys, cos, sin and seed (any tensor stands for one that is not given), and how much is dropped."""
    seed = None if problem.seed is None else problem.seed.to(like.device)
    given = (problem.begins, problem.lengths, problem.first_keys, problem.cos, problem.sin, seed)
    tensors = (like if x is None else x.contiguous() for x in given)
    return *tensors, drop_below(problem.dropout), 1 / (1 - problem.dropout)


def _unwritten(like: Tensor) -> Tensor:
    """Of the same shape and type, side by side."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, problem: Any) -> tuple[Tensor, Tensor]:
    """As `cpp.attention_forward`."""
    o, lse = _unwritten(q), torch.empty((q.shape[0], q.shape[2], q.shape[1]), device=q.device)
    if not o.numel() or not k.numel():
        return o.zero_(), lse.fill_(math.inf)
    unattended = max(0, problem.chunk_length - 1)  # the tokens before the first that attends: all others are written
    o[:, :unattended], lse[:, :, :unattended] = 0, math.inf
    options, sizes, (query_tiles, _), pairs = _launch_arguments(q, k, v, problem, False)
    strides = (*q.stride()[:3], *k.stride()[:5], *v.stride()[:5], *o.stride()[:3])
    with torch.cuda.device_of(q):
        _attention_forward[(query_tiles * pairs, k.shape[4])](
            *(q, k, v, o, lse, *_data(problem, lse), problem.scale * math.log2(math.e), *strides, *sizes, query_tiles),
            **options,
        )
    return o, lse


def attention_backward(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, problem: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cpp.attention_backward`."""
    grad_q, grad_k, grad_v = _unwritten(q), _unwritten(k), _unwritten(v)
    if not o.numel() or not k.numel():
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_()
    grad_q[:, : max(0, problem.chunk_length - 1)] = 0
    options, sizes, (query_tiles, segment_tiles), pairs = _launch_arguments(q, k, v, problem, True)
    strides = (*q.stride()[:3], *k.stride()[:5], *v.stride()[:5], *o.stride()[:3], *grad_k.stride()[:5])
    kernel, programs = _attention_backward, query_tiles + k.shape[2] * segment_tiles
    if is_whole(*_which(q, k, problem)):
        kernel, programs = _attention_backward_whole, 1
    with torch.cuda.device_of(q):
        kernel[(programs * pairs, k.shape[4])](
            *(q, k, v, o, grad_o.contiguous(), lse, grad_q, grad_k, grad_v, *_data(problem, lse)),
            *(problem.scale * math.log2(math.e), problem.scale, *strides, *sizes, query_tiles, segment_tiles),
            **options,
        )
    return grad_q, grad_k, grad_v
