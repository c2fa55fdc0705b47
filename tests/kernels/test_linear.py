"""`linear` for a few rows: close to float64, the same bits whatever rows are beside, wrong arguments named."""

import pytest
import torch
import torch.nn.functional as F
from retro_kernels import cpp
from retro_kernels.blocks import rounded
from retro_kernels.linear import MANY_ROWS, linear
from retro_kernels.products import product
from torch import Tensor


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 17, MANY_ROWS + 1])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 2), (8, 3), (24, 4), (100, 200), (256, 32), (1601, 50)])
def test_against_float64(rows: int, inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator)
    weight, bias = torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)
    for b in (None, bias):
        exact = x.double() @ weight.double().T + (0 if b is None else b.double())
        for given in (x, x[:, None], x.T.contiguous().T):
            found = linear(given, weight, b)
            assert found.shape == (*given.shape[:-1], outputs)
            assert (found.reshape(exact.shape) - exact).abs().max() <= 1e-6 * (inputs + 10)


def seen(x: Tensor) -> Tensor:
    """What int8 weights meet: bytes in C++."""
    return rounded(x.float()) if cpp.is_available() else x


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 17, 50, MANY_ROWS + 1])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 2), (24, 4), (64, 80), (100, 200), (577, 33), (1601, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_weights_against_float64(
    instruction_set: str, rows: int, inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    real, bias = torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)
    scale = torch.rand(outputs, generator=generator) / 127
    bytes_, narrow = (real * 40).clamp(-127, 127).to(torch.int8), real.bfloat16()
    is_bf16 = cpp.is_available() and cpp.multiplies_bf16()
    error = 8e-3 if dtype == torch.bfloat16 or rows > MANY_ROWS and is_bf16 else 1e-6 * (inputs + 10)
    for b in (None, bias):
        met = x if rows > MANY_ROWS and is_bf16 else seen(x)
        exact = met.double() @ (bytes_.double() * scale.double()[:, None]).T + (0 if b is None else b.double())
        found = linear(x, bytes_, b, scale)
        assert found.dtype == dtype
        assert (found - exact).abs().max() <= error * (1 + exact.abs().max())
    exact = x.bfloat16().double() @ narrow.double().T + bias.bfloat16().double()
    found = linear(x.bfloat16(), narrow, bias.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() <= 8e-3 * (1 + exact.abs().max())


@pytest.mark.skipif(not cpp.is_available(), reason="no C++ extension")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    "inputs", [96, 100, 1601]
)  # 96: whole tiles of a matrix unit; 1601: several blocks, and a rest
def test_a_row_does_not_depend_on_the_rows_beside_it(instruction_set: str, kind: torch.dtype, inputs: int) -> None:
    rows = 21  # three tiles, or more
    x, weight = torch.randn(rows, inputs), (20 * torch.randn(77, inputs)).to(kind)
    x = x.bfloat16() if kind == torch.bfloat16 else x
    scale = torch.rand(77) if kind == torch.int8 else None
    together = linear(x, weight, scale=scale)
    for first in range(rows):
        for last in range(first + 1, rows + 1):
            assert torch.equal(linear(x[first:last], weight, scale=scale), together[first:last])


@pytest.mark.skipif(not cpp.is_available(), reason="no C++ extension")
def test_bytes_of_inputs(instruction_set: str) -> None:
    """Each 32 inputs have a scale of their own; what is not finite stays so; 0 and what is tiny is 0."""
    x, weight, scale = torch.zeros(4, 70), torch.randint(-128, 128, (9, 70), dtype=torch.int8), torch.ones(9)
    x[0, 3], x[0, 40:] = 1e4, torch.randn(30)  # a massive activation costs the others of its run alone
    x[1, 69], x[2, 5] = torch.nan, torch.inf
    x[3] = 1e-42
    found = linear(x, weight, None, scale)
    exact = rounded(x[0]).double() @ weight.double().T
    assert (found[0] - exact).abs().max() <= 1e-6 * exact.abs().max()
    assert found[1].isnan().all() and not found[2].isfinite().any()
    assert torch.equal(found[3], torch.zeros(9))
    assert (rounded(x[0]) - x[0])[64:].abs().max() <= x[0, 64:].abs().max() / 254


@pytest.mark.skipif(not cpp.is_available() or "avx512_amx" not in cpp.instruction_sets(), reason="no matrix unit")
@pytest.mark.parametrize("rows", [MANY_ROWS + 1, 96, 530])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (77, 96), (33, 1024), (17, 416)])
def test_bytes_of_many_rows_in_the_matrix_unit(rows: int, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    scale, bias = torch.rand(outputs, generator=generator), torch.randn(outputs, generator=generator)
    x = torch.randn(rows, inputs, generator=generator)
    met = x.bfloat16().double()
    exact, sizes = met @ weight.double().T, met.abs() @ weight.double().abs().T
    for b in (None, bias):
        found = linear(x[None], weight, b, scale)[0]
        expected = exact * scale.double() + (0 if b is None else b.double())
        assert ((found - expected).abs() <= 4e-6 * (sizes * scale + 1)).all()


def test_other_types_and_empty() -> None:
    x, weight = torch.randn(3, 8).double(), torch.randn(5, 8).double()
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))
    assert linear(torch.randn(0, 8), torch.randn(5, 8)).shape == (0, 5)
    weight = torch.randn(8, 5).T
    assert torch.allclose(linear(torch.ones(2, 8), weight), weight.sum(1).expand(2, 5), atol=1e-5)


def test_wrong_arguments_are_named() -> None:
    x, weight = torch.randn(2, 8), torch.randn(5, 8)
    with pytest.raises(ValueError, match=r"expected x \[..., 8\]"):
        linear(torch.randn(2, 7), weight)
    with pytest.raises(ValueError, match=r"bias and scale \[5\]"):
        linear(x, weight, torch.randn(4))
    with pytest.raises(ValueError, match="int8 weights with float32 scale"):
        linear(x, weight, scale=torch.ones(5))
    with pytest.raises(ValueError, match="expected one type"):
        linear(x, weight.double())


def test_compiled_and_under_autocast_it_is_pytorchs() -> None:
    x, weight, bias = torch.randn(5, 24), torch.randn(7, 24), torch.randn(7)
    compiled = torch.compile(
        lambda x: linear(x, weight, bias) + product(x, weight, bias), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(x), 2 * F.linear(x, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
        assert linear(x, weight, bias).dtype == torch.bfloat16
