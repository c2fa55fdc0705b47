"""`chunked_cross_attention` as other models call it: values, gradients, bad arguments, registration."""

import pytest
import torch
from kernel_helpers import CCA_SHAPES, TOLERANCE, cca_case, in_double, output_and_gradients, relative_error
from retro_kernels import cpp, reference
from retro_kernels.chunked_cross_attention import chunked_cross_attention

QKV = ("q", "k", "v")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", CCA_SHAPES, ids=str)
def test_against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = cca_case(shape, dtype)
    found = output_and_gradients(chunked_cross_attention, case, QKV)
    exact = output_and_gradients(chunked_cross_attention, in_double(case, QKV), QKV)
    for name, a, b in zip(("o", *QKV), found, exact):
        assert torch.isfinite(a).all(), name
        assert relative_error(a, b) < TOLERANCE[dtype], f"{name}: {relative_error(a, b):.1e}"
    M = shape[5]
    assert (found[0][0, : 2 * M - 1] == 0).all(), "before token m-1, and where the first chunk has no neighbor"
    assert (found[2][0, 0] == 0).all() and (found[3][0, 0] == 0).all(), "missing neighbors have zero gradients"


def test_strided_inputs_and_no_overwriting() -> None:
    case = cca_case(CCA_SHAPES[0], torch.float32)
    B, N, H, E = case["q"].shape  # type: ignore[attr-defined]
    wide = torch.randn(B, N, H, 3 * E)
    wide[..., :E] = case["q"]
    before = wide.clone()
    strided = chunked_cross_attention(**(case | {"q": wide[..., :E]}))
    assert torch.equal(strided, chunked_cross_attention(**case))
    assert torch.equal(wide, before)
    permuted = case["k"].transpose(1, 4).contiguous().transpose(1, 4)  # type: ignore[attr-defined]
    assert torch.equal(chunked_cross_attention(**(case | {"k": permuted})), chunked_cross_attention(**case))


def test_the_same_bits_every_time() -> None:
    case = cca_case((2, 200, 4, 2, 64, 32, 2, 64, 64), torch.float32)
    case["k"], case["v"] = torch.nan_to_num(case["k"]), torch.nan_to_num(case["v"])  # type: ignore[arg-type]
    first = output_and_gradients(chunked_cross_attention, case, QKV)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, output_and_gradients(chunked_cross_attention, case, QKV)))


def test_log_sum_exp() -> None:
    case = cca_case(CCA_SHAPES[0], torch.float32)
    _, lse = chunked_cross_attention(**case, return_lse=True)
    _, exact = chunked_cross_attention(**in_double(case, QKV), return_lse=True)
    assert torch.equal(torch.isinf(lse), torch.isinf(exact))
    assert (lse[torch.isinf(lse)] > 0).all()
    torch.testing.assert_close(lse.double(), exact, atol=1e-5, rtol=1e-5)
    assert not lse.requires_grad


@pytest.mark.skipif(not cpp.is_available(), reason="no C++ extension")
def test_registration() -> None:
    case = cca_case(CCA_SHAPES[0], torch.float32)
    case["k"], case["v"] = torch.nan_to_num(case["k"]), torch.nan_to_num(case["v"])  # type: ignore[arg-type]
    tensors = [case[name].requires_grad_() for name in QKV]  # type: ignore[attr-defined]
    data = (case["neighbor_lengths"], None, None, case["cos"], case["sin"], None)
    arguments = (*tensors, *data, 16, False, 15, 0, 0.2, 0.0)
    torch.library.opcheck(torch.ops.retro_kernels.chunked_cross_attention.default, arguments)
    loss = lambda q: chunked_cross_attention(**(case | {"q": q})).square().sum()  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    q = tensors[0].detach().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(compiled(q), q)[0], torch.autograd.grad(loss(q), q)[0])


def test_gradcheck_and_twin() -> None:
    case = in_double(cca_case((1, 13, 2, 1, 4, 4, 2, 3, 4), torch.float32), QKV)
    case["k"], case["v"] = torch.nan_to_num(case["k"]), torch.nan_to_num(case["v"])  # type: ignore[arg-type]
    check = lambda q, k, v: chunked_cross_attention(**(case | {"q": q, "k": k, "v": v}))  # noqa: E731
    assert torch.autograd.gradcheck(check, [case[name].requires_grad_() for name in QKV])  # type: ignore[attr-defined]
    twin = reference.chunked_cross_attention(
        *(case[name] for name in (*QKV, "neighbor_lengths", "chunk_length", "cos", "sin")),  # type: ignore[arg-type]
        scale=0.5,
        query_offset=3,
    )
    assert torch.equal(twin, chunked_cross_attention(**case))


