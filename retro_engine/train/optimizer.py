"""AdamW and Muon, their learning-rate schedules, and what mixed precision adds: fp32 master weights and a loss scale."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from retro_engine.config import OptimConfig
from retro_engine.errors import UnavailableError, UsageError
from retro_engine.train.parallel import gradient_norm

FIRST_SCALE, SCALE_GROWS_AFTER = 2.0**16, 2000  # of fp16's loss (arXiv 1710.03740 section 3.2)


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, widths: dict[str, float]
) -> list[dict]:
    """Groups of AdamW: weight decay on matrices, not on embeddings, norms and biases. With muP a hidden matrix of width
    multiplier w = `widths`[name] has the learning rate / w and the weight decay x w (arXiv 2203.03466 table 8; their
    product, the decay a step, does not depend on the width).
    """
    groups: dict[tuple, dict] = {}
    for name, parameter in parameters:
        w = widths.get(name, 1.0)
        decay = config.weight_decay * w if parameter.dim() == 2 and "embedding" not in name else 0.0
        mesh = getattr(parameter, "device_mesh", None)  # one kernel takes shards of one mesh
        group = groups.setdefault((decay, w, mesh), {"params": [], "weight_decay": decay, "width": w})
        group["params"].append(parameter)
    return list(groups.values())


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon's update is for it: a map from features to features, so no embedding and no output head."""
    return parameter.dim() == 2 and "embedding" not in name and not name.startswith("head.")


class Optimizer:
    """Fused AdamW over a model's parameters, or over fp32 copies of bf16 ones (`has_master`); with name=muon the layers' matrices
    have Muon's update (Jordan et al. 2024): the mean of their gradients, its singular values made 1 by five Newton-Schulz steps,
    at .2 sqrt(max(rows, columns)) of the rate (arXiv 2502.16982 section 2.2), which makes it as large as AdamW's: one rate serves both.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        widths: dict[str, float],
        has_master: bool = False,
        is_scaled: bool = False,
        *,
        learns: Callable[[str], bool] | None = None,
    ):
        """`learns`: of these parameters, by name, alone."""
        self.config, self.has_master = config, has_master
        self.weights = {name: weight for name, weight in model.named_parameters() if learns is None or learns(name)}
        self.parameters = self.weights
        if has_master:
            self.parameters = {name: nn.Parameter(p.detach().float()) for name, p in self.weights.items()}
        hidden = {name for name, p in self.parameters.items() if config.name == "muon" and is_hidden_matrix(name, p)}
        others = [(name, p) for name, p in self.parameters.items() if name not in hidden]
        betas = (config.betas[0], config.betas[1])
        groups = parameter_groups(others, config, widths)
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
        self.muon = _muon([self.parameters[name] for name in sorted(hidden)], config) if hidden else None
        self._is_in_muon = hidden
        self.scale = FIRST_SCALE if is_scaled else 1.0
        self.is_scaled, self.good_steps = is_scaled, 0

    def zero_grad(self) -> None:
        for parameter in (*self.weights.values(), *self.parameters.values()):
            parameter.grad = None

    def collect(self) -> None:
        """After a micro-batch: with master weights, its gradients are added to theirs in fp32."""
        if not self.has_master:
            return
        for name, weight in self.weights.items():
            if weight.grad is not None:
                master = self.parameters[name]
                gradient = weight.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                weight.grad = None

    def drop(self, learns: Callable[[str], bool]) -> None:
        """Forget the gradients of parameters that do not learn."""
        for name, parameter in self.parameters.items():
            if not learns(name):
                parameter.grad = None

    def norm(self) -> float:
        """Of the gradients, the loss scale taken out; not finite where one of them is not."""
        return float(gradient_norm(self.parameters.values())) / self.scale

    def step(self, rate: float, norm: float) -> None:
        """One update at learning rate `rate`; gradients above the clipping norm are scaled down to it."""
        clip = self.config.clip
        factor = (min(1.0, clip / (norm + 1e-6)) if clip is not None else 1.0) / self.scale
        if factor != 1.0:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        for group in self.adamw.param_groups:
            group["lr"] = rate / group["width"]
        self.adamw.step()
        if self.muon is not None:
            for group in self.muon.param_groups:
                group["lr"] = rate
            self.muon.step()
        if self.has_master:
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.copy_(self.parameters[name])
        self.good_steps += 1
        if self.is_scaled and self.good_steps == SCALE_GROWS_AFTER:
            self.scale, self.good_steps = self.scale * 2, 0

    def skip(self) -> None:
        """A step whose gradients were not finite: with a loss scale, half of it next time."""
        self.good_steps = 0
        if self.is_scaled:
            self.scale = max(1.0, self.scale / 2)

    def state(self) -> dict[str, Tensor]:
        """Tensors by `kind.parameter`: step, exp_avg, exp_avg_sq or momentum_buffer of every parameter that was updated, and masters."""
        tensors = {}
        for name, parameter in self.parameters.items():
            for kind, value in self._states(name).get(parameter, {}).items():
                tensors[f"{kind}.{name}"] = value
            if self.has_master:
                tensors[f"master.{name}"] = parameter.detach()
        return tensors

    def template(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Empty state of the kinds and parameters in `names`, to be filled in place; becomes this optimizer's state.

        Raises UsageError where another optimizer wrote it.
        """
        tensors: dict[str, Tensor] = {}
        for key in names:
            kind, name = key.split(".", 1)
            parameter = self.parameters[name]
            if kind == "master":
                if self.has_master:
                    tensors[key] = parameter.detach()
                continue
            if (kind == "momentum_buffer") != (name in self._is_in_muon):
                what, other = (
                    f"model.optim.name={self.config.name} cannot go on",
                    "muon" if kind == "momentum_buffer" else "adamw",
                )
                raise UsageError(
                    what,
                    f"the checkpoint's state is {other}'s",
                    f"model.optim.name={other}, or --resume never --out ANOTHER",
                )
            on_cpu = kind == "step" and parameter.device.type == "cpu"
            value = torch.zeros((), device="cpu" if on_cpu else parameter.device) if kind == "step" else None
            tensors[key] = torch.zeros_like(parameter.detach()) if value is None else value
            self._states(name)[parameter][kind] = tensors[key]
        return tensors

    def _states(self, name: str) -> dict:
        return self.muon.state if self.muon is not None and name in self._is_in_muon else self.adamw.state


def _muon(matrices: list[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        why = f"torch {torch.__version__} has no torch.optim.Muon"
        raise UnavailableError(
            "model.optim.name=muon cannot be used", why, "pip install -U 'torch>=2.9', or model.optim.name=adamw"
        )
    return torch.optim.Muon(
        matrices,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """The rate of 0-based step `step`: linear warm-up, then cosine or linear down to min_lr at `max_steps`.

    constant_steps: CosineAnnealing reaches min_lr so much earlier and stays there, as NeMo's; WSD keeps the full rate so
    long before it decays.
    """
    sched = config.sched
    total = sched.max_steps or max_steps
    if step < sched.warmup_steps:
        return config.lr * (step + 1) / sched.warmup_steps
    if sched.name == "constant":
        return config.lr
    is_wsd = sched.name == "WSD"
    start = sched.warmup_steps + (sched.constant_steps if is_wsd else 0)
    end = total - (0 if is_wsd else sched.constant_steps)
    share = min(1.0, max(0, step - start) / max(1, end - start))
    left = 1 - share if is_wsd else 0.5 * (1 + math.cos(math.pi * share))
    return sched.min_lr + left * (config.lr - sched.min_lr)
