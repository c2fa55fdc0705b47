"""Products of many rows in the matrix unit: of inputs and weights rounded to bfloat16, whatever is beside them; skipped without one."""

import pytest
import torch
from retro_kernels import cpp
from retro_kernels.blocks import TYPES, dequantize
from retro_kernels.linear import MANY_ROWS, linear, linear_in_blocks
from retro_kernels.reference import Matrix
from torch import Tensor

from tests.kernels.test_blocks import KINDS, matrix

pytestmark = pytest.mark.skipif(
    not cpp.is_available() or "avx512_amx" not in cpp.instruction_sets(), reason="no matrix unit"
)
ROWS = [MANY_ROWS + 1, 96, 530]


def met(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x w' of what the unit multiplies, and the size of its sums."""
    x, weight = x.bfloat16().double(), weight.bfloat16().double()
    return x @ weight.T, x.abs() @ weight.abs().T


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks(kind: str, rows: int) -> None:
    for outputs, inputs in ((16, TYPES[kind].values), (77, 3 * TYPES[kind].values), (64, 1024)):
        m = matrix(kind, outputs, inputs)
        assert m.bias is not None
        x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))
        exact, sizes = met(x, dequantize(m.weight, kind, inputs))
        found = linear_in_blocks(x, m)
        assert ((found - exact - m.bias.double()).abs() <= 4e-6 * (sizes + 1)).all()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (77, 96), (33, 1024), (17, 416)])
def test_bytes(rows: int, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    scale, bias = torch.rand(outputs, generator=generator), torch.randn(outputs, generator=generator)
    x = torch.randn(rows, inputs, generator=generator)
    exact, sizes = met(x, weight.float())
    for b in (None, bias):
        found = linear(x[None], weight, b, scale)[0]
        expected = exact * scale.double() + (0 if b is None else b.double())
        assert ((found - expected).abs() <= 4e-6 * (sizes * scale + 1)).all()


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0"])
def test_rows_that_are_not_whole_blocks(kind: str) -> None:
    m, x = matrix(kind, 20, 70), torch.randn(MANY_ROWS + 7, 70)
    exact, sizes = met(x, dequantize(m.weight, kind, 70))
    assert ((linear_in_blocks(x, m) - exact - m.bias.double()).abs() <= 4e-6 * (sizes + 1)).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_result_does_not_depend_on_what_is_beside_it(threads: int) -> None:
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


def test_what_is_not_finite_shows() -> None:
    m, x = matrix("q4_0", 17, 64), torch.randn(MANY_ROWS + 2, 64)
    x[1, 40], x[2, 3] = float("nan"), float("inf")
    found = linear_in_blocks(x, m).isfinite()
    assert not found[1].any()
    assert not found[2].any()
    assert found[3:].all()


def test_other_builds_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    m, x = matrix("q4_0", 17, 64), torch.randn(MANY_ROWS + 2, 64)
    monkeypatch.setattr(cpp, "instruction_set", lambda: "avx2")
    with pytest.raises(ValueError, match="avx2 has no matrix unit"):
        cpp.many_rows(x, m)
    assert linear_in_blocks(x, m).isfinite().all()
