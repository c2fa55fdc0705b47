"""`rope` and `rope_qk` as other models call them."""

import pytest
import torch
from kernel_helpers import TOLERANCE, output_and_gradients, relative_error, rotary_tables
from retro_kernels import cpp, reference
from retro_kernels.rope import rope, rope_qk

COS, SIN = torch.ones(6, 2), torch.zeros(6, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize(("width", "rotated"), [(64, 64), (80, 40), (18, 12), (4, 2), (256, 256), (16, 0)])
def test_against_float64(width: int, rotated: int, is_interleaved: bool, dtype: torch.dtype) -> None:
    cos, sin = rotary_tables(50, rotated) if rotated else (torch.ones(50, 0), torch.ones(50, 0))
    x = torch.randn(2, 37, 3, width).to(dtype)
    for positions in (None, torch.arange(37) + 13, torch.randint(0, 50, (2, 37))):
        arguments = {"cos": cos, "sin": sin, "positions": positions, "interleaved": is_interleaved}
        found = output_and_gradients(rope, {"x": x} | arguments, ("x",))
        exact = output_and_gradients(rope, {"x": x.double()} | arguments, ("x",))
        for name, a, b in zip(("y", "gradient"), found, exact):
            assert relative_error(a, b) < TOLERANCE[dtype], f"{name}: {relative_error(a, b):.1e}"


def test_packed_documents_begin_at_zero() -> None:
    cos, sin = rotary_tables(20, 8)
    x = torch.randn(1, 12, 2, 8)
    packed = rope(x, cos, sin, torch.cat((torch.arange(5), torch.arange(7))))
    torch.testing.assert_close(packed[:, 5:], rope(x[:, 5:], cos, sin))


def test_both_at_once_and_inputs_are_kept() -> None:
    q, k = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 8)
    before = q.clone()
    rotated_q, rotated_k = rope_qk(q, k, COS * 0.6, COS * 0.8)
    torch.testing.assert_close(rotated_q, rope(q, COS * 0.6, COS * 0.8))
    torch.testing.assert_close(rotated_k, rope(k, COS * 0.6, COS * 0.8))
    assert torch.equal(q, before)
    assert rope(torch.zeros(0, 6, 2, 8), COS, SIN).shape == (0, 6, 2, 8)
    assert rope(torch.zeros(2, 0, 2, 8), COS, SIN).shape == (2, 0, 2, 8)
    wide = torch.randn(2, 6, 3, 24)
    torch.testing.assert_close(rope(wide[..., 8:16], COS, SIN), reference.rope(wide[..., 8:16], COS, SIN))


@pytest.mark.skipif(not cpp.is_available(), reason="no C++ extension")
def test_registration() -> None:
    cos, sin = rotary_tables(6, 8)
    q, k = torch.randn(2, 6, 4, 8, requires_grad=True), torch.randn(2, 6, 1, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.retro_kernels.rope.default, (q, cos, sin, None, False, False))
    torch.library.opcheck(torch.ops.retro_kernels.rope_qk.default, (q, k, cos, sin, None, True, False))
    compiled = torch.compile(lambda q, k: rope_qk(q, k, cos, sin)[0].square().sum(), fullgraph=True, dynamic=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(q, k), q)[0], 2 * q.detach())
    assert torch.autograd.gradcheck(lambda x: rope(x, cos, sin), [q.detach().double().requires_grad_()])


@pytest.mark.parametrize(("args", "named"), [
    ((torch.zeros(6, 2, 8), COS, SIN), "x has shape"),
    ((torch.zeros(1, 6, 2, 8), COS, SIN[:3]), "cos"),
    ((torch.zeros(1, 6, 2, 2), COS, SIN), "rotates 4 features"),
    ((torch.zeros(1, 7, 2, 8), COS, SIN), "6 positions"),
    ((torch.zeros(1, 6, 2, 8), COS, SIN, torch.zeros(5, dtype=torch.long)), "positions has shape"),
    ((torch.zeros(1, 6, 2, 8), COS, SIN, torch.arange(6) * 0.5), "positions is torch.float32: expected a type of whole"),
    ((torch.zeros(1, 6, 2, 8), COS, SIN, torch.arange(1, 7)), "positions .* spans 1 ... 6; expected 0 ... 5"),
    ((torch.zeros(1, 6, 2, 8), COS, SIN, torch.arange(-1, 5)), "positions .* spans -1"),
    ((torch.zeros(1, 6, 8, 2).transpose(2, 3), COS, SIN), "must be contiguous"),
    ((torch.zeros(1, 6, 2, 8).int(), COS, SIN), "floating-point"),
    ((torch.zeros(1, 6, 2, 8, device="meta"), COS, SIN), "one device"),
])  # fmt: skip
def test_wrong_arguments_are_named(args: tuple[torch.Tensor, ...], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        rope(*args)
    with pytest.raises(ValueError, match="same b, n, type and device"):
        rope_qk(torch.zeros(1, 6, 2, 8), torch.zeros(2, 6, 2, 8), COS, SIN)
