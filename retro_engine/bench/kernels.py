"""`bench kernels`: every op against the ways one would write it otherwise, forward and forward + backward.

Reference implementations: eager math, scaled_dot_product_attention (SDPA), batched products (bmm), compiled FlexAttention
(on a CPU with --compile), and on a GPU torch's varlen attention, flash-attn (dense and varlen) and xformers where they are there,
each with this project's RoPE, and SDPA compiled together with RoPE and the shift; for products of a few rows (a step of
decoding) torch's own, and reading the weights. An alternative that fails here is named and left out. Data are random; inputs
rotate, so that caches do not lie. Errors are relative to float64. Letters as in kernels/reference.py.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from retro_kernels import reference
from retro_kernels.attention import attention
from retro_kernels.backend import choose
from retro_kernels.chunked_cross_attention import chunked_cross_attention
from retro_kernels.cross_entropy import cross_entropy_
from retro_kernels.gather_neighbors import gather_neighbors
from retro_kernels.linear import linear
from retro_kernels.norm import rms_norm
from retro_kernels.rope import rope, rope_qk
from retro_kernels.swiglu import swiglu
from torch import Tensor

from retro_engine.bench.ceilings import Ceilings, measure_ceilings
from retro_engine.bench.frame import (
    Measured,
    Options,
    Rotation,
    Row,
    Target,
    Work,
    at_least,
    at_most,
    compared,
    time_in_turns,
)
from retro_engine.bench.machine import name_of, peak_of
from retro_engine.errors import UsageError

ROTATED = 4  # sets of inputs that take turns
PARTS = ("rope", "cross", "self", "gather", "rows", "products")
PADDED = "ours, half padded"
OUTPUTS, INPUTS, BYTES = 3072, 768, 230_000_000  # of products of a few rows: so much memory that no cache holds it


@dataclass(frozen=True)
class On:
    """Where and in what the ops are measured."""

    device: torch.device
    dtype: torch.dtype
    ceilings: Ceilings
    compiles: bool

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"


def run(options: Options) -> Measured:
    parts = options.parts or PARTS
    if wrong := [part for part in parts if part not in PARTS]:
        raise UsageError(
            f"{', '.join(wrong)}: no part of `bench kernels`", f"it has {', '.join(PARTS)}", "take of these"
        )
    if options.device.type == "cpu" and torch.float16 in options.dtypes:
        raise UsageError("--dtype fp16 on a CPU", "plain PyTorch computes it there, not our kernels", "fp32 or bf16")
    ceilings = measure_ceilings(options.device, options.dtypes)
    rates = ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in ceilings.matmul_gflop_s.items())
    print(f"ceilings: copy {ceilings.copy_gb_s:.1f} GB/s, matmul {rates}")
    rows: list[Row] = []
    for dtype in options.dtypes:
        on = On(options.device, dtype, ceilings, options.compiles)
        if "rope" in parts:
            rows += _rope(on, (16, 2048, 12, 64) if on.is_gpu else (8, 512, 8, 64))
        if "cross" in parts:
            for B, N, H, E in [(16, 2048, 12, 64), (8, 2048, 16, 128)] if on.is_gpu else [(2, 1024, 8, 64)]:
                rows += _cross(on, (B, N, H, E, 64, 2, 128))
        if "self" in parts:
            for B, N in [(8, 2048)] if on.is_gpu else [(8, 256), (2, 512), (1, 2048)]:
                rows += _self("causal self-attention", on, (B, N, 8, 64), is_causal=True)
            rows += _self("encoder self-attention", on, (512 if on.is_gpu else 64, 128, 8, 64), is_causal=False)
        if "rows" in parts:
            rows += _rows_alone(on)
    if "gather" in parts:
        rows += _gather(On(options.device, torch.float32, ceilings, options.compiles))
    is_gpu = options.device.type == "cuda"
    if not is_gpu and "products" in parts:
        rows += [row for kind in (torch.float32, torch.bfloat16, torch.int8) for row in _products(kind)]
    return Measured(rows, targets(rows, is_gpu), {"ceilings": asdict(ceilings)})


def targets(rows: list[Row], is_gpu: bool) -> list[Target]:
    """Of README and docs/kernels.md; on a GPU what the kernels were designed for. Times as fast, where nothing else is said."""
    out = []
    for row in rows:
        case, took = row.case, row.ratios
        best = min((ratio for name, ratio in took.items() if name != PADDED), default=None)
        if not took:
            continue
        if case.startswith("rope"):
            out.append(at_least(f"{case}: against eager math", took["eager"], 8 if is_gpu else 4))
            out.append(at_least(f"{case}: share of what copying takes", took["clone"], 0.9 if is_gpu else 0.8))
            if is_gpu:
                out.append(at_least(f"{case}: against torch.compile", took["torch.compile"], 1))
        elif case.startswith("chunked"):
            is_forward = case.endswith("fwd")
            if is_gpu:
                out.append(at_least(f"{case}: against the best other", best, 2 if is_forward else 1.8))
                out.append(at_least(f"{case}: against eager math", took["eager"], 5 if is_forward else 4))
            elif not is_forward:
                out.append(at_least(f"{case}: against the best other", best, 1.5 if " fp32 " in case else 2.5))
            if is_gpu:
                share = 0.85 if is_forward else 0.78  # a third of the bytes at .85, two thirds at .75
                out.append(at_least(f"{case}: share of the rate of copying", row.ceiling_share, share))
            if not is_forward:
                out.append(at_most(f"{case}: {PADDED}, share of the time", took[PADDED], 0.6 if is_gpu else 0.62))
        elif case.startswith("causal") and not is_gpu:
            out.append(at_least(f"{case}: against SDPA", took["SDPA"], 1.3))
        elif case.startswith("product of 1 "):
            out.append(at_least(f"{case}: share of the rate of reading", row.ceiling_share, 0.8))
    return out


def _rows(
    case: str, on: On, works: dict[str, Work], *, backend: str, num_bytes: float, flops: float, bound: str, error: float
) -> list[Row]:
    print(f"measuring {case}", file=sys.stderr, flush=True)
    works = working(works)
    rows = compared(case, time_in_turns(works, on.device))
    for row in rows:
        row.gb_s, row.gflop_s, row.bound = 1e-9 * num_bytes / row.median_s, 1e-9 * flops / row.median_s or None, bound
        copied, multiplied = on.ceilings.copy_gb_s, on.ceilings.matmul_gflop_s.get(name_of(on.dtype), torch.nan)
        row.ceiling_share = row.gb_s / copied if bound == "copy" else (row.gflop_s or 0) / multiplied
        row.peak_mib = peak_of(works[row.implementation], on.device)
        if row.ratios:
            row.implementation, row.error = f"ours ({backend})", error
    return rows


def working(works: dict[str, Work]) -> dict[str, Work]:
    """Ours, and of the alternatives those that run here: a rival's build that lacks this GPU says so and is left out."""
    found = {}
    for name, work in works.items():
        try:
            work()
        except Exception as error:  # of another project's code, whose errors have no common base
            if name.startswith("ours"):
                raise
            print(f"left out: {name}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        else:
            found[name] = work
    return found


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


def _sets(on: On, *shapes: tuple[int, ...]) -> list[list[Tensor]]:
    return [
        [torch.randn(shape, device=on.device).to(on.dtype).requires_grad_() for shape in shapes] for _ in range(ROTATED)
    ]


def _rope(on: On, shape: tuple[int, ...]) -> list[Row]:
    B, N, H, E = shape
    sets = _sets(on, shape, shape)
    cos, sin = _tables(N, E, on.device)
    ours = lambda q, k: rope_qk(q, k, cos, sin)  # noqa: E731
    eager = lambda q, k: (reference.rope(q, cos, sin), reference.rope(k, cos, sin))  # noqa: E731
    works = {"ours": _forward(ours, sets), "eager": _forward(eager, sets)}
    works["clone"] = _forward(lambda q, k: (q.clone(), k.clone()), sets)  # the limit: the same bytes, only copied
    if on.compiles:
        works["torch.compile"] = _forward(torch.compile(eager), sets)
    num_bytes = 4 * B * N * H * E * sets[0][0].element_size()
    error = _error(lambda q, k: rope_qk(q, k, cos, sin), *(x[:1, :64] for x in sets[0]))
    case = f"rope q and k {name_of(on.dtype)} {B}x{N}x{H}x{E}"
    name = choose("rope", *sets[0])
    return _rows(case, on, works, backend=name, num_bytes=num_bytes, flops=0, bound="copy", error=error)


def ragged(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A varlen attention of (q, k, v, begins of q, begins of k, most queries, most keys) on sequences that are all full."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        begins = (torch.arange(len(x) + 1, device=x.device, dtype=torch.int32) * x.shape[1] for x in (q, k))
        flat = (x.flatten(0, 1) for x in (q, k, v))
        return function(*flat, *begins, q.shape[1], k.shape[1]).view(q.shape)

    return attend


def libraries(on: On) -> dict[str, Callable[..., Tensor]]:
    """Other libraries' attention of [b, n, h, e] and [b, s, h, e], of those that are installed and run here."""
    found: dict[str, Callable[..., Tensor]] = {}
    is_half = on.is_gpu and on.dtype != torch.float32
    if is_half and importlib.util.find_spec("torch.nn.attention.varlen"):
        from torch.nn.attention.varlen import varlen_attn

        found["torch varlen"] = ragged(
            cast(Callable[..., Tensor], varlen_attn)
        )  # asked for nothing else, it gives a tensor
    if on.compiles:
        from torch.nn.attention.flex_attention import flex_attention

        flex = torch.compile(flex_attention)
        found["FlexAttention"] = lambda *qkv: flex(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)
    if is_half and importlib.util.find_spec("flash_attn"):
        import flash_attn

        found["flash-attn"] = flash_attn.flash_attn_func
        found["flash-attn varlen"] = ragged(flash_attn.flash_attn_varlen_func)
    if on.is_gpu and importlib.util.find_spec("xformers"):
        from xformers.ops import memory_efficient_attention

        found["xformers"] = memory_efficient_attention
    return found


def _other_ways(on: On, shape: tuple[int, ...], lengths: Tensor, cos: Tensor, sin: Tensor) -> dict[str, Any]:
    """Chunked cross-attention as others would compose it, of q, k and v: SDPA, bmm and the libraries that are here, all
    lengths full, so without a mask, and after this project's RoPE; on a GPU also eager math, masked.
    """
    B, N, H, E, M, K, R = shape
    L, device = N // M, on.device
    places = torch.arange(M - 1, 2 * M - 1, device=device)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = F.pad(q[:, M - 1 :], (0, 0, 0, 0, 0, M - 1)).reshape(B * L, M, H, E)
        q = reference.rope(q, cos, sin, places).transpose(1, 2)
        k = reference.rope(k.reshape(B * L * K, R, H, E), cos, sin).reshape(B * L, K * R, H, E).permute(0, 2, 3, 1)
        score = (q @ k).float() * E**-0.5
        valid = (torch.arange(R, device=device) < lengths.reshape(-1, 1)).reshape(B * L, 1, 1, K * R)
        weight = score.masked_fill(~valid, -torch.inf).softmax(-1).to(q.dtype)
        return whole((weight @ v.reshape(B * L, K * R, H, E).transpose(1, 2)).transpose(1, 2))

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.permute(0, 2, 3, 1), v.transpose(1, 2)
        return ((q * E**-0.5 @ k).softmax(-1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2)

    def blocks(rotate: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated [b l, m, h, e] and twice [b l, K r, h, e]: what a library of attention kernels is given."""
        q = F.pad(q[:, M - 1 :], (0, 0, 0, 0, 0, M - 1)).reshape(B * L, M, H, E)
        k = rotate(k.reshape(B * L * K, R, H, E), cos, sin)
        return rotate(q, cos, sin, places), k.reshape(B * L, K * R, H, E), v.reshape(B * L, K * R, H, E)

    def whole(out: Tensor) -> Tensor:
        return F.pad(out.reshape(B, L * M, H, E)[:, : N - M + 1], (0, 0, 0, 0, M - 1, 0))

    ways = {"SDPA": sdpa, "bmm": bmm, **libraries(on)}
    composed = {name: lambda *qkv, f=function: whole(f(*blocks(rope, *qkv))) for name, function in ways.items()}
    if on.compiles:
        composed["SDPA, compiled with RoPE"] = torch.compile(lambda *qkv: whole(sdpa(*blocks(reference.rope, *qkv))))
    return composed | ({"eager": eager} if on.is_gpu else {})


def _cross(on: On, shape: tuple[int, ...]) -> list[Row]:
    B, N, H, E, M, K, R = shape
    L, device = N // M, on.device
    sets = _sets(on, (B, N, H, E), (B, L, K, R, H, E), (B, L, K, R, H, E))
    full, half = (torch.full((B, L, K), length, device=device) for length in (R, R // 2))
    cos, sin = _tables(max(2 * M, R), E, device)
    slope = torch.randn(B, N, H, E, device=device).to(on.dtype)

    def ours(lengths: Tensor) -> Callable[..., Any]:
        return lambda q, k, v: chunked_cross_attention(q, k, v, lengths, M, cos, sin)

    ways = {"ours": ours(full), **_other_ways(on, shape, full, cos, sin)}
    forward = {name: _forward(way, sets) for name, way in ways.items()}
    ways = {name: ways[name] for name in working(forward)}
    has_backward = [name for name in ways if on.is_gpu or name != "FlexAttention"]
    both = {name: _both(ways[name], sets, slope) for name in has_backward} | {PADDED: _both(ours(half), sets, slope)}
    small = [x[:1, : 4 * M] if x.dim() == 4 else x[:1, :4] for x in sets[0]]
    ours_is: dict[str, Any] = {
        "backend": choose("chunked_cross_attention", *sets[0]),
        "bound": "copy" if on.is_gpu else "matmul",
        "error": _error(ours(half[:1, :4]), *small),
    }
    num_bytes = (2 * B * N + 2 * B * L * K * R) * H * E * sets[0][0].element_size()
    flops = 4 * B * L * H * M * K * R * E
    text = f"chunked cross-attention {name_of(on.dtype)} {B}x{N}x{H}x{E}"
    rows = _rows(f"{text} fwd", on, forward, num_bytes=num_bytes, flops=flops, **ours_is)
    return rows + _rows(f"{text} fwd+bwd", on, both, num_bytes=3 * num_bytes, flops=3.5 * flops, **ours_is)


def _self(case: str, on: On, shape: tuple[int, ...], is_causal: bool) -> list[Row]:
    B, N, H, E = shape
    sets = _sets(on, shape, shape, shape)
    slope = torch.randn(shape, device=on.device).to(on.dtype)
    ours = lambda q, k, v: attention(q, k, v, is_causal=is_causal)  # noqa: E731

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2)

    error = _error(ours, *(x[:1] for x in sets[0]))
    flops = 3.5 * 4 * B * H * N * N * E / (2 if is_causal else 1)
    works = {"ours": _both(ours, sets, slope), "SDPA": _both(sdpa, sets, slope)}
    num_bytes = 12 * B * N * H * E * sets[0][0].element_size()
    text, name = f"{case} {name_of(on.dtype)} {B}x{N}x{H}x{E} fwd+bwd", choose("attention", *sets[0])
    return _rows(text, on, works, backend=name, num_bytes=num_bytes, flops=flops, bound="matmul", error=error)


def _gather(on: On) -> list[Row]:
    device = on.device
    rows, M, R, count = 200_000, 64, 128, 20_000
    table = torch.randint(0, 30_000, (rows, M), device=device).int()
    document = torch.arange(rows, device=device) // 10
    lengths = torch.full((rows,), M, device=device)
    sets = [[torch.randint(-1, rows, (count,), device=device)] for _ in range(ROTATED)]
    works = {
        "ours": _forward(lambda ids: gather_neighbors(table, document, lengths, ids, R), sets),
        "eager": _forward(
            lambda ids: reference.gather_neighbors(
                table, document, row_lengths=lengths, ids=ids, retrieved_length=R, pad_id=0
            ),
            sets,
        ),
    }
    case, name = f"gather neighbors {count} of {rows} rows", choose("gather_neighbors", sets[0][0])
    return _rows(case, on, works, backend=name, num_bytes=8 * count * R, flops=0, bound="copy", error=0.0)


def _rows_alone(on: On) -> list[Row]:
    """What is done to each row alone, without gradients of its own: RMSNorm, SwiGLU, and a loss with the gradient of its logits."""
    T, D, V = (8192, 4096, 32000) if on.is_gpu else (512, 768, 4096)
    wide, logits = _sets(on, (T, D), (T, D)), _sets(on, (T, V))
    weight, labels = torch.rand(D, device=on.device).to(on.dtype), torch.randint(V, (T,), device=on.device)

    def in_place(x: Tensor) -> Tensor:  # of a copy: PyTorch's gradient is one
        cross_entropy_(found := x.clone(), labels)
        return found

    def loss(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(F.cross_entropy(x, labels, reduction="sum"), x)[0]

    cases: list[tuple[str, Callable[..., Tensor], Callable[..., Tensor], list[list[Tensor]], int]] = [
        ("rms_norm", lambda x, _: rms_norm(x, weight, 1e-5), lambda x, _: F.rms_norm(x, (D,), weight.to(x), 1e-5), wide, 2 * T * D),
        ("swiglu", swiglu, lambda gate, up: F.silu(gate) * up, wide, 3 * T * D),
        ("loss and gradient of logits", in_place, loss, logits, 2 * T * V),
    ]  # fmt: skip
    rows = []
    for name, ours, theirs, sets, count in cases:
        given = [x.detach() for x in sets[0]]
        exact = theirs(*(x.double() for x in given))
        error = float((ours(*given).double() - exact).norm() / exact.norm())
        case = f"{name} {name_of(on.dtype)} {'x'.join(map(str, given[0].shape))}"
        works = {"ours": _forward(ours, sets), "torch": _forward(theirs, sets)}
        num_bytes = count * on.dtype.itemsize
        rows += _rows(
            case, on, works, backend=choose("rms_norm", weight), num_bytes=num_bytes, flops=0, bound="copy", error=error
        )
    return rows


def _products(kind: torch.dtype) -> list[Row]:
    """A step of decoding reads every weight once: products of one row and of eight, against reading alone."""
    weights = [(20 * torch.randn(OUTPUTS, INPUTS)).to(kind) for _ in range(BYTES // (OUTPUTS * INPUTS * kind.itemsize))]
    scale = torch.rand(OUTPUTS) if kind == torch.int8 else None
    memory, rows = torch.ones(BYTES // 4), []

    def each(product: Callable[[Tensor], Tensor]) -> Work:
        return lambda: [product(weight) for weight in weights]

    for count in (1, 8):
        x = torch.randn(count, INPUTS).to(torch.bfloat16 if kind == torch.bfloat16 else torch.float32)
        works: dict[str, Work] = {"ours": each(partial(linear, x, scale=scale)), "reading": memory.sum}
        if scale is None:
            works["torch"] = each(partial(F.linear, x))
        with torch.inference_mode():
            found = compared(f"product of {count} row{'s' * (count > 1)} {name_of(kind)}", time_in_turns(works))
        for row in found:
            row.gb_s, row.bound = 1e-9 * BYTES / row.median_s, "reading memory"
            row.ceiling_share = found[1].median_s / row.median_s
        rows += found
    return rows
