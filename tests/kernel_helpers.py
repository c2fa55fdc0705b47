"""What the kernels' tests and gates share: inputs, rotary tables, the error measure and its one tolerance table."""

import torch
from torch import Tensor

# ||x - x64|| / ||x64|| for outputs and every gradient.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

# b, n, heads, key/value heads, head width, m, K, r, rotated features: odd sizes, GQA, n not a multiple of m, tiles of one key.
CCA_SHAPES = [
    (2, 70, 4, 2, 32, 16, 2, 32, 32),
    (1, 64, 2, 2, 16, 16, 3, 32, 16),
    (1, 130, 4, 1, 64, 32, 2, 64, 64),
    (1, 100, 3, 3, 80, 25, 2, 50, 0),
    (1, 67, 2, 1, 96, 16, 2, 37, 48),
    (1, 40, 1, 1, 18, 16, 1, 7, 12),
    (1, 33, 8, 1, 256, 16, 1, 33, 256),
    (1, 300, 1, 1, 64, 128, 1, 150, 64),
]


def rotary_tables(positions: int, rotary_width: int) -> tuple[Tensor, Tensor]:
    frequency = 10000.0 ** (-torch.arange(0, rotary_width, 2).double() / rotary_width)
    angle = torch.arange(positions).double()[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def relative_error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))


def cca_case(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, object]:
    """Arguments of chunked_cross_attention: first chunk without neighbors, the last one's full, the others random."""
    B, N, H, G, E, M, K, R, rotated = shape
    generator = torch.Generator().manual_seed(sum(shape))
    L = N // M
    lengths = torch.randint(0, R + 1, (B, L, K), generator=generator)
    lengths[0, 0], lengths[0, -1] = 0, R
    cos, sin = rotary_tables(max(2 * M, R), rotated) if rotated else (None, None)
    q = torch.randn(B, N, H, E, generator=generator).to(dtype)
    k, v = (torch.randn(B, L, K, R, G, E, generator=generator).to(dtype) for _ in range(2))
    padding = torch.arange(R) >= lengths[..., None]
    k[padding], v[padding] = torch.nan, torch.nan  # what is in the padding must not matter
    return {"q": q, "k": k, "v": v, "neighbor_lengths": lengths, "chunk_length": M, "cos": cos, "sin": sin}


def output_and_gradients(function, arguments: dict[str, object], names: tuple[str, ...]) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """[output, gradient of each of `names`] for a fixed random gradient of the output."""
    arguments = dict(arguments)
    for name in names:
        arguments[name] = arguments[name].detach().clone().requires_grad_()  # type: ignore[attr-defined]
    out = function(**arguments)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out)
    return [out.detach(), *torch.autograd.grad(out, [arguments[name] for name in names], slope)]


def in_double(arguments: dict[str, object], names: tuple[str, ...]) -> dict[str, object]:
    return arguments | {name: arguments[name].double() for name in names}  # type: ignore[attr-defined]
