"""Policies that turn candidates into pseudo-labels and uncertain boxes, per class.

A candidate whose score reaches its class threshold is a pseudo-label; one between floor and threshold is uncertain.
A policy looks at the scores of all candidates once, before training (THRESHOLDS), or follows batch after batch (MOVING).

Legend: C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dfssd.config import Thresholds
from dfssd.config.choices import POLICIES
from dfssd.data.boxes import CLS, SCORE
from dfssd.data.manifest import Boxes, Row
from dfssd.pseudo.calibration import calibrate
from dfssd.pseudo.evidence import Evidence
from dfssd.pseudo.scores import BINS, score_bin

FEWEST = 20  # candidates of a class from which a mixture is fitted
MANY = 3.0  # times its labelled rate that a class may have pseudo-labels by its scores alone; CR7-DET: 0.2 to 1.6


@dataclass
class ScoreCounts:
    """How often each score was given, by class: all that a policy needs to know of any number of candidates.

    Args:
        counts: (C, BINS) candidates with a score in [k/BINS, (k+1)/BINS).
        images: unlabelled images looked at.
        val: what candidates on the val split are worth, for policies that need it.
    """

    counts: np.ndarray
    images: int = 0
    val: Evidence | None = None

    @classmethod
    def empty(cls, classes: int) -> ScoreCounts:
        return cls(np.zeros((classes, BINS), np.int64))

    def add(self, boxes: Boxes) -> None:
        """Take in the (n,7) candidates of one image."""
        self.images += 1
        np.add.at(self.counts, (boxes[:, CLS].astype(int), score_bin(boxes[:, SCORE])), 1)

    def per_image(self, tau_c: np.ndarray) -> np.ndarray:
        """(C,) pseudo-labels an image at thresholds tau_c."""
        kept = [row[score_bin(t) :].sum() for row, t in zip(self.counts, tau_c, strict=True)]
        return np.asarray(kept) / max(self.images, 1)

    def mean(self) -> np.ndarray:
        """(C,) mean score; 0 for a class without a candidate."""
        centres = (np.arange(BINS) + 0.5) / BINS
        return np.asarray(self.counts @ centres / np.maximum(self.counts.sum(1), 1))


def labelled_rates(rows: list[Row], classes: int) -> np.ndarray:
    """(C,) labelled boxes an image, over labelled images."""
    boxes = [r.boxes[:, CLS].astype(int) for r in rows if r.boxes is not None]
    total = np.bincount(np.concatenate(boxes), minlength=classes) if boxes else np.zeros(classes)
    return np.asarray(total / max(len(boxes), 1))


class Policy(Protocol):
    """Class thresholds while a training goes on."""

    learns: bool  # from the batches: their sums are then added over workers, and somebody waits for them

    def thresholds(self) -> Tensor:
        """(C,) thresholds, float32."""

    def update(self, score_sum_c: Tensor, count_c: Tensor) -> None:
        """Take in one global batch: sums of scores and numbers of candidates by class, (C,) each."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""


class FixedThreshold:
    """Thresholds that stay: the same for every class, or one each.

    Args:
        tau_c: (C,) thresholds.
    """

    learns = False

    def __init__(self, tau_c: Tensor) -> None:
        self._tau = tau_c

    def thresholds(self) -> Tensor:
        """(C,) thresholds."""
        return self._tau

    def update(self, score_sum_c: Tensor, count_c: Tensor) -> None:
        """Nothing to learn from a batch."""

    def state_dict(self) -> dict[str, Any]:
        return {"tau": self._tau}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: they follow from the settings and the candidates, and a population's trial has settings of its own."""


class EmaThreshold:
    """DFSSD's policy: tau_c = max(EMA_c, tau_min), EMA_c the moving average of the teacher's confidences for class c.

    The average starts at 0 and moves once a step, towards the mean score of the class's candidates in the *global* batch;
    a class without a candidate in the batch stays where it is. The caller adds up `score_sum_c` and `count_c` over all
    workers, so the number of workers does not matter.
    """

    learns = True

    def __init__(self, classes: int, decay: float, tau_min: float, tau_max: float = 1.0) -> None:
        self.decay, self.tau_min, self.tau_max = decay, tau_min, tau_max
        self.mean = torch.zeros(classes)

    def thresholds(self) -> Tensor:
        """(C,) thresholds."""
        return self.mean.clamp(self.tau_min, self.tau_max)

    def update(self, score_sum_c: Tensor, count_c: Tensor) -> None:
        """Take in one global batch: sums of scores and numbers of candidates by class, (C,) each."""
        moved = self.decay * self.mean + (1 - self.decay) * score_sum_c / count_c.clamp(min=1)
        self.mean = torch.where(count_c > 0, moved, self.mean)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]


def make_policy(config: Thresholds, scores: ScoreCounts, rate_c: np.ndarray) -> Policy:
    """The policy that the settings name.

    Args:
        scores: of all candidates on unlabelled images, with `val` where the policy needs it.
        rate_c: (C,) labelled boxes an image (see `labelled_rates`).
    """
    if POLICIES[config.threshold_policy].moves:
        return MOVING[config.threshold_policy](config, len(rate_c))
    tau = policy_thresholds(config, config.threshold_policy, scores, rate_c)
    return FixedThreshold(torch.as_tensor(tau, dtype=torch.float32))


