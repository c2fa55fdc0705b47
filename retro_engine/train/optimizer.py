"""AdamW and its learning-rate schedules."""

import math

import torch
from torch import nn

from retro_engine.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices, not on embeddings, norms and biases."""
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parameter in model.parameters():
        is_matrix = parameter.dim() == 2 and id(parameter) not in embeddings
        (decayed if is_matrix else rest).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), fused=True)


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """The rate of 0-based step `step`: linear warm-up, a constant part, then cosine or linear down to min_lr."""
    sched = config.sched
    total = sched.max_steps or max_steps
    floor = min(sched.min_lr, config.lr)
    if step < sched.warmup_steps:
        return config.lr * (step + 1) / sched.warmup_steps
    decay_from = sched.warmup_steps + sched.constant_steps
    if sched.name == "constant" or step < decay_from:
        return config.lr
    share = min(1.0, (step - decay_from) / max(1, total - decay_from))
    if sched.name == "WSD":
        return config.lr + share * (floor - config.lr)
    return floor + 0.5 * (config.lr - floor) * (1 + math.cos(math.pi * share))
