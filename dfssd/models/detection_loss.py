"""Ultralytics' detection loss with what semi-supervised learning needs: box weights, ignored anchors, a global normaliser.

Ultralytics divides by the sum of target scores of the local process. Here the loss comes back as a sum with its
normaliser beside it, so that the caller can add both over all workers first: the number of workers then does not change
the result. Two thin wrappers do it, one round the assigner, one round the element-wise class loss; the loss itself is
not copied.

Legend: B images, A anchor points, C classes, N boxes of the batch, M most boxes in one image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.tal import make_anchors

from dfssd.models.box_loss import InnerFocalerEiouLoss
from dfssd.models.detector import LOSS_EPOCHS, Branch

COMPONENTS = ("box", "cls", "dfl")


@dataclass
class Targets:
    """Boxes of a batch, sorted by image.

    Args:
        cls: (N,) class ids.
        boxes: (N,4) cx, cy, w, h, 0..1.
        image: (N,) index of the image in the batch, ascending.
        weight: (N,) weight of each box on its class term.
        box_weight: (N,) weight of each box on its box and DFL terms.
    """

    cls: Tensor
    boxes: Tensor
    image: Tensor
    weight: Tensor
    box_weight: Tensor

    def where(self, keep: Tensor) -> Targets:
        return Targets(self.cls[keep], self.boxes[keep], self.image[keep], self.weight[keep], self.box_weight[keep])


class _WeightedAssigner:
    """Stands in for the assigner and for the element-wise class loss of one Ultralytics criterion.

    Box and DFL terms are weighted through the target scores. The class term keeps the unweighted target (a target
    multiplied by 0.6 would teach 'score 0.6', which is another thing) and is weighted per anchor instead.
    """

    def __init__(self, criterion: Any) -> None:
        self.assigner, self.bce = criterion.assigner, criterion.bce
        criterion.assigner, criterion.bce = self.assign, self.class_loss
        self.weights_bm: Tensor = torch.zeros(0)
        self.box_weights_bm: Tensor = torch.zeros(0)
        self.ignore_ba: Tensor | None = None
        self.normaliser: Tensor = torch.zeros(())
        self.weighted_sum: Tensor = torch.zeros(())

    def assign(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        labels, boxes, scores_bac, foreground_ba, box_index_ba = self.assigner(*args, **kwargs)
        self.targets = scores_bac
        self.normaliser = scores_bac.sum()
        foreground = foreground_ba.bool()
        ones = torch.ones_like(foreground_ba, dtype=scores_bac.dtype)
        weight, box_weight = ones, ones
        if self.weights_bm.shape[1]:
            index = box_index_ba.clamp(max=self.weights_bm.shape[1] - 1)
            weight, box_weight = self.weights_bm.gather(1, index), self.box_weights_bm.gather(1, index)
        background = ones if self.ignore_ba is None else (~self.ignore_ba).to(ones.dtype)
        self.anchor_weight = torch.where(foreground, weight, background)
        weighted = scores_bac * torch.where(foreground, box_weight, torch.zeros_like(ones)).unsqueeze(-1)
        self.weighted_sum = weighted.sum()
        return labels, boxes, weighted, foreground_ba, box_index_ba

    def class_loss(self, logits_bac: Tensor, _: Tensor) -> Tensor:
        return torch.as_tensor(self.bce(logits_bac, self.targets.to(logits_bac.dtype))) * self.anchor_weight.unsqueeze(
            -1
        )


class DetectionLoss:
    """The detection loss of a model, as sums.

    Args:
        model: detector on its final device; its `args` hold the gains.
        box_loss: 'ciou' (Ultralytics') or 'inner_focaler_eiou'.
    """

    def __init__(self, model: DetectionModel, box_loss: str = "ciou") -> None:
        self.criterion = model.init_criterion()
        ends = hasattr(self.criterion, "one2one")
        parts = (
            {k: getattr(self.criterion, k) for k in ("one2many", "one2one")} if ends else {"one2many": self.criterion}
        )
        if box_loss == "inner_focaler_eiou":
            for part in parts.values():
                part.bbox_loss = InnerFocalerEiouLoss(part.reg_max)
        self.parts = {name: (part, _WeightedAssigner(part)) for name, part in parts.items()}
        self.stride = model.stride

    def set_progress(self, share: float) -> None:
        """Move the balance of end-to-end heads; `share` is how much of the training is done (0..1)."""
        if len(self.parts) == 2:
            self.criterion.updates = max(0, int(share * LOSS_EPOCHS) - 1)
            self.criterion.update()

    def branch_weights(self) -> dict[str, float]:
        if len(self.parts) == 1:
            return {"one2many": 1.0}
        return {"one2many": float(self.criterion.o2m), "one2one": float(self.criterion.o2o)}

    def __call__(
        self, raw: dict[str, Branch], targets: Targets, ignore_ba: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gain-scaled sums and their normalisers.

        Args:
            raw: head output by branch, for the B images that `targets` are about.
            targets: boxes; none at all is fine.
            ignore_ba: (B,A) bool, anchors that are neither positive nor background unless a box claims them.

        Returns:
            (K,3) sums of box, class and DFL loss for each of the K branches, times the branch's weight.
            (K,) sum of target scores of each branch, not yet clamped.
        """
        sums, normalisers = [], []
        share = self.branch_weights()
        for name, (part, tap) in self.parts.items():
            preds = raw[name]
            size = preds["scores"].shape[0]
            tap.weights_bm = _pad(targets.weight, targets, size)
            tap.box_weights_bm = _pad(targets.box_weight, targets, size)
            tap.ignore_ba = ignore_ba
            batch = {"cls": targets.cls.view(-1, 1), "bboxes": targets.boxes, "batch_idx": targets.image}
            _, loss, _ = part.get_assigned_targets_and_loss(preds, batch)
            sums.append(share[name] * loss * tap.weighted_sum.clamp(min=1))
            normalisers.append(tap.normaliser)
        return torch.stack(sums), torch.stack(normalisers)

    def anchors_inside(self, feats: list[Tensor], targets: Targets, batch_size: int) -> Tensor:
        """(B,A) bool: anchor points inside any of the boxes; a box thinner than a cell covers the cell it lies in."""
        points, strides = make_anchors(feats, self.stride, 0.5)
        points, strides = points * strides, strides.view(1, -1)  # px
        inside = torch.zeros(batch_size, points.shape[0], dtype=torch.bool, device=points.device)
        if not len(targets.cls):
            return inside
        height, width = (s * float(self.stride[0]) for s in feats[0].shape[2:])
        scale = torch.tensor([width, height], device=points.device)
        centre, half = targets.boxes[:, None, :2] * scale, targets.boxes[:, None, 2:] * scale / 2
        half = torch.maximum(half, strides.view(1, -1, 1) / 2)
        hit = ((points[None] - centre).abs() <= half).all(-1)  # (N,A)
        counts = torch.zeros_like(inside, dtype=torch.int32).index_add_(0, targets.image.long(), hit.to(torch.int32))
        return counts > 0


def _pad(weight_n: Tensor, targets: Targets, batch_size: int) -> Tensor:
    """(B,M) weights of boxes in the layout in which Ultralytics pads its targets."""
    counts = torch.bincount(targets.image.long(), minlength=batch_size)
    most = int(counts.max()) if len(targets.cls) else 0
    padded = torch.ones(batch_size, most, device=weight_n.device)
    if most:
        first = counts.cumsum(0) - counts
        within = torch.arange(len(targets.cls), device=counts.device) - first[targets.image.long()]
        padded[targets.image.long(), within] = weight_n.to(padded.dtype)
    return padded
