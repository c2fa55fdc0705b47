"""Weights in blocks: values as ggml has them, products close to float64, the same bits whatever rows and outputs are beside."""

import numpy as np
import pytest
import torch
from retro_kernels import blocks, cpp, reference
from retro_kernels.blocks import TYPES, dequantize, round_to_blocks, rounded
from retro_kernels.linear import MANY_ROWS, linear_in_blocks
from retro_kernels.quantize import quantize
from retro_kernels.reference import FeedForwardPart, Matrix, Norm
from retro_kernels.step import Steps
from torch import Tensor

KINDS = list(TYPES)
SCALED = {
    "q6_k": (208,),
    "q4_0": (0,),
    "q5_0": (0,),
    "q8_0": (0,),
}  # where the float16 of a block lie; else the first two
ROWS = (1, 2, 3, 4, 8, 13)
needs_matrix_unit = pytest.mark.skipif(
    not cpp.is_available() or "avx512_amx" not in cpp.instruction_sets(), reason="no matrix unit"
)


def random_blocks(kind: str, outputs: int, inputs: int, seed: int = 0) -> Tensor:
    """All bits at random, but for scales of a sensible size."""
    random = np.random.default_rng(seed)
    width = TYPES[kind].row_bytes(inputs)
    raw = random.integers(0, 256, (outputs, width), dtype=np.uint8).reshape(-1, TYPES[kind].bytes)
    for place in SCALED.get(kind, (0, 2)):
        raw[:, place : place + 2] = (random.standard_normal((len(raw), 1)) / 64).astype(np.float16).view(np.uint8)
    return torch.from_numpy(raw.reshape(outputs, width))


def matrix(kind: str, outputs: int, inputs: int, seed: int = 0) -> Matrix:
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(seed))
    return Matrix(random_blocks(kind, outputs, inputs, seed), bias, blocks=kind, inputs=inputs)


def whole_bytes(rows: int, inputs: int) -> Tensor:
    """Inputs that rounding leaves as they are: whole numbers to +-127, which every block of 32 has."""
    x = torch.randint(-127, 128, (rows, inputs), generator=torch.Generator().manual_seed(rows)).float()
    x[:, ::32] = 127.0
    return x * 2.0**-7


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_ggmls(kind: str) -> None:
    quants = pytest.importorskip("gguf.quants", reason="gguf is not installed")
    from gguf.constants import GGMLQuantizationType

    inputs = 3 * TYPES[kind].values
    given = random_blocks(kind, 5, inputs)
    theirs = quants.dequantize(given.numpy(), GGMLQuantizationType(TYPES[kind].number))
    assert torch.equal(dequantize(given, kind, inputs), torch.from_numpy(theirs))
    assert torch.equal(dequantize(given, kind, inputs - 7), torch.from_numpy(theirs)[:, :-7])


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0"])
def test_rounding_to_blocks(instruction_set: str, kind: str) -> None:
    """As its twin, no further from the weights than ggml's own rounding; what cannot be scaled is 0."""
    quants = pytest.importorskip("gguf.quants", reason="gguf is not installed")
    from gguf.constants import GGMLQuantizationType

    number = GGMLQuantizationType(TYPES[kind].number)
    weight = torch.randn(33, 96, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[3] = 0
    found = dequantize(quantize(weight, kind), kind, 96)
    theirs = torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), number), number))
    assert (found - weight).norm() <= (theirs - weight).norm() * (1.001 if kind == "q8_0" else 0.97)
    assert torch.equal(found[3], torch.zeros(96))
    twin = dequantize(round_to_blocks(weight.reshape(-1, 32), kind), kind, 32).reshape(33, 96)
    assert (found - twin).norm() <= 0.01 * (found - weight).norm()
    for size in (1e-4 if kind != "q8_0" else 1e-2, 1e3):  # scales that are subnormal float16, and large ones
        far = dequantize(quantize(weight * size, kind), kind, 96)
        assert (far - weight * size).norm() < 0.09 * (weight * size).norm()
    odd = quantize(weight[:, :70], kind)
    assert odd.shape == (33, TYPES[kind].row_bytes(70))
    assert (dequantize(odd, kind, 70) - weight[:, :70]).norm() / weight[:, :70].norm() < 0.1


