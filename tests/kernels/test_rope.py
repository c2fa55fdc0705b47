"""`rope` and `rope_qk` as other models call them."""

import pytest
import torch
from retro_kernels.rope import rope, rope_qk

COS, SIN = torch.ones(6, 2), torch.zeros(6, 2)


def test_both_at_once_and_inputs_are_kept() -> None:
    q, k = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 8)
    before = q.clone()
    rotated_q, rotated_k = rope_qk(q, k, COS * 0.6, COS * 0.8)
    torch.testing.assert_close(rotated_q, rope(q, COS * 0.6, COS * 0.8))
    torch.testing.assert_close(rotated_k, rope(k, COS * 0.6, COS * 0.8))
    assert torch.equal(q, before)
    assert rope(torch.zeros(0, 6, 2, 8), COS, SIN).shape == (0, 6, 2, 8)
    assert rope(torch.zeros(2, 0, 2, 8), COS, SIN).shape == (2, 0, 2, 8)


@pytest.mark.parametrize(("args", "named"), [
    ((torch.zeros(6, 2, 8), COS, SIN), "x has shape"),
    ((torch.zeros(1, 6, 2, 8), COS, SIN[:3]), "cos"),
    ((torch.zeros(1, 6, 2, 2), COS, SIN), "rotates 4 features"),
    ((torch.zeros(1, 7, 2, 8), COS, SIN), "6 positions"),
    ((torch.zeros(1, 6, 2, 8), COS, SIN, torch.zeros(5, dtype=torch.long)), "positions has shape"),
])  # fmt: skip
def test_wrong_arguments_are_named(args: tuple[torch.Tensor, ...], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        rope(*args)
