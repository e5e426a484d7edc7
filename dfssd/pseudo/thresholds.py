"""Policies that turn candidates into pseudo-labels and uncertain boxes, per class.

A candidate whose score reaches its class threshold is a pseudo-label; one between floor and threshold is uncertain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfssd.config import Distill


class FixedThreshold:
    """The same threshold for every class, for ever."""

    def __init__(self, classes: int, tau: float) -> None:
        self._tau = torch.full((classes,), tau)

    def thresholds(self) -> Tensor:
        """(C,) thresholds."""
        return self._tau

    def update(self, score_sum_c: Tensor, count_c: Tensor) -> None:
        """Nothing to learn from a batch."""

    def state_dict(self) -> dict[str, Any]:
        return {"tau": self._tau}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._tau = state["tau"]


class EmaThreshold:
    """DFSSD's policy: tau_c = max(EMA_c, tau_min), EMA_c the moving average of the teacher's confidences for class c.

    The average starts at 0 and moves once a step, towards the mean score of the class's candidates in the *global* batch;
    a class without a candidate in the batch stays where it is. The caller adds up `score_sum_c` and `count_c` over all
    workers, so the number of workers does not matter.
    """

    def __init__(self, classes: int, decay: float, tau_min: float) -> None:
        self.decay, self.tau_min = decay, tau_min
        self.mean = torch.zeros(classes)

    def thresholds(self) -> Tensor:
        """(C,) thresholds."""
        return self.mean.clamp(min=self.tau_min)

    def update(self, score_sum_c: Tensor, count_c: Tensor) -> None:
        """Take in one global batch: sums of scores and numbers of candidates by class, (C,) each."""
        moved = self.decay * self.mean + (1 - self.decay) * score_sum_c / count_c.clamp(min=1)
        self.mean = torch.where(count_c > 0, moved, self.mean)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]


Policy = FixedThreshold | EmaThreshold


def make_policy(config: Distill, classes: int) -> Policy:
    """The policy that the settings name."""
    if config.threshold_policy == "fixed":
        return FixedThreshold(classes, config.tau)
    return EmaThreshold(classes, config.tau_decay, config.tau_min)


def class_sums(cls_n: Tensor, score_n: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Sum of scores and number of candidates by class, (C,) each."""
    index = cls_n.long()
    zero = torch.zeros(classes, device=score_n.device)
    return zero.index_add(0, index, score_n), zero.index_add(0, index, torch.ones_like(score_n))
