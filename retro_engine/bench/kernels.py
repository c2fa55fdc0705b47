"""`bench kernels`: every op against the ways one would write it otherwise, forward and forward + backward.

Reference implementations: eager math, scaled_dot_product_attention (SDPA), batched products (bmm), compiled FlexAttention
(on a CPU with --compile), and on a GPU flash-attn and xformers where they are installed, each with this project's RoPE. Data are random; inputs rotate, so that caches do not lie. Errors are
relative to float64. Letters as in kernels/reference.py.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from retro_kernels import reference
from retro_kernels.attention import attention
from retro_kernels.backend import choose
from retro_kernels.chunked_cross_attention import chunked_cross_attention
from retro_kernels.gather_neighbors import gather_neighbors
from retro_kernels.rope import rope, rope_qk
from torch import Tensor

from retro_engine.bench.frame import Ceilings, Rotation, Row, Work, name_of, peak_of, time_in_turns

ROTATED = 4  # sets of inputs that take turns


def run(device: torch.device, ceilings: Ceilings, dtypes: list[torch.dtype], compiles: bool) -> list[Row]:
    """`compiles`: also alternatives that torch.compile makes, half a minute each."""
    is_gpu = device.type == "cuda"
    rows = []
    for dtype in dtypes:
        rows += _rope(device, dtype, (16, 2048, 12, 64) if is_gpu else (8, 512, 8, 64), ceilings, compiles)
        shapes = [(16, 2048, 12, 64), (8, 2048, 16, 128)] if is_gpu else [(2, 1024, 8, 64)]
        for B, N, H, E in shapes:
            rows += _cross(device, dtype, (B, N, H, E, 64, 2, 128), ceilings, compiles)
        for B, N in [(8, 2048)] if is_gpu else [(8, 256), (2, 512), (1, 2048)]:
            rows += _causal(device, dtype, (B, N, 8, 64), ceilings)
        rows += _short(device, dtype, (512 if is_gpu else 64, 128, 8, 64), ceilings)
    return rows + _gather(device, ceilings)


def _rows(
    case: str, ours: str, works: dict[str, Work], device: torch.device, ceilings: Ceilings, dtype: torch.dtype,
    num_bytes: float, flops: float, bound: str, error: float | None,
) -> list[Row]:  # fmt: skip
    times = time_in_turns(works, device)
    rows = []
    for name, (median, low, high) in times.items():
        gb_s, gflop_s = 1e-9 * num_bytes / median, 1e-9 * flops / median
        share = gb_s / ceilings.copy_gb_s if bound == "copy" else gflop_s / ceilings.matmul_gflop_s[name_of(dtype)]
        row = Row("kernels", case, name, median, low, high, gb_s, gflop_s or None, bound, share)
        row.peak_mib = peak_of(works[name], device)
        if name == "ours":
            row.implementation = f"ours ({ours})"
            row.ratios = {other: t[0] / median for other, t in times.items() if other != "ours"}
            row.error = error
        rows.append(row)
    return rows


def _tables(positions: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    angle = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    return angle.cos().to(device), angle.sin().to(device)


def _error(function: Callable[..., Any], *tensors: Tensor) -> float:
    """Largest relative error of output and gradients against float64."""

    def values(inputs: list[Tensor]) -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = function(*inputs)
        out = out[0] if isinstance(out, tuple) else out
        slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        return [out.detach(), *(g for g in torch.autograd.grad(out, inputs, slope, allow_unused=True) if g is not None)]

    exact = values([x.double() for x in tensors])
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(values(list(tensors)), exact))


def _both(function: Callable[..., Any], sets: list[list[Tensor]], slope: Tensor) -> Work:
    """Forward and backward on inputs that take turns."""
    return Rotation(lambda inputs: torch.autograd.grad(function(*inputs), inputs, slope), sets)


def _forward(function: Callable[..., Any], sets: list[list[Tensor]]) -> Work:
    def forward(inputs: list[Tensor]) -> Any:
        with torch.no_grad():
            return function(*(x.detach() for x in inputs))  # FlexAttention on a CPU refuses what could take gradients

    return Rotation(forward, sets)


def _sets(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[list[Tensor]]:
    return [[torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes] for _ in range(ROTATED)]


def _rope(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], ceilings: Ceilings, compiles: bool
) -> list[Row]:
    B, N, H, E = shape
    sets = _sets(device, dtype, shape, shape)
    cos, sin = _tables(N, E, device)
    ours = lambda q, k: rope_qk(q, k, cos, sin)  # noqa: E731
    eager = lambda q, k: (reference.rope(q, cos, sin), reference.rope(k, cos, sin))  # noqa: E731
    works = {"ours": _forward(ours, sets), "eager": _forward(eager, sets)}
    works["clone"] = _forward(lambda q, k: (q.clone(), k.clone()), sets)  # the limit: the same bytes, only copied
    if compiles:
        works["torch.compile"] = _forward(torch.compile(eager), sets)
    num_bytes = 4 * B * N * H * E * sets[0][0].element_size()
    error = _error(lambda q, k: rope_qk(q, k, cos, sin), *(x[:1, :64] for x in sets[0]))
    case = f"rope q and k {name_of(dtype)} {B}x{N}x{H}x{E}"
    return _rows(case, choose("rope", *sets[0]), works, device, ceilings, dtype, num_bytes, 0, "copy", error)


def libraries(device: torch.device, dtype: torch.dtype, compiles: bool) -> dict[str, Callable[..., Tensor]]:
    """Other libraries' attention of [b, n, h, e] and [b, s, h, e], of those that are installed and run here."""
    found: dict[str, Callable[..., Tensor]] = {}
    if compiles:
        from torch.nn.attention.flex_attention import flex_attention

        flex = torch.compile(flex_attention)
        found["FlexAttention"] = lambda *qkv: flex(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)
    if device.type == "cuda" and dtype != torch.float32 and importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_func

        found["flash-attn"] = flash_attn_func
    if device.type == "cuda" and importlib.util.find_spec("xformers"):
        from xformers.ops import memory_efficient_attention

        found["xformers"] = memory_efficient_attention
    return found