@pytest.mark.skipif(not cpp.is_available(), reason="no C++ extension")
def test_lengths_that_nobody_checked_read_nothing_outside() -> None:
    """While compiling, lengths are data: too large counts as r, negative as 0."""
    case = cca_case(CCA_SHAPES[0], torch.float32)
    case["k"], case["v"] = torch.nan_to_num(case["k"]), torch.nan_to_num(case["v"])  # type: ignore[arg-type]
    wild = case["neighbor_lengths"].clone()  # type: ignore[attr-defined]
    wild[0, 1], wild[1, 2] = 10**8, -(10**8)
    compiled = torch.compile(chunked_cross_attention, backend="aot_eager", fullgraph=True)
    found = compiled(**(case | {"neighbor_lengths": wild}))
    assert torch.equal(found, chunked_cross_attention(**(case | {"neighbor_lengths": wild.clamp(0, 32)})))


def inputs(n: int = 9, l: int = 2, heads: int = 2, groups: int = 2) -> dict[str, torch.Tensor]:  # noqa: E741
    return {
        "q": torch.randn(1, n, heads, 4),
        "k": torch.randn(1, l, 2, 3, groups, 4),
        "v": torch.randn(1, l, 2, 3, groups, 4),
    }


def test_zero_sizes() -> None:
    assert chunked_cross_attention(**inputs(), chunk_length=4).shape == (1, 9, 2, 4)
    short = inputs(n=3, l=0)
    assert (chunked_cross_attention(**short, chunk_length=4) == 0).all()
    empty = {"q": torch.zeros(0, 9, 2, 4), "k": torch.zeros(0, 2, 2, 3, 2, 4), "v": torch.zeros(0, 2, 2, 3, 2, 4)}
    assert chunked_cross_attention(**empty, chunk_length=4).shape == (0, 9, 2, 4)
    none = {"q": torch.randn(1, 9, 2, 4), "k": torch.zeros(1, 2, 0, 3, 2, 4), "v": torch.zeros(1, 2, 0, 3, 2, 4)}
    assert (chunked_cross_attention(**none, chunk_length=4) == 0).all()
    gradients = output_and_gradients(lambda **x: chunked_cross_attention(**x, chunk_length=4), short, QKV)
    assert (gradients[1] == 0).all()


K = torch.zeros(1, 2, 2, 3, 2, 4)
WRONG = {
    "q has shape": {"q": torch.zeros(9, 2, 4)},
    "expected the same": {"v": torch.zeros(1, 2, 2, 3, 2, 5)},
    "batch and head width": {"q": torch.zeros(2, 9, 2, 4)},
    "multiple of the second": {"q": torch.zeros(1, 9, 3, 4)},
    "chunks of 4 make 3": {"q": torch.zeros(1, 12, 2, 4)},
    "neighbor_lengths has shape": {"neighbor_lengths": torch.ones(1, 2)},
    "neighbor_lengths is torch.float32": {"neighbor_lengths": torch.full((1, 2, 2), 2.9)},
    "neighbor_lengths is torch.bool": {"neighbor_lengths": torch.ones(1, 2, 2, dtype=torch.bool)},
    "neighbor_lengths .* spans 0 ... 4; expected 0 ... 3": {"neighbor_lengths": torch.tensor([[[0, 4], [1, 1]]])},
    "neighbor_lengths .* spans -1": {"neighbor_lengths": torch.tensor([[[0, -1], [1, 1]]])},
    "given together": {"cos": torch.ones(7, 2)},
    "cos has 5 positions; 7": {"cos": torch.ones(5, 2), "sin": torch.ones(5, 2)},
    "rotates 6 features": {"cos": torch.ones(7, 3), "sin": torch.ones(7, 3)},
    "q is torch.float64, k torch.float32": {"q": torch.zeros(1, 9, 2, 4, dtype=torch.float64)},
    "expected a floating-point type": {
        "q": torch.zeros(1, 9, 2, 4).int(),
        "k": K.int(),
        "v": K.int(),
    },
    "head width 0": {"q": torch.zeros(1, 9, 2, 0), "k": K[..., :0], "v": K[..., :0]},
    "head width 3": {"q": torch.zeros(1, 9, 2, 3), "k": K[..., :3].clone(), "v": K[..., :3].clone()},
    "head width 258": {
        "q": torch.zeros(1, 9, 2, 258),
        "k": torch.zeros(1, 2, 2, 3, 2, 258),
        "v": torch.zeros(1, 2, 2, 3, 2, 258),
    },
    "q .* has strides": {"q": torch.zeros(1, 9, 4, 2).transpose(2, 3)},
    "one device": {"q": torch.zeros(1, 9, 2, 4, device="meta")},
}


@pytest.mark.parametrize("named", WRONG)
def test_wrong_arguments_are_named(named: str) -> None:
    with pytest.raises(ValueError, match=named):
        chunked_cross_attention(**(inputs() | WRONG[named]), chunk_length=4)
