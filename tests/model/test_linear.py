"""Matrices in int8 against their weights in fp32."""

import pytest
import torch
import torch.nn.functional as F

from retro_engine.model.linear import Int8Linear


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 100])
def test_an_int8_matrix(rows: int) -> None:
    """Off by at most half a step of the channel's scale a weight."""
    generator = torch.Generator().manual_seed(rows)
    weight, bias = torch.randn(48, 64, generator=generator), torch.randn(48, generator=generator)
    x = torch.randn(rows, 2, 64, generator=generator)
    exact = F.linear(x, weight, bias)
    for matrix in (Int8Linear(weight, bias), Int8Linear(weight, None)):
        found = matrix(x) if matrix.bias is not None else matrix(x) + bias
        assert found.shape == exact.shape
        assert (found - exact).norm() / exact.norm() < 0.012
    zero = Int8Linear(torch.zeros(4, 64), None)
    assert torch.equal(zero(x), torch.zeros(rows, 2, 4))
