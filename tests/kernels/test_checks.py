"""Derivatives of every mode and order are right, or refused by name; what torch.func and other wrappers carry is not lost."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import rotary_tables
from retro_kernels import cpp, reference
from retro_kernels.attention import attention
from retro_kernels.blocks import rounded
from retro_kernels.chunked_cross_attention import chunked_cross_attention
from retro_kernels.cross_entropy import cross_entropy_
from retro_kernels.gather_neighbors import gather_neighbors
from retro_kernels.linear import linear
from retro_kernels.rope import rope, rope_qk
from retro_kernels.step import Attending, CrossAttentionPart, Matrix, Norm, SelfAttentionPart, Steps
from torch import Tensor

from retro_engine.model.loss import linear_cross_entropy
from retro_engine.model.ops import masked_attention

TYPES = [torch.float32, torch.bfloat16, torch.float64]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float64: 1e-9}
COS, SIN = rotary_tables(20, 8)
GENERATOR = torch.Generator().manual_seed(0)
Q = torch.randn(2, 8, 2, 8, generator=GENERATOR, dtype=torch.float64)
NEIGHBORS = torch.randn(2, 2, 2, 5, 1, 8, generator=GENERATOR, dtype=torch.float64)
WEIGHT = torch.randn(6, 8, generator=GENERATOR, dtype=torch.float64)
LENGTHS = torch.tensor([[[5, 3], [0, 0]], [[1, 0], [5, 5]]])
OPS: dict[str, Callable[[Tensor], Any]] = {
    "rope": lambda x: rope(x, COS, SIN),
    "rope_qk": lambda x: rope_qk(x, x[:, :, :1], COS, SIN, interleaved=True)[1],
    "attention": lambda x: attention(x, x[:, :, :1] * 2, x[:, :, 1:], is_causal=True, cos=COS, sin=SIN),
    "attention over a range": lambda x: attention(x, x, x.sin(), key_ends=torch.tensor([0, 5])),
    "chunked_cross_attention": lambda x: chunked_cross_attention(
        x, NEIGHBORS.to(x.dtype) * x.mean(), NEIGHBORS.to(x.dtype), LENGTHS, 4, COS, SIN
    ),
    "masked_attention": lambda x: masked_attention(x, x, x, torch.ones(8, 8, dtype=torch.bool).tril()),
    "linear": lambda x: linear(x[0, 0], WEIGHT.to(x.dtype) * x.mean()),
    "linear of bytes": lambda x: linear(x[0, 0], BYTES, None, torch.ones(6)),
}
BYTES = (WEIGHT * 20).to(torch.int8)
EXACT = OPS | {"linear of bytes": lambda x: x[0, 0] @ BYTES.double().T}  # the op rounds to float32
TANGENT = torch.randn(Q.shape, generator=GENERATOR, dtype=torch.float64)


def slope(function: Callable[[Tensor], Tensor], tangent: Tensor = TANGENT) -> Tensor:
    """By central differences, in float64."""
    step = 1e-5
    return (function(Q + step * tangent) - function(Q - step * tangent)) / (2 * step)


def close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    error = float((found.double() - exact).norm() / exact.norm())
    assert error < max(TOLERANCE[dtype], 1e-6), f"{error:.1e}"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", OPS)
def test_forward_mode(name: str, dtype: torch.dtype) -> None:
    x, tangent = Q.to(dtype), TANGENT.to(dtype)
    exact = slope(EXACT[name], tangent.double())
    close(torch.func.jvp(OPS[name], (x,), (tangent,))[1], exact, dtype)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        found = torch.autograd.forward_ad.unpack_dual(OPS[name](dual)).tangent
    assert found is not None
    close(found, exact, dtype)


def test_forward_mode_compiled() -> None:
    x, tangent = Q.float(), TANGENT.float()
    whole = torch.compile(lambda x, t: torch.func.jvp(OPS["attention"], (x,), (t,))[1], backend="aot_eager")
    close(whole(x, tangent), slope(OPS["attention"], tangent.double()), torch.float32)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", OPS)
def test_a_gradient_of_a_gradient(name: str, dtype: torch.dtype) -> None:
    """As the slope of the gradient, and by torch.func."""

    def energy(x: Tensor) -> Tensor:
        return OPS[name](x).to(torch.promote_types(x.dtype, torch.float32)).pow(3).sum()

    exact = slope(torch.func.grad(lambda x: EXACT[name](x).pow(3).sum())).detach()
    x = Q.to(dtype, copy=True).requires_grad_()
    if name == "masked_attention" and dtype != torch.float64:
        with pytest.raises(
            RuntimeError, match="not implemented"
        ):  # PyTorch's own, whose gradients are of the first order
            torch.autograd.grad(torch.autograd.grad(energy(x), x, create_graph=True)[0].sum(), x)
        return
    (gradient,) = torch.autograd.grad(energy(x), x, create_graph=True)
    close(torch.autograd.grad(gradient, x, TANGENT.to(dtype))[0], exact, dtype)  # symmetric: as the other way round
    close(torch.func.jvp(torch.func.grad(energy), (Q.to(dtype),), (TANGENT.to(dtype),))[1], exact, dtype)


@pytest.mark.parametrize("name", OPS)
def test_vmap(name: str) -> None:
    x = torch.stack((Q, Q.sin(), Q + 1)).float()
    is_rounded = (
        name == "linear of bytes" and cpp.is_available()
    )  # outside of vmap: what meets bytes is rounded to bytes
    found = torch.vmap(OPS[name])(rounded(x) if is_rounded else x)
    torch.testing.assert_close(found, torch.stack([OPS[name](part) for part in x]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", TYPES)
def test_linear_carries_gradients(dtype: torch.dtype) -> None:
    """Of inputs, weights and bias, for few rows and many."""
    for rows in (1, 3, 40):
        x, weight, bias = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((rows, 8), (6, 8), (6,)))
        found = torch.autograd.grad(linear(x, weight, bias).float().pow(2).sum(), (x, weight, bias))
        plain = torch.nn.functional.linear(x, weight, bias).float().pow(2).sum()
        for a, b in zip(found, torch.autograd.grad(plain, (x, weight, bias))):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            assert not linear(x, weight, bias).requires_grad


def test_what_has_no_gradient_refuses() -> None:
    logits, labels = torch.randn(3, 9), torch.zeros(3, dtype=torch.long)
    for dtype in TYPES:
        given = logits.to(dtype).requires_grad_() * 1
        with pytest.raises(RuntimeError, match="has none\n.*\n.*cross_entropy"):
            cross_entropy_(given, labels)
        with pytest.raises(RuntimeError, match="dual number"):
            torch.func.jvp(lambda x: cross_entropy_(x.clone(), labels), (logits.to(dtype),), (logits.to(dtype),))
    with pytest.raises(RuntimeError, match="jvp|setup_context"):
        torch.func.jvp(lambda x: linear_cross_entropy(x, torch.ones(9, 9), None, labels), (logits,), (logits,))


@pytest.mark.parametrize("dtype", TYPES)
def test_no_valid_key_gives_0_everywhere(dtype: torch.dtype) -> None:
    """One definition: kernels, reference, step and masks; also where values hold NaN, and with exact zeros for gradients."""
    x = Q.to(dtype)
    nothing = torch.full((2, 8), 8)
    bad = torch.full_like(x, torch.nan)
    for k in (x, bad):
        assert (attention(x, k, k, first_keys=nothing) == 0).all()
        assert (attention(x, k, k, key_ends=torch.zeros(2, dtype=torch.long)) == 0).all()
        ranges = (torch.tensor([3, 0]), torch.tensor([3, 8]))
        for function in (attention, lambda q, k, v, key_begins, key_ends: reference.attention(q, k, v, False, None, key_begins, key_ends, None, None, 0, 8, 1.0)):  # fmt: skip
            assert (function(x, k, k, key_begins=ranges[0], key_ends=ranges[1])[0] == 0).all()
    assert (chunked_cross_attention(x, *[NEIGHBORS.to(dtype)] * 2, LENGTHS, 4)[0, 7:] == 0).all()  # type: ignore[index]
    assert (chunked_cross_attention(bad, *[NEIGHBORS.to(dtype)[:, :0]] * 2, None, 9) == 0).all()  # type: ignore[operator]
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    mask[0, 0, 2] = False
    q = x.clone().requires_grad_()
    out = masked_attention(q, x, x, mask)
    assert (out[0, 2] == 0).all()
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert gradient.isfinite().all()
    assert (gradient[0, 2] == 0).all()


@pytest.mark.parametrize("is_cross", [False, True])
def test_a_step_with_no_valid_key(is_cross: bool) -> None:
    D, rows = 8, 2
    eye, keys, values = Matrix(torch.eye(D)), torch.randn(rows, 5, 1, D), torch.randn(rows, 5, 1, D)
    x, plain = torch.randn(rows, D), Norm(None, None, 1e-5, True)
    valid = torch.tensor([[False] * 5, [True] * 5])
    starts = torch.tensor([2, 2])
    cases = [Attending(keys, values, 1.0, starts=None if is_cross else starts, valid=valid)]
    if not is_cross:
        cases.append(Attending(keys, values, 1.0, begins=torch.tensor([3, 0]), starts=starts))
    for attending in cases:
        part = (
            CrossAttentionPart(plain, eye, eye, attending)
            if is_cross
            else SelfAttentionPart(plain, *[eye] * 4, attending)
        )
        found, exact = Steps([part])(x), reference.step(x, part)
        assert torch.equal(found[0], x[0])
        assert torch.equal(exact[0], x[0])
        torch.testing.assert_close(found[1], exact[1])


def test_tensors_without_data() -> None:
    """On the meta device every op gives shapes and types."""
    meta = torch.device("meta")
    q, k = torch.empty(2, 8, 4, 8, device=meta), torch.empty(2, 8, 2, 8, device=meta)
    ids = torch.zeros(2, 2, 2, dtype=torch.long, device=meta)
    assert attention(q, k, k, key_ends=ids[:, 0, 0], is_causal=True).shape == q.shape
    neighbors = torch.empty(2, 2, 2, 5, 2, 8, device=meta)
    assert chunked_cross_attention(q, neighbors, neighbors, ids, 4).shape == q.shape  # type: ignore[union-attr]
    assert rope(q, COS.to(meta), SIN.to(meta)).shape == q.shape
    assert linear(q, torch.empty(3, 8, device=meta)).shape == (2, 8, 4, 3)
    assert cross_entropy_(torch.empty(3, 9, device=meta), torch.zeros(3, dtype=torch.long, device=meta)).shape == (3,)
    rows = torch.zeros(9, dtype=torch.int32, device=meta)
    assert gather_neighbors(torch.zeros(9, 4, dtype=torch.int32, device=meta), rows, rows, ids, 8)[0].shape == (
        2,
        2,
        2,
        8,
    )


def test_views() -> None:
    """Repeated, transposed, or with a sign still to be applied: the values count, not the memory."""
    x, weight = Q.float(), WEIGHT.float()
    for view in (torch._neg_view(x), x[:1].expand(2, -1, -1, -1), x.transpose(1, 2).contiguous().transpose(1, 2)):
        for name, function in OPS.items():
            torch.testing.assert_close(
                function(view), function(view.clone(memory_format=torch.contiguous_format)), msg=name
            )
    row = torch._neg_view(x[0, 0])
    for matrix in (torch._neg_view(weight), weight[:1].expand(6, -1)):
        torch.testing.assert_close(linear(row, matrix), row.clone() @ matrix.clone().T)
    assert linear(row[0], weight).shape == (6,)
    eye = Matrix(torch.eye(8))
    part = CrossAttentionPart(Norm(None, None, 1e-5, True), eye, eye, Attending(x[:, :3, :1], x[:, :3, 1:], 1.0))
    torch.testing.assert_close(Steps([part])(row), Steps([part])(row.clone()))


@pytest.mark.parametrize("types", ["fff", "bff", "fbf", "ddd", "bbb"])
def test_autocast_casts_as_sdpa_does(types: str) -> None:
    """Queries, keys and values of float32 and mixed types come out in autocast's type, float64 as it is; else mixing is refused."""
    kinds = {"f": torch.float32, "b": torch.bfloat16, "d": torch.float64}
    q, k, v = (torch.randn(1, 8, 2, 4).to(kinds[letter]).requires_grad_() for letter in types)
    chunks = [x.unflatten(1, (2, 2, 2)) for x in (k, v)]
    calls = {
        "sdpa": lambda: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2),
        "attention": lambda: attention(q, k, v),
        "chunked_cross_attention": lambda: chunked_cross_attention(q, *chunks, chunk_length=4),
    }
    with torch.autocast("cpu", torch.bfloat16):
        expected, *outs = (call() for call in calls.values())
        assert [out.dtype for out in outs] == [expected.dtype] * 2
    assert (outs[0] - expected).norm() <= 0.02 * expected.norm()
    outs[1].sum().backward()
    assert q.grad is not None and q.grad.dtype == q.dtype
    if len(set(types)) > 1:
        with pytest.raises(ValueError, match="expected one type"):
            attention(q, k, v)