def policy_thresholds(
    config: Thresholds, policy: str, scores: ScoreCounts, rate_c: np.ndarray, steps: int = 0
) -> np.ndarray:
    """(C,) thresholds of any policy on these candidates; of one that moves those it will have reached after `steps`."""
    row = POLICIES[policy]
    if row.needs == "val" and scores.val is None:
        raise ValueError(f"policy {policy!r} needs what candidates on val are worth")
    tau = THRESHOLDS[policy](config, scores, rate_c, steps)
    low = config.lowest(policy) if "tau_min" in row.uses else -np.inf
    return np.asarray(tau.clip(low, config.tau_max if "tau_max" in row.uses else np.inf))


def gmm_threshold(counts: np.ndarray, fallback: float) -> float:
    """Score above which a candidate more likely belongs to the upper of two Gaussians fitted to a class's scores.

    Consistent-Teacher (Wang et al., CVPR 2023, section 3.4) fits one mixture a class; expectation maximisation from the
    split of greatest between-class variance, so that the same scores give the same threshold. Its code asks for more by
    default: the score where the upper group is densest ("high"; this is its "middle"). Of six sets of candidates on CR7-DET
    it kept 0.42 to 0.47 of the hidden boxes, not 0.55 to 0.60, at a precision of 0.58 to 0.69, not 0.59 to 0.68.

    Args:
        counts: (BINS,) histogram of the scores of all candidates of the class.
        fallback: threshold where there are fewer than 20 candidates, or no two groups.
    """
    x, n = (np.arange(BINS) + 0.5) / BINS, counts.astype(np.float64)
    if n.sum() < FEWEST or np.count_nonzero(n) < 2:
        return fallback
    low = np.cumsum(n)
    mass = np.cumsum(n * x)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mass[-1] * low / low[-1] - mass) ** 2 / (low * (low[-1] - low))
    upper = x > x[int(np.nanargmax(np.where(np.isfinite(between), between, -1)))]
    posterior = upper.astype(np.float64)  # of the upper component
    for _ in range(500):
        weights = np.stack([(1 - posterior) * n, posterior * n])
        share = weights.sum(1) / n.sum()
        mean = weights @ x / np.maximum(weights.sum(1), 1e-12)
        variance = (weights * (x - mean[:, None]) ** 2).sum(1) / np.maximum(weights.sum(1), 1e-12) + 1e-4
        log = np.log(np.maximum(share, 1e-12))[:, None] - 0.5 * (
            (x - mean[:, None]) ** 2 / variance[:, None] + np.log(variance)[:, None]
        )
        new = 1 / (1 + np.exp(np.clip(log[0] - log[1], -500, 500)))
        done = float(np.abs(new - posterior).max()) < 1e-6
        posterior = new
        if done:
            break
    between_means = (x >= mean[0]) & (x <= mean[1]) & (posterior >= 0.5)
    return float(x[between_means][0]) if between_means.any() else fallback


def mixture_thresholds(config: Thresholds, scores: ScoreCounts, rate_c: np.ndarray) -> np.ndarray:
    """(C,) thresholds by the mixture of each class's scores, higher where a class would get more than MANY times its labelled
    rate: of a class with two labelled boxes all scores may be noise, which a mixture divides in two as readily. A class
    without any labelled box, which another teacher may know, is left as it is.
    """
    tau = np.array([gmm_threshold(row, config.tau) for row in scores.counts])
    most = MANY * rate_c
    return np.where(most * scores.images >= 1, np.maximum(tau, match_thresholds(scores, most)), tau)


def match_thresholds(scores: ScoreCounts, rate_c: np.ndarray) -> np.ndarray:
    """(C,) thresholds at which pseudo-labels an image equal the labelled rate of each class.

    LabelMatch (Chen et al., CVPR 2022, section 3.2). Where a class has fewer candidates than that, all are taken.
    """
    wanted = np.rint(rate_c * scores.images)
    from_above = scores.counts[:, ::-1].cumsum(1)[:, ::-1]  # candidates with a score in this bin or a higher one
    reached = from_above >= np.maximum(wanted, 1)[:, None]
    highest = BINS - 1 - reached[:, ::-1].argmax(1)
    tau = np.where(reached.any(1), highest / BINS, 0.0)
    return np.asarray(np.where(wanted > 0, tau, 1.0))


def precision_thresholds(scores: ScoreCounts, wanted: float) -> np.ndarray:
    """(C,) lowest thresholds from which pseudo-labels are expected to be right as often as `wanted`, by the val split."""
    assert scores.val is not None
    return calibrate(scores.val.found, scores.val.hits).thresholds(scores.counts, wanted)


# How each policy of `dfssd.config.choices` sets its (C,) thresholds; taken into the limits that it uses afterwards.
THRESHOLDS: dict[str, Callable[[Thresholds, ScoreCounts, np.ndarray, int], np.ndarray]] = {
    "fixed": lambda config, scores, rate_c, steps: np.full(len(rate_c), config.tau),
    "ema": lambda config, scores, rate_c, steps: scores.mean() * (1 - config.tau_decay**steps),
    "gmm": lambda config, scores, rate_c, steps: mixture_thresholds(config, scores, rate_c),
    "match": lambda config, scores, rate_c, steps: match_thresholds(scores, rate_c),
    "precision": lambda config, scores, rate_c, steps: precision_thresholds(scores, config.precision),
}
# What follows the batches in a training, of the policies that move: from settings and the number of classes.
MOVING: dict[str, Callable[[Thresholds, int], Policy]] = {
    "ema": lambda config, classes: EmaThreshold(classes, config.tau_decay, config.lowest("ema"), config.tau_max),
}


def class_sums(cls_n: Tensor, score_n: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Sum of scores and number of candidates by class, (C,) each."""
    index = cls_n.long()
    zero = torch.zeros(classes, device=score_n.device)
    return zero.index_add(0, index, score_n), zero.index_add(0, index, torch.ones_like(score_n))
