"""A teacher that learns from the unlabelled images: its weight average labels them inside the loop, it learns from them.

Mean Teacher (Tarvainen & Valpola, NeurIPS 2017): the moving average of a network's weights teaches the network. For
detection, what is taken from where:

- burn-in on labels first, then both losses; the average sees the weak view, the network the strong one: Unbiased Teacher
  (Liu et al., ICLR 2021, sections 3.1 to 3.3). The burn-in is the stage `teacher`, from whose best weights this one starts.
- each box weighted by a power of its score: Soft Teacher (Xu et al., ICCV 2021, section 3.2, which weights background).
- thresholds by class from the running scores, as many pseudo-labels an image as there are labels: LabelMatch (Chen et
  al., CVPR 2022, section 3.2), Consistent-Teacher (Wang et al., CVPR 2023, section 3.4); see `dfssd.pseudo.running`.
- candidates below their threshold are neither defect nor background: Efficient Teacher (Xu et al. 2023, section 3.2).

Unlike theirs, pseudo-labels are found in the very mosaic that the network then sees, and need no map from view to view.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfssd.config import Config
from dfssd.data.boxes import AGREEMENT, CLS, SCORE, XYWH
from dfssd.models.families import predict
from dfssd.pseudo.running import RunningThresholds
from dfssd.pseudo.selection import from_detections
from dfssd.runtime.worker_group import WorkerGroup

FALLEN = 0.5  # share of its first val mAP50-95 below which the average has collapsed
ONE_CLASS = 0.9  # share of all pseudo-labels that one class may have, where it has less than ...
ONE_CLASS_LABELS = 0.6  # ... this share of the labelled boxes
SETTLED = 50  # steps after which the running numbers are judged

Batch = dict[str, Any]


class InLoopTeacher:
    """The weight average at work as the labeller of the unlabelled half of each batch.

    Args:
        average: the network's weight average, in eval mode.
        thresholds: follow its scores.
    """

    def __init__(self, average: nn.Module, thresholds: RunningThresholds, config: Config, workers: WorkerGroup) -> None:
        self.average, self.thresholds, self.config, self.workers = average, thresholds, config, workers
        self.started_at: float | None = None  # val mAP50-95 of the weights it began with

    @torch.no_grad()
    def label(
        self, weak_bchw: Tensor, batch: Batch, labelled: int, dtype: torch.dtype | None = None
    ) -> tuple[Batch, Tensor]:
        """The batch with this step's candidates for its unlabelled images, whatever boxes they had before, and what `see` is
        to know of it.

        Args:
            weak_bchw: weak view of the unlabelled images, 0..1.
            labelled: labelled images of the batch, which come first.
            dtype: precision of the pass under autocast; None: float32.
        """
        own = self.config.pseudo
        found = predict(self.average, weak_bchw, own.floor, own.nms_iou, own.max_candidates, dtype)
        own_images = from_detections(found, weak_bchw.shape[2], weak_bchw.shape[3])
        rows = torch.from_numpy(np.concatenate(own_images))
        counts = torch.tensor([len(one) for one in own_images])
        real = batch["batch_idx"] < labelled
        counted = self.thresholds.counted(
            rows[:, CLS].numpy(), rows[:, SCORE].numpy(), len(weak_bchw), batch["cls"][real].numpy(), labelled
        )
        columns = {
            "cls": rows[:, CLS],
            "bboxes": rows[:, XYWH],
            "score": rows[:, SCORE],
            "agreement": rows[:, AGREEMENT],
        }
        columns["batch_idx"] = torch.arange(labelled, labelled + len(counts)).repeat_interleave(counts)
        return batch | {k: torch.cat([batch[k][real], v.to(batch[k].dtype)]) for k, v in columns.items()}, counted

    def see(self, counted: Tensor, device: torch.device) -> None:
        """Move the thresholds by what all micro-batches of all workers counted in this step."""
        self.thresholds.see(self.workers.sum(counted.to(device)) if self.workers.size > 1 else counted)

    def failing(self, map50_95: float) -> str:
        """Why this teacher no longer learns anything good, in words; '' where it does."""
        if self.started_at is not None and map50_95 < FALLEN * self.started_at:
            return f"its val mAP50-95 fell from {self.started_at:.4f} to {map50_95:.4f}"
        if self.thresholds.steps < SETTLED:
            return ""
        kept, rate = self.thresholds.per_image(), self.thresholds.rate()
        if kept.sum() == 0:
            return "no candidate of the last steps became a pseudo-label"
        first = int(kept.argmax())
        share, usual = kept[first] / kept.sum(), rate[first] / max(float(rate.sum()), 1e-9)
        if share > ONE_CLASS and usual < ONE_CLASS_LABELS:
            return f"{share:.0%} of its pseudo-labels are of class {first}, which has {usual:.0%} of the labels"
        return ""
