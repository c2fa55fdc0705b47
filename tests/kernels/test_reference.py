"""The reference ops against the definitions, one token at a time, in float64."""

import math

import pytest
import torch
from retro_kernels import reference

M = 4


def tables(positions: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.outer(torch.arange(positions).double(), 10000.0 ** (-torch.arange(pairs).double() / pairs))
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("e", "pairs"), [(8, 4), (10, 3), (6, 0), (16, 8)])
def test_rope(interleaved: bool, e: int, pairs: int) -> None:
    x = torch.randn(2, 5, 3, e, dtype=torch.float64)
    cos, sin = tables(9, pairs)
    positions = torch.tensor([[0, 3, 1, 8, 2], [4, 4, 0, 1, 7]])
    out = reference.rope(x, cos, sin, positions, interleaved)
    for b in range(2):
        for t in range(5):
            for p in range(pairs):
                i, j = (2 * p, 2 * p + 1) if interleaved else (p, p + pairs)
                c, s = cos[positions[b, t], p], sin[positions[b, t], p]
                torch.testing.assert_close(out[b, t, :, i], x[b, t, :, i] * c - x[b, t, :, j] * s)
                torch.testing.assert_close(out[b, t, :, j], x[b, t, :, j] * c + x[b, t, :, i] * s)
    torch.testing.assert_close(out[..., 2 * pairs :], x[..., 2 * pairs :])
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize(
    ("n", "groups", "has_rope"), [(4, 2, True), (7, 2, False), (8, 1, True), (11, 4, True), (19, 2, True)]
)
def test_chunked_cross_attention(n: int, groups: int, has_rope: bool) -> None:
    generator = torch.Generator().manual_seed(n)
    B, H, E, K, R, L = 2, 4, 8, 3, 5, n // M
    q = torch.randn(B, n, H, E, dtype=torch.float64, generator=generator)
    k, v = (torch.randn(B, L, K, R, groups, E, dtype=torch.float64, generator=generator) for _ in range(2))
    lengths = torch.randint(0, R + 1, (B, L, K), generator=generator)
    lengths[0, 0] = 0
    cos, sin = tables(2 * M - 1, E // 2)
    args = (cos, sin) if has_rope else (None, None)
    out = reference.chunked_cross_attention(q, k, v, lengths, M, *args, None, M - 1)
    turn = lambda x, p: reference.rope(x[None, None, None], cos, sin, torch.tensor([p]))[0, 0, 0] if has_rope else x  # noqa: E731
    for b in range(B):
        for t in range(n):
            u = (t + 1) // M - 1
            for h in range(H):
                g = h * groups // H
                seen = [(j, i) for j in range(K) for i in range(int(lengths[b, u, j]))] if u >= 0 else []
                if not seen:
                    assert (out[b, t, h] == 0).all(), "exactly 0"
                    continue
                query = turn(q[b, t, h], t - u * M)  # offset i + m - 1 with i = t - (um + m - 1)
                scores = torch.stack([query @ turn(k[b, u, j, i, g], i) for j, i in seen]) / math.sqrt(E)
                values = torch.stack([v[b, u, j, i, g] for j, i in seen])
                torch.testing.assert_close(out[b, t, h], scores.softmax(0) @ values)


def test_nan_in_masked_places_is_never_seen() -> None:
    q = torch.randn(1, 9, 2, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 2, 2, 3, 2, 4, dtype=torch.float64) for _ in range(2))
    lengths = torch.tensor([[[2, 0], [0, 0]]])
    clean = reference.chunked_cross_attention(q, k, v, lengths, 4, None, None, None, 3)
    for x in (k, v):
        x[0, 0, 0, 2:] = torch.nan
        x[0, 0, 1] = torch.inf
        x[0, 1] = torch.nan
    found = reference.chunked_cross_attention(q, k, v, lengths, 4, None, None, None, 3)
    assert torch.equal(found, clean)
    found.sum().backward()
    assert torch.isfinite(q.grad).all()


def test_10_gradients() -> None:
    """Property 10: fp64 gradcheck of every op, masks and missing neighbors included."""
    cos, sin = tables(8, 2)
    lengths = torch.tensor([[[2, 0], [0, 0]]])

    def cca(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return reference.chunked_cross_attention(q, k, v, lengths, 4, cos, sin, None, 3)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(cca, (leaf(1, 9, 2, 4), leaf(1, 2, 2, 3, 1, 4), leaf(1, 2, 2, 3, 1, 4)))
    for interleaved in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, i=interleaved: reference.rope(x, cos, sin, None, i), (leaf(2, 5, 2, 6),)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precision(dtype: torch.dtype) -> None:
    """||x - ref64|| / ||ref64|| within the published tolerances."""
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    cos, sin = tables(64, 8)
    x = torch.randn(2, 64, 2, 16, dtype=torch.float64).to(dtype)
    exact = reference.rope(x.double(), cos, sin)
    found = reference.rope(x, cos.float(), sin.float())
    assert found.dtype == dtype
    assert float((found.double() - exact).norm() / exact.norm()) <= tolerance
