"""Optimiser and learning rate."""

from __future__ import annotations

import torch
from torch import nn

from dfssd.config import Train

BATCH_NORM = tuple(v for k, v in nn.__dict__.items() if isinstance(v, type) and "Norm" in k)


def make_optimiser(model: nn.Module, config: Train) -> torch.optim.AdamW:
    """AdamW; weight decay on weights only, not on biases and norms (as Ultralytics groups them)."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                is_plain = isinstance(module, BATCH_NORM) or name == "bias"
                (plain if is_plain else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999), foreach=True)


def learning_rate(config: Train, step: int, steps: int) -> float:
    """Learning rate of a step (from 0): linear warm-up, then linear decay to `lr_final` of the peak."""
    warmup = min(config.warmup_steps, steps // 10)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    share = (step - warmup) / max(steps - warmup, 1)
    return config.lr * ((1 - share) * (1 - config.lr_final) + config.lr_final)
