"""Choosing a token: cuts, penalties, seeds, and settings that contradict each other."""

import math
from typing import Any

import pytest
import torch

from retro_engine.errors import UsageError
from retro_engine.generate.sampling import TINY, Sampling, adjusted, choose

LOGITS = torch.tensor([0.0, 3.0, 2.0, -1.0])


def draw(**options: Any) -> set[int]:
    sampling = Sampling(greedy=False, **options)
    return {choose(LOGITS, sampling, torch.Generator().manual_seed(seed)) for seed in range(200)}


def test_what_is_kept() -> None:
    assert choose(LOGITS, Sampling(), torch.Generator()) == 1
    assert draw(temperature=1.0) == {0, 1, 2, 3}
    assert draw(top_k=2) == {1, 2}
    assert draw(top_k=9) == {0, 1, 2, 3}
    assert draw(top_p=0.5) == {1}
    assert draw(top_p=0.9) == {1, 2}
    assert draw(temperature=1e-3) == {1}
    assert draw(min_p=0.2) == {1, 2}  # e^-1 of the likeliest, and e^-3
    assert draw(min_p=0.4) == {1}
    assert draw(min_p=1.0) == {1}
    assert draw(min_p=0.04, temperature=2.0) == {0, 1, 2, 3}  # of what is left after the temperature


def test_a_seed_gives_the_same_tokens() -> None:
    same = [choose(LOGITS, Sampling(greedy=False), torch.Generator().manual_seed(5)) for _ in range(5)]
    assert len(set(same)) == 1


def test_repetition_penalty_and_minimum_length() -> None:
    found = adjusted(LOGITS, Sampling(repetition_penalty=2.0), [1, 3, 1], {}, [2])
    assert found.tolist() == [0.0, 1.5, 2.0, -2.0]
    short = Sampling(min_tokens=2)
    assert adjusted(LOGITS, short, [], {3: 1}, [1]).tolist() == [0.0, -math.inf, 2.0, -1.0]
    assert torch.equal(adjusted(LOGITS, short, [], {3: 2}, [1]), LOGITS)
    assert LOGITS.tolist() == [0.0, 3.0, 2.0, -1.0]  # it is not changed


def test_presence_frequency_and_bias() -> None:
    """Of what was generated, not of the prompt; each at the logit itself."""
    pressed = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    assert adjusted(LOGITS, pressed, [0, 1, 2], {1: 1, 3: 4}, []).tolist() == [0.0, 2.25, 2.0, -2.5]
    assert adjusted(LOGITS, pressed, [0, 1, 2], {}, []) is LOGITS
    biased = Sampling(logit_bias=((1, -100.0), (3, 2.5)))
    assert adjusted(LOGITS, biased, [], {}, []).tolist() == [0.0, -97.0, 2.0, 1.5]
    assert choose(adjusted(LOGITS, biased, [], {}, []), biased, torch.Generator()) == 2
    wanted = Sampling(logit_bias=((3, 100.0),))
    assert choose(adjusted(LOGITS.to(torch.bfloat16), wanted, [], {}, []), wanted, torch.Generator()) == 3
    assert LOGITS.tolist() == [0.0, 3.0, 2.0, -1.0]


@pytest.mark.parametrize("wrong", [
    {"temperature": 0}, {"temperature": math.inf}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"seed": -1},
    {"temperature": 1e-39}, {"temperature": 1e39}, {"top_p": 1e-60}, {"repetition_penalty": 1e-39}, {"repetition_penalty": 1e300},
    {"min_p": -0.1}, {"min_p": 1.1}, {"min_p": math.nan}, {"presence_penalty": 2.1}, {"frequency_penalty": -2.1},
    {"frequency_penalty": math.nan}, {"logit_bias": ((0, 101.0),)}, {"logit_bias": ((0, math.nan),)},
    {"repetition_penalty": 0}, {"repetition_penalty": math.inf}, {"min_tokens": -1},
])  # fmt: skip
def test_what_cannot_be_used(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"inference.{next(iter(wrong))}"):
        Sampling(greedy=False, **wrong)


@pytest.mark.parametrize("wrong", [{"temperature": 0.7}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_greedy_contradicts_sampling(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="contradicts greedy=true"):
        Sampling(**wrong)


@pytest.mark.parametrize(
    "logits", [LOGITS, LOGITS * 1e30, LOGITS.to(torch.bfloat16), torch.tensor([-3e38, 3e38, 0.0, -math.inf])]
)
def test_the_smallest_numbers_choose_the_likeliest(logits: torch.Tensor) -> None:
    """Nothing becomes infinite or no number on the way."""
    for options in (
        {"temperature": TINY},
        {"temperature": 1e-30},
        {"top_p": TINY},
        {"temperature": TINY, "top_p": TINY},
    ):
        sampling = Sampling(greedy=False, **options)
        assert {choose(logits, sampling, torch.Generator().manual_seed(seed)) for seed in range(20)} == {1}


@pytest.mark.parametrize("penalty", [TINY, 1e-30, 1e30, 3e38])
def test_penalties_stay_numbers(penalty: float) -> None:
    found = adjusted(LOGITS, Sampling(repetition_penalty=penalty), [0, 1, 2, 3], {}, [9])
    assert torch.isfinite(found).all()
    assert choose(found, Sampling(greedy=False), torch.Generator()) in range(4)