@pytest.mark.skipif(not cpp.is_available(), reason="no C++ extension")
@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(instruction_set: str, kind: str) -> None:
    """Inputs that are bytes lose nothing; others at most half a step of their 32 times the weights."""
    for outputs, inputs in ((33, 2 * TYPES[kind].values), (3, TYPES[kind].values)):
        m = matrix(kind, outputs, inputs)
        assert m.bias is not None
        weight = dequantize(m.weight, kind, inputs).double()
        for rows in ROWS:
            x = whole_bytes(rows, inputs)
            sizes = x.double().abs() @ weight.abs().T
            exact = x.double() @ weight.T + m.bias.double()
            assert ((linear_in_blocks(x, m) - exact).abs() <= 2e-7 * (inputs / 32 + 4) * (sizes + 1)).all()
            x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))
            step = (
                (x.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127).expand(-1, -1, 32).flatten(-2).double()
            )
            bound = 0.5001 * step @ weight.abs().T + 1e-5 * (sizes + 1)
            assert ((linear_in_blocks(x, m) - (x.double() @ weight.T + m.bias.double())).abs() <= bound).all()


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0"])
def test_rows_that_are_not_whole_blocks(instruction_set: str, kind: str) -> None:
    m = matrix(kind, 20, 70)
    for rows in (1, 5):
        x = whole_bytes(rows, 70)
        exact = x.double() @ dequantize(m.weight, kind, 70).double().T + m.bias.double()  # type: ignore[union-attr]
        assert (linear_in_blocks(x[:, None], m)[:, 0] - exact).abs().max() < 1e-5 * (1 + exact.abs().max())


@pytest.mark.skipif(not cpp.is_available(), reason="no C++ extension")
@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0", "q6_k"])
def test_a_result_does_not_depend_on_what_is_beside_it(instruction_set: str, kind: str) -> None:
    inputs, rows = 256, 19
    m, x = matrix(kind, 77, inputs), torch.randn(rows, inputs)
    together = linear_in_blocks(x, m)
    for first in range(rows):
        for last in {first + 1, min(first + 3, rows), min(first + 8, rows), rows}:
            assert torch.equal(linear_in_blocks(x[first:last], m), together[first:last])
    for first, last in ((0, 5), (13, 50), (76, 77)):
        part = Matrix(m.weight[first:last], m.bias[first:last], blocks=kind, inputs=inputs)  # type: ignore[index]
        assert torch.equal(linear_in_blocks(x, part), together[:, first:last])


def test_what_is_not_finite_shows(instruction_set: str) -> None:
    m = matrix("q4_0", 17, 64)
    x = torch.randn(3, 64)
    x[1, 40], x[2, 3] = float("nan"), float("inf")
    found = linear_in_blocks(x, m)
    assert found[0].isfinite().all()
    assert not found[1].isfinite().any()
    assert not found[2].isfinite().any()
    for size in (0.0, 1e-38, 1e-43):
        found = linear_in_blocks(torch.full((2, 64), size), m)
        assert torch.equal(found, m.bias.expand(2, -1))  # type: ignore[union-attr]


def test_steps_of_blocks(instruction_set: str) -> None:
    """A part of a step is its twin's, in C++ and out of it."""
    D, wide = 64, 96
    norm = Norm(torch.rand(D), None, 1e-5, True)
    matrices = matrix("q4_0", wide, D), matrix("q4_1", wide, D, 1), matrix("q8_0", D, wide, 2)
    part = FeedForwardPart(norm, *matrices, "swiglu")
    x, steps = torch.randn(5, D), Steps([part])
    assert not cpp.is_available() or steps.takes(x)
    found, twin = steps(x), reference.step(x, part)
    assert (found - twin).norm() / twin.norm() < 2e-3  # inputs beside the border of two bytes
    short = Matrix(matrices[0].weight, matrices[0].bias, blocks="q4_0", inputs=32)
    with pytest.raises(ValueError, match=r"expected uint8, q4_0 blocks of 32 values"):
        Steps([FeedForwardPart(norm, short, matrices[1], matrices[2], "swiglu")])


