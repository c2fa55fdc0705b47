"""The fused head and cross-entropy against the plain one."""

import pytest
import torch
import torch.nn.functional as F

from retro_engine.model.loss import TOKENS, each_cross_entropy, linear_cross_entropy


@pytest.mark.parametrize("count", [0, 1, TOKENS, TOKENS + 1, 3 * TOKENS - 7])
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_the_plain_loss(count: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(1, count, 16, generator=generator).requires_grad_()
    weight = torch.randn(40, 16, generator=generator).requires_grad_()
    bias = torch.randn(40, generator=generator).requires_grad_() if has_bias else None
    labels = torch.randint(0, 40, (1, count), generator=generator)
    labels[:, ::3] = -100
    inputs = [hidden, weight, *([bias] if bias is not None else [])]
    found = linear_cross_entropy(hidden, weight, bias, labels)
    plain = F.cross_entropy(
        F.linear(hidden, weight, bias).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-4)
    for mine, theirs in zip(torch.autograd.grad(found / 3, inputs), torch.autograd.grad(plain / 3, inputs)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_in_bf16_the_gradients_stay_close() -> None:
    hidden = torch.randn(1, 300, 32).requires_grad_()
    weight = (torch.randn(500, 32) / 6).requires_grad_()
    labels = torch.randint(0, 500, (1, 300))
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, None, labels)
    plain = F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), labels.flatten(), reduction="sum")
    assert abs(float(found.detach() / plain.detach()) - 1) < 8e-3
    for mine, theirs in zip(torch.autograd.grad(found, [hidden, weight]), torch.autograd.grad(plain, [hidden, weight])):
        assert float((mine - theirs).norm() / theirs.norm()) < 1.6e-2


@pytest.mark.parametrize("count", [1, TOKENS, 3 * TOKENS - 7])
def test_losses_of_each_token_without_the_logits_of_all(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(2, count, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(40, 16, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 40, (2, count), generator=generator)
    labels[:, ::3] = -100
    sizes: list[int] = []

    def head(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return rows @ weight.T

    losses, best = each_cross_entropy(hidden, head, labels)
    assert sum(sizes) == 2 * count
    assert max(sizes) <= TOKENS
    logits = hidden @ weight.T
    plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    torch.testing.assert_close(losses, plain.view(labels.shape), rtol=1e-12, atol=1e-12)
    assert torch.equal(best, logits.argmax(-1))
    assert not losses[:, 0].any()
