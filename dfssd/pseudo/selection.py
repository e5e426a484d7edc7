"""From candidates and class thresholds to what an unlabelled image says: the one place where pseudo-labels are chosen.

It runs on the CPU, in the training worker (where the thresholds of this step are), before targets are copied to the device.
Candidates that a labelling job stored and those that a teacher finds inside the loop (`from_detections`) come alike, as
columns of the batch, to `targets_of`; `select` does the same for arrays.

A candidate whose score reaches its class threshold is a sure box, with weight score**gamma; one that moved under flips
(agreement below the limit) still says that there is a defect of this class, but not where exactly: its box and DFL terms have
no weight (Soft Teacher, Xu et al., ICCV 2021, section 3.3). A candidate below its threshold is uncertain: the area inside
is neither defect nor background. An image without any candidate is silent: left out as a whole. So an unlabelled image never
says "no defect here" where the teacher was not sure.

Legend: B images, N boxes of the batch, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfssd.config import Distill
from dfssd.data.boxes import AGREEMENT, CANDIDATE_COLUMNS, CLS, DET_CLS, DET_SCORE, SCORE, XYWH, H, W, X, Y
from dfssd.data.manifest import Boxes
from dfssd.models.targets import NOWHERE, Targets, joined, padded
from dfssd.pseudo.thresholds import class_sums

# Score of the box that stands for an image without candidates. Augmentations move and cut it like any box, so that the area
# of such an image is known inside a mosaic too. No candidate has it: the labelling job keeps those above --floor.
NO_CANDIDATE = 0.0
COUNTS = ("pse/pseudo_labels", "pse/uncertain", "pse/without_box_term")


@dataclass(frozen=True)
class Rules:
    """How candidates are turned into targets (see `Distill`)."""

    score_power: float = 1.0
    agreement_min: float = 0.0
    uncertain_ignored: bool = True
    silent_ignored: bool = True

    @classmethod
    def of(cls, config: Distill) -> Rules:
        ignored = config.uncertain == "ignore"
        return cls(config.score_power, config.agreement_min, ignored, ignored and config.silent == "ignore")


@dataclass
class Selected:
    """What was chosen from the candidates of some images.

    Args:
        targets: for the detection loss.
        counts: (3,) number of pseudo-labels, of uncertain boxes, and of pseudo-labels without a box term (COUNTS).
        score_sum_c, count_c: (C,) scores and number of all candidates by class, what a policy that moves learns from.
    """

    targets: Targets
    counts: Tensor
    score_sum_c: Tensor
    count_c: Tensor


@dataclass
class StepTargets:
    """Boxes of one forward pass: labelled images first, then the unlabelled ones.

    Args:
        boxes: of all images.
        labelled: number of labelled images.
        pseudo: is anything learned from the others? Else they are silent.
        counts: (3,) as in `Selected`.
        policy: (2C,) sums of scores and numbers of candidates by class; (0,) without pseudo-labels.
    """

    boxes: Targets
    labelled: int
    pseudo: bool
    counts: Tensor
    policy: Tensor

    def to(self, device: torch.device) -> StepTargets:
        """On another device, without waiting where the memory is pinned."""
        counts, policy = (t.to(device, non_blocking=True) for t in (self.counts, self.policy))
        return replace(self, boxes=self.boxes.to(device), counts=counts, policy=policy)

    def pin_memory(self) -> StepTargets:
        counts, policy = self.counts.pin_memory(), self.policy.pin_memory()
        return replace(self, boxes=self.boxes.pin_memory(), counts=counts, policy=policy)


def or_no_candidate(boxes: Boxes) -> Boxes:
    """The candidates of an image; where there are none, the box that says so: over all of it, with score NO_CANDIDATE."""
    return boxes if len(boxes) else np.array([[0, 0.5, 0.5, 1, 1, NO_CANDIDATE, 1]], np.float32)


def select(candidates: Sequence[Boxes], tau_c: Tensor, rules: Rules) -> Selected:
    """Choose pseudo-labels, uncertain areas and silent images.

    Args:
        candidates: for each image (n,7) [cls, cx, cy, w, h, score, agreement], coordinates 0..1 of the image that the
            student sees. An empty array is an image without candidates, as is one of boxes of score NO_CANDIDATE alone.
            `from_detections` makes them of boxes after NMS.
        tau_c: (C,) class thresholds, above 0; those of before the batch, where a policy moves.
        rules: weights, and what an uncertain box says.
    """
    rows = [torch.as_tensor(np.asarray(c, np.float32)).reshape(-1, CANDIDATE_COLUMNS) for c in candidates]
    counts = torch.tensor([len(r) for r in rows], dtype=torch.long)
    image = torch.arange(len(rows)).repeat_interleave(counts)
    return _select(torch.cat(rows) if rows else torch.zeros(0, CANDIDATE_COLUMNS), image, len(rows), tau_c, rules)


def _select(rows: Tensor, image: Tensor, images: int, tau_c: Tensor, rules: Rules) -> Selected:
    """`select` on (N,7) candidates sorted by image, and (N,) their images."""
    cls, score = rows[:, CLS].long(), rows[:, SCORE]
    seen = score > NO_CANDIDATE
    sure = score >= tau_c[cls]
    placed = rows[:, AGREEMENT] >= rules.agreement_min
    weight = score.pow(rules.score_power)
    targets = _targets(rows[sure], image[sure], images, weight[sure], (weight * placed)[sure])
    if rules.uncertain_ignored:
        ignored = ~sure if rules.silent_ignored else ~sure & seen
        area, _ = (
            padded(rows[ignored][:, XYWH], image[ignored], images, NOWHERE) if bool(ignored.any()) else (None, None)
        )
        silent = torch.ones(images, dtype=torch.bool)
        silent[image[seen]] = False
        silent &= rules.silent_ignored
        targets = replace(targets, silent=silent, **({} if area is None else {"ignored_xywh": area}))
    counts = torch.stack([sure.sum(), (~sure & seen).sum(), (sure & ~placed).sum()]).float()
    return Selected(targets, counts, *class_sums(cls[seen], score[seen], len(tau_c)))


def labels(boxes: Sequence[Boxes]) -> Targets:
    """Targets of images that people labelled: (n,5) or (n,7) boxes an image, all of weight 1."""
    rows = [torch.as_tensor(np.asarray(b, np.float32))[:, : H + 1] for b in boxes]
    counts = torch.tensor([len(r) for r in rows], dtype=torch.long)
    image = torch.arange(len(rows)).repeat_interleave(counts)
    return _of_people(torch.cat(rows), image, len(rows))


def _of_people(rows: Tensor, image: Tensor, images: int) -> Targets:
    ones = torch.ones(len(rows))
    return _targets(rows, image, images, ones, ones)


def _targets(rows: Tensor, image: Tensor, images: int, weight: Tensor, box_weight: Tensor) -> Targets:
    columns = torch.cat([rows[:, CLS : H + 1], weight[:, None], box_weight[:, None]], 1)
    values, taken = padded(columns, image, images)
    return Targets(
        cls=values[..., CLS].long(),
        xywh=values[..., XYWH].contiguous(),
        valid=taken,
        weight=values[..., H + 1].contiguous(),
        box_weight=values[..., H + 2].contiguous(),
        ignored_xywh=torch.zeros(images, 0, 4),
        silent=torch.zeros(images, dtype=torch.bool),
    )


def from_detections(found: Sequence[Tensor], height_px: int, width_px: int) -> list[Boxes]:
    """Candidates from boxes after NMS (`dfssd.models.families.predict`), one array an image; agreement 1. Boxes are cut at
    the edges of the input, and those of which nothing is left are dropped.

    Args:
        found: (n,6) [x1, y1, x2, y2 px of the input, score, class] an image, on any device: one copy for all of them.
        height_px, width_px: of the network input.
    """
    flat = torch.cat(list(found)).float().cpu().numpy() if found else np.zeros((0, 6), np.float32)
    candidates = np.ones((len(flat), CANDIDATE_COLUMNS), np.float32)
    side = np.array([width_px, height_px], np.float32)
    low, high = (np.clip(flat[:, i : i + 2], 0, side) / side for i in (0, 2))
    candidates[:, X : Y + 1], candidates[:, W : H + 1] = (low + high) / 2, high - low
    candidates[:, SCORE], candidates[:, CLS] = flat[:, DET_SCORE], flat[:, DET_CLS]
    return [
        own[(own[:, W : H + 1] > 0).all(1)] for own in np.split(candidates, np.cumsum([len(f) for f in found])[:-1])
    ]


def targets_of(batch: Mapping[str, Any], labelled: int, tau_c: Tensor | None, rules: Rules) -> StepTargets:
    """Targets of a collated batch whose first `labelled` images people labelled.

    Args:
        batch: cls, score, agreement, batch_idx: (N,), bboxes: (N,4), sorted by image, and img: (B,...) (`dataset.collate`).
        tau_c: (C,) class thresholds; None where there are no unlabelled images, or nothing is learned from them.
    """
    image = batch["batch_idx"].long()
    rows = torch.cat([batch["cls"][:, None], batch["bboxes"], batch["score"][:, None], batch["agreement"][:, None]], 1)
    real, images = image < labelled, len(batch["img"])
    people = _of_people(rows[real], image[real], labelled)
    if tau_c is None or images == labelled:
        rest = _targets(rows[:0], image[:0], images - labelled, rows[:0, CLS], rows[:0, CLS])
        rest.silent[:] = True
        return StepTargets(joined([people, rest]), labelled, False, torch.zeros(len(COUNTS)), torch.zeros(0))
    chosen = _select(rows[~real], image[~real] - labelled, images - labelled, tau_c, rules)
    learned = torch.cat([chosen.score_sum_c, chosen.count_c])
    return StepTargets(joined([people, chosen.targets]), labelled, True, chosen.counts, learned)
