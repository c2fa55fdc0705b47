"""`rms_norm`: close to float64 by every instruction set, PyTorch's where more than numbers is asked for."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from retro_kernels import cpp
from retro_kernels.norm import rms_norm

TYPES = [torch.float32, torch.bfloat16, torch.float64]
BOUNDS = {torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float64: 1e-12}  # of values of about 1: 2^-8 is bf16's


def assert_close(x: torch.Tensor, weight: torch.Tensor | None) -> None:
    found = rms_norm(x, weight, 1e-5)
    exact = F.rms_norm(x.double(), x.shape[-1:], None if weight is None else weight.double(), 1e-5)
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    torch.testing.assert_close(found.double(), exact, rtol=BOUNDS[x.dtype], atol=BOUNDS[x.dtype])


@settings(deadline=None)
@given(
    st.integers(1, 9), st.integers(2, 200), st.sampled_from(TYPES), st.booleans(), st.floats(0.1, 9), st.integers(0, 9)
)
def test_against_float64(rows: int, width: int, dtype: torch.dtype, is_plain: bool, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(*shape, width, generator=generator) for shape in ((rows, 1), ()))
    assert_close((spread * x).to(dtype), None if is_plain else weight.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [3, 16, 576, 1003])
def test_every_instruction_set(instruction_set: str, dtype: torch.dtype, width: int) -> None:
    x, weight = (torch.randn(*shape, width).to(dtype) for shape in ((70,), ()))
    assert_close(x, weight)
    assert_close(x[::2], weight)
    assert torch.equal(rms_norm(x[:1], weight, 1e-5), rms_norm(x, weight, 1e-5)[:1]), "whatever rows are beside it"


def test_what_is_asked_for_beside_numbers_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "rms_norm", None)
    x, weight = torch.randn(4, 24), torch.ones(24, requires_grad=True)
    rms_norm(x, weight, 1e-5).sum().backward()
    assert weight.grad is not None
    torch.func.jvp(lambda x: rms_norm(x, weight.detach(), 1e-5), (x,), (x,))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rms_norm(x, weight, 1e-5)


def test_other_shapes_are_named() -> None:
    for weight in (torch.ones(5), torch.ones(1, 4)):
        with pytest.raises(ValueError, match=r"expected \[..., d\] and \[d\]"):
            rms_norm(torch.ones(3, 4), weight, 1e-5)
    assert rms_norm(torch.ones(0, 4), None, 1e-5).shape == (0, 4)
