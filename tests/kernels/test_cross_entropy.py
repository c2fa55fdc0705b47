"""`cross_entropy_`: losses and gradients close to float64, in the logits' place; what is not finite stays so; wrong arguments named."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from retro_kernels import reference
from retro_kernels.cross_entropy import cross_entropy_

TYPES = [torch.float32, torch.bfloat16, torch.float64]


def exact(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = logits.double().detach().clone().requires_grad_()
    losses = F.cross_entropy(x, labels, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), x)[0]


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 300), st.sampled_from(TYPES), st.floats(0.01, 60), st.integers(0, 9))
def test_against_float64(rows: int, vocab: int, dtype: torch.dtype, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, vocab, generator=generator)).to(dtype)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    losses, gradient = exact(logits, labels)
    kept = logits.clone()
    assert torch.equal(cross_entropy_(logits, labels, has_gradient=False), (found := cross_entropy_(kept, labels)))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), losses, rtol=2e-6, atol=1e-5)
    assert float((kept.double() - gradient).abs().max()) <= {torch.bfloat16: 4e-3}.get(dtype, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_so(instruction_set: str, dtype: torch.dtype) -> None:
    labels = torch.tensor([1, 1, 1])
    logits = torch.randn(3, 40).to(dtype)
    logits[0, 7], logits[1, 39], logits[2, 5] = float("nan"), float("inf"), float("-inf")
    losses = cross_entropy_(logits.clone(), labels)
    assert losses.isfinite().tolist() == [False, False, True]
    assert torch.allclose(losses[2:], reference.cross_entropy_(logits[2:].clone(), labels[2:], False), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 7, 64, 1003])
def test_every_instruction_set(instruction_set: str, dtype: torch.dtype, vocab: int) -> None:
    logits, labels = (3 * torch.randn(5, vocab)).to(dtype), torch.randint(0, vocab, (5,))
    losses, gradient = exact(logits, labels)
    torch.testing.assert_close(cross_entropy_(logits, labels).double(), losses, rtol=2e-6, atol=1e-5)
    assert float((logits.double() - gradient).abs().max()) <= (4e-3 if dtype == torch.bfloat16 else 2e-6)


def test_registered_and_compiled() -> None:
    logits, labels = torch.randn(5, 33), torch.randint(0, 33, (5,))
    torch.library.opcheck(torch.ops.retro_kernels.cross_entropy_, (logits.clone(), labels, True))
    made = torch.compile(lambda x, y: (cross_entropy_(x, y), x), fullgraph=True)
    losses, gradient = made(logits.clone(), labels)
    expected = exact(logits, labels)
    torch.testing.assert_close(losses, expected[0].float())
    torch.testing.assert_close(gradient, expected[1].float())


def test_rows_that_are_not_packed_and_none() -> None:
    wide, labels = torch.randn(4, 20), torch.randint(0, 10, (4,))
    expected = exact(wide[:, ::2], labels)
    torch.testing.assert_close(cross_entropy_(wide[:, ::2], labels), expected[0].float())
    torch.testing.assert_close(wide[:, ::2], expected[1].float())
    assert cross_entropy_(torch.randn(0, 5), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_wrong_arguments_are_named() -> None:
    logits, labels = torch.randn(3, 5), torch.zeros(3, dtype=torch.long)
    for bad in (labels[:2], labels.int(), labels[:, None]):
        with pytest.raises(ValueError, match=r"expected \[t, V\] and int64 \[t\]"):
            cross_entropy_(logits, bad)
    with pytest.raises(ValueError, match=r"expected \[t, V\]"):
        cross_entropy_(logits[0], labels)
    for bad in (labels + 5, labels - 1):
        with pytest.raises(ValueError, match=r"labels \(3,\) spans .* expected 0 \.\.\. 4"):
            cross_entropy_(logits, bad)
