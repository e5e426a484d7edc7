"""Optimiser and learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dfssd.config import Train

BATCH_NORM = tuple(v for k, v in nn.__dict__.items() if isinstance(v, type) and "Norm" in k)


def make_optimiser(
    model: nn.Module, config: Train, teacher: nn.Module | None = None, teacher_factor: float = 1.0
) -> torch.optim.AdamW:
    """AdamW; weight decay on weights only, not on biases and norms (as Ultralytics groups them).

    Args:
        model: what is trained, an online teacher inside it included.
        teacher: the part of it that gets groups of its own.
        teacher_factor: its learning rate as a share of the others'.
    """
    own = set() if teacher is None else set(teacher.parameters())
    groups = _groups([p for p in _split(model) if p[0] not in own], config, 1.0)
    if teacher is not None:
        groups += _groups([p for p in _split(model) if p[0] in own], config, teacher_factor)
    # fused: one pass over the memory of all weights; half the time of foreach on a CPU, and no copies on a GPU.
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999), fused=True)


def _split(model: nn.Module) -> list[tuple[nn.Parameter, bool]]:
    """Trained parameters, and whether weight decay is for them."""
    found: list[tuple[nn.Parameter, bool]] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                found.append((parameter, not (isinstance(module, BATCH_NORM) or name == "bias")))
    return found


def _groups(parameters: list[tuple[nn.Parameter, bool]], config: Train, factor: float) -> list[dict[str, Any]]:
    return [
        {
            "params": [p for p, d in parameters if d == decay],
            "weight_decay": decay * config.weight_decay,
            "lr_factor": factor,
        }
        for decay in (True, False)
    ]


def learning_rate(config: Train, step: int, steps: int) -> float:
    """Learning rate of a step (from 0): linear warm-up, then linear decay to `lr_final` of the peak."""
    warmup = min(config.warmup_steps, steps // 10)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    share = (step - warmup) / max(steps - warmup, 1)
    return config.lr * ((1 - share) * (1 - config.lr_final) + config.lr_final)
