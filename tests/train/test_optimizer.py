"""Learning-rate schedules, what is decayed, master weights, the loss scale, muP's rates."""

import math

import pytest
import torch
from helpers import small_config, small_model
from torch import nn

from retro_engine.config import OptimConfig, SchedConfig
from retro_engine.errors import UnavailableError
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


def test_muon_makes_singular_values_one_and_leaves_the_rest_to_adamw() -> None:
    torch.manual_seed(0)
    model, other = (small_model(share_embeddings=False).float() for _ in range(2))
    other.load_state_dict(model.state_dict())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: torch.randn(p.shape) for name, p in before.items()}
    for net, name in ((model, "muon"), (other, "adamw")):
        optimizer = Optimizer(net, OptimConfig(name=name, clip=None, weight_decay=0.0), {})
        for key, p in net.named_parameters():
            p.grad = gradients[key].clone()
        optimizer.step(1e-2, 1.0)
        kinds = {
            key: {kind.split(".", 1)[0] for kind in optimizer.state() if kind.split(".", 1)[1] == key} for key in before
        }
    theirs = dict(other.named_parameters())
    for key, p in model.named_parameters():
        update = (before[key] - p.detach()) / 1e-2
        if p.dim() != 2 or "embedding" in key or key == "head.weight":
            assert torch.equal(p, theirs[key]), key
            continue
        u, s, v = torch.linalg.svd(gradients[key], full_matrices=False)
        found = u.T @ update @ v.T / (0.2 * max(p.shape) ** 0.5)  # of the gradient's own directions
        sizes = found.diagonal()[s > s[0] / 10]  # what is next to nothing needs more steps
        assert bool(((sizes > 0.5) & (sizes < 1.4)).all()), key
        assert float((found - found.diagonal().diag()).abs().max()) < 0.1, key
    assert kinds["layers.0.ffn.up.weight"] == {"step", "exp_avg", "exp_avg_sq"}


def test_what_is_beside_the_root_of_the_mean_square_is_a_setting() -> None:
    linear = nn.Linear(3, 1, bias=False)
    before = linear.weight.detach().clone()
    linear.weight.grad = torch.full((1, 3), 2.0)
    Optimizer(linear, OptimConfig(eps=1.0, weight_decay=0.0, clip=None), {}).step(0.3, 1.0)
    assert (before - linear.weight.detach()).flatten().tolist() == pytest.approx([0.3 * 2 / (2 + 1)] * 3)


def test_a_torch_without_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UnavailableError, match=r"muon cannot be used\n.*has no torch.optim.Muon"):
        Optimizer(small_model(), OptimConfig(name="muon"), {})


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
