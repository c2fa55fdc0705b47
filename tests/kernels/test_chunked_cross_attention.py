"""`chunked_cross_attention` as other models call it."""

import pytest
import torch
from retro_kernels.chunked_cross_attention import chunked_cross_attention


def inputs(n: int = 9, l: int = 2, heads: int = 2, groups: int = 2) -> dict[str, torch.Tensor]:  # noqa: E741
    return {
        "q": torch.randn(1, n, heads, 4),
        "k": torch.randn(1, l, 2, 3, groups, 4),
        "v": torch.randn(1, l, 2, 3, groups, 4),
    }


def test_shapes() -> None:
    assert chunked_cross_attention(**inputs(), chunk_length=4).shape == (1, 9, 2, 4)
    short = inputs(n=3, l=0)
    assert (chunked_cross_attention(**short, chunk_length=4) == 0).all()
    empty = {"q": torch.zeros(0, 9, 2, 4), "k": torch.zeros(0, 2, 2, 3, 2, 4), "v": torch.zeros(0, 2, 2, 3, 2, 4)}
    assert chunked_cross_attention(**empty, chunk_length=4).shape == (0, 9, 2, 4)
    none = {"q": torch.randn(1, 9, 2, 4), "k": torch.zeros(1, 2, 0, 3, 2, 4), "v": torch.zeros(1, 2, 0, 3, 2, 4)}
    assert (chunked_cross_attention(**none, chunk_length=4) == 0).all()


WRONG = {
    "q has shape": {"q": torch.zeros(9, 2, 4)},
    "expected the same": {"v": torch.zeros(1, 2, 2, 3, 2, 5)},
    "batch and head width": {"q": torch.zeros(2, 9, 2, 4)},
    "multiple of the second": {"q": torch.zeros(1, 9, 3, 4)},
    "chunks of 4 make 3": {"q": torch.zeros(1, 12, 2, 4)},
    "neighbor_lengths has shape": {"neighbor_lengths": torch.ones(1, 2)},
    "given together": {"cos": torch.ones(7, 2)},
    "cos has 5 positions; 7": {"cos": torch.ones(5, 2), "sin": torch.ones(5, 2)},
}


@pytest.mark.parametrize("named", WRONG)
def test_wrong_arguments_are_named(named: str) -> None:
    with pytest.raises(ValueError, match=named):
        chunked_cross_attention(**(inputs() | WRONG[named]), chunk_length=4)
