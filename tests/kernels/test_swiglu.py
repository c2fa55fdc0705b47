"""`swiglu`: close to float64 by every instruction set and for every number, PyTorch's where more than numbers is asked for."""

import pytest
import torch
import torch.nn.functional as F
from retro_kernels import cpp
from retro_kernels.swiglu import swiglu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (70, 1536)])
def test_against_float64(instruction_set: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate, up = (4 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    found = swiglu(gate, up)
    assert found.dtype == dtype
    bound = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(found.double(), F.silu(gate.double()) * up.double(), rtol=bound, atol=bound)
    assert torch.equal(swiglu(gate.T, up.T), found.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_so(instruction_set: str, dtype: torch.dtype) -> None:
    gate = torch.tensor([float("nan"), float("inf"), -1e30, 1e30, 0.0] * 9).to(dtype)
    found, expected = swiglu(gate, torch.ones_like(gate)), F.silu(gate)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_what_is_asked_for_beside_numbers_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "swiglu", None)
    gate, up = torch.randn(4, 24, requires_grad=True), torch.randn(4, 24)
    swiglu(gate, up).sum().backward()
    assert gate.grad is not None
    torch.func.jvp(lambda x: swiglu(x, up), (up,), (up,))


def test_others_are_named() -> None:
    for up in (torch.ones(3, 5), torch.ones(3, 4).bfloat16()):
        with pytest.raises(ValueError, match="expected the same of both"):
            swiglu(torch.ones(3, 4), up)
