"""Learning-rate schedules and what is decayed."""

import pytest
from helpers import small_model

from retro_engine.config import OptimConfig, SchedConfig
from retro_engine.train.optimizer import build_optimizer, learning_rate


def rates(name: str, **sched: int) -> list[float]:
    config = OptimConfig(lr=1.0, sched=SchedConfig(name=name, warmup_steps=10, min_lr=0.1, **sched))
    return [learning_rate(config, step, 100) for step in range(110)]


def test_schedules() -> None:
    for name in ("CosineAnnealing", "WSD", "constant"):
        found = rates(name)
        assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
        assert max(found) == 1.0
    cosine, wsd = rates("CosineAnnealing"), rates("WSD", constant_steps=40)
    assert cosine[55] == pytest.approx(0.55)
    assert cosine[100:] == pytest.approx([0.1] * 10)
    assert wsd[10:50] == [1.0] * 40
    assert wsd[75] == pytest.approx(0.55)
    assert wsd[100:] == pytest.approx([0.1] * 10)
    assert rates("constant")[10:] == [1.0] * 100


def test_only_matrices_are_decayed() -> None:
    model = small_model().float()
    optimizer = build_optimizer(model, OptimConfig())
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.dim() == 2 and "embedding" not in name), name
