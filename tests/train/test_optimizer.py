"""Learning-rate schedules, what is decayed, master weights, the loss scale, muP's rates."""

import math

import pytest
import torch
from helpers import small_config, small_model
from torch import nn

from retro_engine.config import OptimConfig, SchedConfig
from retro_engine.model.initialization import width_multipliers
from retro_engine.model.retro import RetroModel
from retro_engine.train.optimizer import Optimizer, learning_rate, parameter_groups


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


def nemo_cosine(step: int, total: int, warmup: int, constant: int, lr: float, min_lr: float) -> float:
    """NeMo's CosineAnnealing with constant_steps: it decays in total - warmup - constant steps, then min_lr is held."""
    decay = total - warmup - constant
    if step > warmup + decay:
        return min_lr
    return min_lr + 0.5 * (math.cos(math.pi * (step - warmup) / decay) + 1.0) * (lr - min_lr)


@pytest.mark.parametrize("constant", [0, 1, 30, 89])
def test_constant_steps_are_nemos(constant: int) -> None:
    found = rates("CosineAnnealing", constant_steps=constant)
    expected = [nemo_cosine(step, 100, 10, constant, 1.0, 0.1) for step in range(10, 110)]
    assert found[10:] == pytest.approx([max(0.1, rate) for rate in expected])
    assert found[100 - constant :] == pytest.approx([0.1] * (10 + constant))


def test_only_matrices_are_decayed() -> None:
    model = small_model(share_embeddings=False).float()
    groups = parameter_groups(model.named_parameters(), OptimConfig(), {})
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.dim() == 2 and "embedding" not in name), name


def test_master_weights_keep_what_bf16_loses() -> None:
    """An update of a thousandth of a weight is below bf16's resolution; the fp32 master keeps it."""
    linear = nn.Linear(4, 4, bias=False).bfloat16()
    with torch.no_grad():
        linear.weight.fill_(1.0)
    config = OptimConfig(lr=1e-3, weight_decay=0.0, clip=None)
    optimizer = Optimizer(linear, config, {}, has_master=True)
    for _ in range(8):
        optimizer.zero_grad()
        linear(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        optimizer.collect()
        optimizer.step(1e-3, optimizer.norm())
    assert float(optimizer.parameters["weight"][0, 0].detach()) == pytest.approx(1 - 8e-3, rel=1e-4)
    assert float(linear.weight[0, 0].detach()) == pytest.approx(1 - 8e-3, abs=4e-3)
    assert set(optimizer.state()) == {"step.weight", "exp_avg.weight", "exp_avg_sq.weight", "master.weight"}


def test_the_loss_scale_is_taken_out_and_halved_after_an_overflow() -> None:
    linear = nn.Linear(3, 1, bias=False)
    optimizer = Optimizer(linear, OptimConfig(clip=None), {}, is_scaled=True)
    (linear(torch.ones(1, 3)).sum() * optimizer.scale).backward()
    assert optimizer.norm() == pytest.approx(3**0.5)
    scale = optimizer.scale
    optimizer.skip()
    assert optimizer.scale == scale / 2
    optimizer.step(1e-3, optimizer.norm())


def test_mup_divides_rates_and_keeps_the_decay_of_a_step() -> None:
    config = small_config(mup=True, mup_base_hidden_size=12, hidden_size=48, ffn_hidden_size=96, num_attention_heads=3)
    model = RetroModel(config)
    groups = parameter_groups(model.named_parameters(), OptimConfig(weight_decay=0.1), width_multipliers(model))
    for group in groups:
        for parameter in group["params"]:
            is_hidden = parameter.dim() == 2 and parameter is not model.embedding.weight
            assert group["width"] == (4.0 if is_hidden else 1.0)
            assert group["weight_decay"] == pytest.approx(0.4 if is_hidden else 0.0)
