"""Thresholds of a teacher that labels inside the training loop: they follow its scores of the last steps.

A teacher that learns becomes surer from step to step, so thresholds fixed beforehand would let ever more through (LabelMatch,
Chen et al., CVPR 2022, section 3.2, and Efficient Teacher, Xu et al. 2023, section 3.3, compute them anew each epoch). Here
histograms of scores are kept over a window that forgets, and so are the boxes of the labelled images of the same steps, which
went through the same augmentation: a mosaic cuts boxes away, so rates must be compared within it.

Legend: C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfssd.config import Thresholds
from dfssd.pseudo.scores import BINS, score_bin
from dfssd.pseudo.thresholds import ScoreCounts, policy_thresholds

HALVED_EVERY = 25  # steps; what was seen 50 steps ago counts a quarter


class RunningThresholds:
    """Class thresholds from the scores of the last steps.

    Args:
        classes: C.
        config: limits of the thresholds.
        policy: one of `IN_LOOP_POLICIES`.
    """

    learns = False  # from what the criterion adds up; see `see`

    def __init__(self, classes: int, config: Thresholds, policy: str = "match") -> None:
        self.config, self.policy, self.classes = config, policy, classes
        self.counts = torch.zeros(classes, BINS, dtype=torch.float64)
        self.boxes = torch.zeros(classes, dtype=torch.float64)
        self.images = self.labelled = 0.0
        self.steps = 0
        self._tau = torch.full((classes,), config.tau)

    def thresholds(self) -> Tensor:
        """(C,) thresholds."""
        return self._tau

    def update(self, score_sum_c: Tensor, count_c: Tensor) -> None:
        """Nothing: what counts comes through `see`, before a step's candidates are judged."""

    def counted(
        self, cls_n: np.ndarray, score_n: np.ndarray, images: int, labelled_cls: np.ndarray, labelled: int
    ) -> Tensor:
        """What one worker saw in a step, as one vector that can be added over workers.

        Args:
            cls_n, score_n: candidates on its `images` unlabelled images.
            labelled_cls: classes of the boxes on its `labelled` labelled images.
        """
        counts = np.zeros((self.classes, BINS))
        np.add.at(counts, (cls_n.astype(int), score_bin(score_n)), 1)
        boxes = np.bincount(labelled_cls.astype(int), minlength=self.classes)
        return torch.from_numpy(np.concatenate([counts.ravel(), boxes, [images, labelled]]).astype(np.float64))

    def see(self, counted: Tensor) -> None:
        """Take in one step of all workers (the sum of their `counted`) and set the thresholds anew."""
        if self.steps and self.steps % HALVED_EVERY == 0:
            self.counts /= 2
            self.boxes /= 2
            self.images, self.labelled = self.images / 2, self.labelled / 2
        self.steps += 1
        seen = counted.cpu()
        split = self.classes * BINS
        self.counts += seen[:split].view(self.classes, BINS)
        self.boxes += seen[split : split + self.classes]
        self.images += float(seen[-2])
        self.labelled += float(seen[-1])
        tau = policy_thresholds(self.config, self.policy, self.scores(), self.rate())
        self._tau = torch.as_tensor(tau, dtype=torch.float32)

    def scores(self) -> ScoreCounts:
        """Candidates of the window."""
        return ScoreCounts(self.counts.numpy(), self.images)  # type: ignore[arg-type]  # halved, so not whole

    def rate(self) -> np.ndarray:
        """(C,) labelled boxes an image in the window."""
        return self.boxes.numpy() / max(self.labelled, 1e-9)

    def per_image(self) -> np.ndarray:
        """(C,) pseudo-labels an image in the window, at the present thresholds."""
        kept = [row[score_bin(t) :].sum() for row, t in zip(self.counts.numpy(), self._tau.tolist(), strict=True)]
        return np.asarray(kept) / max(self.images, 1e-9)

    def state_dict(self) -> dict[str, Any]:
        return {
            "counts": self.counts.clone(),
            "boxes": self.boxes.clone(),
            "images": self.images,
            "labelled": self.labelled,
            "steps": self.steps,
            "tau": self._tau.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts, self.boxes = state["counts"].clone(), state["boxes"].clone()
        self.images, self.labelled, self.steps = state["images"], state["labelled"], state["steps"]
        self._tau = state["tau"].clone()