def test_wrong_arguments_and_empty() -> None:
    m = matrix("q8_0", 4, 64)
    assert linear_in_blocks(torch.zeros(0, 64), m).shape == (0, 4)
    with pytest.raises(ValueError, match=r"expected x \[..., 64\]"):
        linear_in_blocks(torch.zeros(2, 32), m)
    with pytest.raises(ValueError, match="the types are q4_0"):
        linear_in_blocks(torch.zeros(2, 64), Matrix(m.weight, blocks="q2_k", inputs=64))
    with pytest.raises(RuntimeError, match="no gradient"):
        linear_in_blocks(torch.zeros(2, 64, requires_grad=True), m)
    half = linear_in_blocks(whole_bytes(2, 64).bfloat16(), m)
    assert half.dtype == torch.bfloat16
    assert (rounded(torch.zeros(1, 5)) == 0).all()
    assert blocks.TYPES["q4_k"].row_bytes(300) == 288


def met(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x w' of what the unit multiplies, and the size of its sums."""
    x, weight = x.bfloat16().double(), weight.bfloat16().double()
    return x @ weight.T, x.abs() @ weight.abs().T


@needs_matrix_unit
@pytest.mark.parametrize("rows", [MANY_ROWS + 1, 96, 530])
@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_in_the_matrix_unit(kind: str, rows: int) -> None:
    for outputs, inputs in ((16, TYPES[kind].values), (77, 3 * TYPES[kind].values), (64, 1024)):
        m = matrix(kind, outputs, inputs)
        assert m.bias is not None
        x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))
        exact, sizes = met(x, dequantize(m.weight, kind, inputs))
        found = linear_in_blocks(x, m)
        assert ((found - exact - m.bias.double()).abs() <= 4e-6 * (sizes + 1)).all()


@needs_matrix_unit
@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0"])
def test_many_rows_that_are_not_whole_blocks(kind: str) -> None:
    m, x = matrix(kind, 20, 70), torch.randn(MANY_ROWS + 7, 70)
    exact, sizes = met(x, dequantize(m.weight, kind, 70))
    assert ((linear_in_blocks(x, m) - exact - m.bias.double()).abs() <= 4e-6 * (sizes + 1)).all()  # type: ignore[union-attr]


@needs_matrix_unit
@pytest.mark.parametrize("threads", [1, 2])
def test_a_result_among_many_does_not_depend_on_what_is_beside_it(threads: int) -> None:
    before, inputs, rows = torch.get_num_threads(), 512, 600
    m, x = matrix("q4_k", 112, inputs), torch.randn(rows, inputs)
    try:
        torch.set_num_threads(threads)
        together = linear_in_blocks(x, m)
        torch.set_num_threads(1)
        for first, last in ((0, 65), (100, 200), (530, 600)):
            assert torch.equal(linear_in_blocks(x[first:last], m), together[first:last])
        for first, last in ((0, 16), (13, 50), (96, 112)):
            part = Matrix(m.weight[first:last], m.bias[first:last], blocks="q4_k", inputs=inputs)  # type: ignore[index]
            assert torch.equal(linear_in_blocks(x, part), together[:, first:last])
    finally:
        torch.set_num_threads(before)


@needs_matrix_unit
def test_what_is_not_finite_shows_among_many() -> None:
    m, x = matrix("q4_0", 17, 64), torch.randn(MANY_ROWS + 2, 64)
    x[1, 40], x[2, 3] = float("nan"), float("inf")
    found = linear_in_blocks(x, m).isfinite()
    assert not found[1].any()
    assert not found[2].any()
    assert found[3:].all()


@needs_matrix_unit
def test_other_builds_have_no_matrix_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    m, x = matrix("q4_0", 17, 64), torch.randn(MANY_ROWS + 2, 64)
    monkeypatch.setattr(cpp, "instruction_set", lambda: "avx2")
    with pytest.raises(ValueError, match="avx2 has no matrix unit"):
        cpp.many_rows(x, m)
    assert linear_in_blocks(x, m).isfinite().all()