def _cross(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], ceilings: Ceilings, compiles: bool
) -> list[Row]:
    B, N, H, E, M, K, R = shape
    L = N // M
    sets = _sets(device, dtype, (B, N, H, E), (B, L, K, R, H, E), (B, L, K, R, H, E))
    full, half = (torch.full((B, L, K), length, device=device) for length in (R, R // 2))
    cos, sin = _tables(max(2 * M, R), E, device)
    scale, slope = E**-0.5, torch.randn(B, N, H, E, device=device).to(dtype)

    def ours(lengths: Tensor) -> Callable[..., Any]:
        return lambda q, k, v: chunked_cross_attention(q, k, v, lengths, M, cos, sin)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.chunked_cross_attention(q, k, v, full, M, cos, sin, scale, M - 1)

    def bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tail = L * M - (N - M + 1)
        q = F.pad(q[:, M - 1 :], (0, 0, 0, 0, 0, tail)).reshape(B * L, M, H, E)
        q = reference.rope(q, cos, sin, torch.arange(M - 1, 2 * M - 1, device=device)).transpose(1, 2)
        k = reference.rope(k.reshape(B * L * K, R, H, E), cos, sin).reshape(B * L, K * R, H, E).permute(0, 2, 3, 1)
        score = (q @ k).float() * scale
        valid = (torch.arange(R, device=device) < full.reshape(-1, 1)).reshape(B * L, 1, 1, K * R)
        weight = score.masked_fill(~valid, -torch.inf).softmax(-1).to(q.dtype)
        out = (weight @ v.reshape(B * L, K * R, H, E).transpose(1, 2)).transpose(1, 2).reshape(B, L * M, H, E)
        return F.pad(out[:, : L * M - tail], (0, 0, 0, 0, M - 1, 0))

    def blocks(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated [b l, m, h, e] and twice [b l, K r, h, e]: what a library of attention kernels is given."""
        q = F.pad(q[:, M - 1 :], (0, 0, 0, 0, 0, M - 1)).reshape(B * L, M, H, E)
        q = rope(q, cos, sin, torch.arange(M - 1, 2 * M - 1, device=device))
        k = rope(k.reshape(B * L * K, R, H, E), cos, sin)
        return q, k.reshape(B * L, K * R, H, E), v.reshape(B * L, K * R, H, E)

    def whole(out: Tensor) -> Tensor:
        return F.pad(out.reshape(B, L * M, H, E)[:, : N - M + 1], (0, 0, 0, 0, M - 1, 0))

    others = {
        name: lambda q, k, v, f=function: whole(f(*blocks(q, k, v)))
        for name, function in libraries(device, dtype, compiles).items()
    }
    small = [x[:1, : 4 * M] if x.dim() == 4 else x[:1, :4] for x in sets[0]]
    error = _error(lambda q, k, v: chunked_cross_attention(q, k, v, half[:1, :4], M, cos, sin), *small)
    name = choose("chunked_cross_attention", *sets[0])
    num_bytes = (2 * B * N + 2 * B * L * K * R) * H * E * sets[0][0].element_size()
    flops = 4 * B * L * H * M * K * R * E
    bound = "copy" if device.type == "cuda" else "matmul"
    text = f"chunked cross-attention {name_of(dtype)} {B}x{N}x{H}x{E}"
    forward = {"ours": _forward(ours(full), sets), "SDPA": _forward(sdpa, sets), "bmm": _forward(bmm, sets)}
    both = {"ours": _both(ours(full), sets, slope), "SDPA": _both(sdpa, sets, slope), "bmm": _both(bmm, sets, slope)}
    forward |= {name: _forward(function, sets) for name, function in others.items()}
    if device.type == "cuda":  # FlexAttention has no backward pass on a CPU
        both |= {name: _both(function, sets, slope) for name, function in others.items()}
    both["ours, half padded"] = _both(ours(half), sets, slope)
    rows = _rows(f"{text} fwd", name, forward, device, ceilings, dtype, num_bytes, flops, bound, error)
    return rows + _rows(
        f"{text} fwd+bwd", name, both, device, ceilings, dtype, 3 * num_bytes, 3.5 * flops, bound, error
    )


def _self(
    case: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], ceilings: Ceilings, is_causal: bool
) -> list[Row]:
    B, N, H, E = shape
    sets = _sets(device, dtype, shape, shape, shape)
    slope = torch.randn(shape, device=device).to(dtype)
    ours = lambda q, k, v: attention(q, k, v, is_causal=is_causal)  # noqa: E731

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2)

    error = _error(ours, *(x[:1] for x in sets[0]))
    flops = 3.5 * 4 * B * H * N * N * E / (2 if is_causal else 1)
    works = {"ours": _both(ours, sets, slope), "SDPA": _both(sdpa, sets, slope)}
    num_bytes = 12 * B * N * H * E * sets[0][0].element_size()
    text = f"{case} {name_of(dtype)} {B}x{N}x{H}x{E} fwd+bwd"
    return _rows(text, choose("attention", *sets[0]), works, device, ceilings, dtype, num_bytes, flops, "matmul", error)


def _causal(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], ceilings: Ceilings) -> list[Row]:
    return _self("causal self-attention", device, dtype, shape, ceilings, True)


def _short(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], ceilings: Ceilings) -> list[Row]:
    return _self("encoder self-attention", device, dtype, shape, ceilings, False)


def _gather(device: torch.device, ceilings: Ceilings) -> list[Row]:
    rows, M, R, count = 200_000, 64, 128, 20_000
    table = torch.randint(0, 30_000, (rows, M), device=device).int()
    document = torch.arange(rows, device=device) // 10
    lengths = torch.full((rows,), M, device=device)
    sets = [[torch.randint(-1, rows, (count,), device=device)] for _ in range(ROTATED)]
    works = {
        "ours": _forward(lambda ids: gather_neighbors(table, document, lengths, ids, R), sets),
        "eager": _forward(lambda ids: reference.gather_neighbors(table, document, lengths, ids, R, 0), sets),
    }
    case, name = f"gather neighbors {count} of {rows} rows", choose("gather_neighbors", sets[0][0])
    return _rows(case, name, works, device, ceilings, torch.float32, 8 * count * R, 0, "copy", 0.0)
