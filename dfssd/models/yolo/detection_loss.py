"""The detection loss of YOLO heads with what semi-supervised learning needs: box weights, ignored areas, a global normaliser.

The same numbers as Ultralytics' `v8DetectionLoss` and `E2ELoss` (compared by a test, for each family), computed on padded
boxes: nothing on the device asks how many boxes or positives there are, so no step waits. Only the anchor points that were
assigned to a box, at most topk a box, are gathered for the box terms.

Ultralytics divides by the sum of target scores of the local process. Here the loss comes back as a sum with its
normaliser beside it, so that the caller can add both over all workers first: the number of workers then does not change
the result.

Legend: B images, A anchor points, C classes, M places for boxes, U for ignored areas, K for positives, R DFL bins.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from ultralytics.nn.tasks import DetectionModel

from dfssd.models.anchors import Anchors, anchors_of, corners_px, ignored_points
from dfssd.models.head import HeadOutput
from dfssd.models.targets import Targets
from dfssd.models.yolo.assigner import Assignment, AssignmentInputs, Rule, assign
from dfssd.models.yolo.box_loss import BOX_LOSSES
from dfssd.models.yolo.detector import LOSS_EPOCHS

COMPONENTS = ("box", "cls", "dfl")


class DetectionLoss:
    """The detection loss of a model, as sums.

    Args:
        model: detector; its `args` hold the gains. How boxes are assigned is read from Ultralytics' own criterion.
        box_loss: one of `BOX_LOSSES`.
    """

    components: tuple[str, ...] = COMPONENTS

    def __init__(self, model: DetectionModel, box_loss: str = "ciou") -> None:
        self.criterion: Any = model.init_criterion()  # end-to-end heads: also the schedule between their branches
        names = ("one2many", "one2one") if hasattr(self.criterion, "one2one") else ("one2many",)
        parts = {k: getattr(self.criterion, k, self.criterion) for k in names}
        self.rules = {name: Rule.of(part.assigner) for name, part in parts.items()}
        self.box_loss = BOX_LOSSES[box_loss]
        gains = model.args
        self.gains = float(gains.box), float(gains.cls), float(gains.dfl)
        self.bins = int(model.model[-1].reg_max)
        self.strides = tuple(float(s) for s in model.stride)

    def set_progress(self, share: float) -> None:
        """Move the balance of end-to-end heads; `share` is how much of the training is done (0..1)."""
        if len(self.rules) == 2:
            self.criterion.updates = max(0, int(share * LOSS_EPOCHS) - 1)
            self.criterion.update()

    def branch_weights(self) -> dict[str, float]:
        if len(self.rules) == 1:
            return {"one2many": 1.0}
        return {"one2many": float(self.criterion.o2m), "one2one": float(self.criterion.o2o)}

    def __call__(self, raw: dict[str, HeadOutput], targets: Targets) -> tuple[Tensor, Tensor]:
        """Gain-scaled sums and their normalisers.

        A box's weight multiplies the class term of its anchor points, whose *target* keeps its value (a target multiplied by
        0.6 would teach 'score 0.6', which is another thing), its box weight their box and DFL terms.

        Args:
            raw: head output by branch, for the B images that `targets` are about.
            targets: boxes; none at all is fine.

        Returns:
            (N,B,3) box, class and DFL loss of each image, summed over its anchor points, in each of the N branches, times
            the branch's weight.
            (N,B) sum of the target scores of each image: what the sum over images is to be divided by, at least 1.
        """
        anchors = anchors_of(raw["one2many"].feats, self.strides)
        boxes = corners_px(targets.xywh, anchors)
        ignored = ignored_points(targets, anchors)
        sums, normalisers = [], []
        for name, weight in self.branch_weights().items():
            loss, normaliser = self._branch(raw[name], targets, boxes, ignored, anchors, self.rules[name])
            sums.append(weight * loss)
            normalisers.append(normaliser)
        return torch.stack(sums), torch.stack(normalisers)

    def _branch(
        self, raw: HeadOutput, targets: Targets, boxes_bm4: Tensor, ignored_ba: Tensor, anchors: Anchors, rule: Rule
    ) -> tuple[Tensor, Tensor]:
        """(B,3) sums and (B,) normalisers of one branch."""
        with torch.no_grad():
            scores = raw.scores.sigmoid()
            predicted = (
                decoded(raw.boxes.permute(0, 2, 1).contiguous(), anchors.points_a2, self.bins) * anchors.strides_a1
            )
            points = anchors.points_a2 * anchors.strides_a1
            found = assign(AssignmentInputs(scores, predicted, targets.cls, boxes_bm4, targets.valid), points, rule)
            cls = targets.cls.gather(1, found.box)
            target = torch.zeros_like(scores).scatter_(1, cls.unsqueeze(1), found.score.unsqueeze(1))
            weight = torch.where(found.foreground, targets.weight.gather(1, found.box), (~ignored_ba).to(scores.dtype))
        entropy = F.binary_cross_entropy_with_logits(raw.scores, target, reduction="none")
        box, dfl = self._box_terms(raw.boxes, targets, boxes_bm4, found, anchors, rule)
        box_gain, cls_gain, dfl_gain = self.gains
        cls_sum = (entropy * weight.unsqueeze(1)).sum((1, 2))
        return torch.stack([box_gain * box, cls_gain * cls_sum, dfl_gain * dfl], 1), found.score.sum(1)

    def _box_terms(
        self, boxes_bra: Tensor, targets: Targets, boxes_bm4: Tensor, found: Assignment, anchors: Anchors, rule: Rule
    ) -> tuple[Tensor, Tensor]:
        """(B,) sums of box and DFL loss over the anchor points that answer for a box."""
        places = min(found.foreground.shape[1], rule.topk2 * targets.cls.shape[1])
        with torch.no_grad():
            index = found.foreground.to(torch.float32).topk(places, 1, sorted=False).indices.sort(1).values  # (B,K)
            taken = found.foreground.gather(1, index)
            box = found.box.gather(1, index)
            weight = found.score.gather(1, index) * targets.box_weight.gather(1, box) * taken
            points, strides = anchors.points_a2[index], anchors.strides_a1[index]  # (B,K,2), (B,K,1)
            wanted = boxes_bm4.gather(1, box.unsqueeze(-1).expand(-1, -1, 4)) / strides
            # Empty places hold a pair of unit boxes: any number there, as long as it is finite.
            unit = torch.cat([points, points + 1], -1)
            wanted = torch.where(taken.unsqueeze(-1), wanted, unit)
        chosen = boxes_bra.permute(0, 2, 1).gather(1, index.unsqueeze(-1).expand(-1, -1, boxes_bra.shape[1]))
        predicted = torch.where(taken.unsqueeze(-1), decoded(chosen, points, self.bins), unit)
        box_sum = (self.box_loss(predicted, wanted) * weight).sum(1)
        distances = torch.cat([points - wanted[..., :2], wanted[..., 2:] - points], -1)  # (B,K,4) strides
        if self.bins > 1:
            each = distribution_focal(chosen, distances, self.bins)
        else:
            each = _distance_l1(chosen, distances, strides, anchors)
        return box_sum, (torch.where(taken, each, 0.0) * weight).sum(1)


def decoded(boxes_bkr: Tensor, points: Tensor, bins: int) -> Tensor:
    """(B,K,4) corners (strides) from (B,K,4R) raw output at anchor points."""
    distances = boxes_bkr
    if bins > 1:
        size, places, _ = boxes_bkr.shape
        # A kernel, not a copy that is waited for.
        values = torch.arange(bins, dtype=boxes_bkr.dtype, device=boxes_bkr.device)
        distances = boxes_bkr.reshape(size, places, 4, bins).softmax(3).matmul(values)
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], -1)


def distribution_focal(boxes_bkr: Tensor, distances_bk4: Tensor, bins: int) -> Tensor:
    """(B,K) distribution focal loss, mean over the four sides (Li et al., NeurIPS 2020, eq. 6)."""
    wanted = distances_bk4.clamp(0, bins - 1 - 0.01)
    left = wanted.long()
    to_left = left + 1 - wanted
    log = F.log_softmax(boxes_bkr.reshape(*wanted.shape, bins), -1)
    low, high = (log.gather(-1, k.unsqueeze(-1)).squeeze(-1) for k in (left, left + 1))
    return -(low * to_left + high * (1 - to_left)).mean(-1)


def _distance_l1(chosen_bk4: Tensor, distances_bk4: Tensor, strides_bk1: Tensor, anchors: Anchors) -> Tensor:
    """(B,K) what stands for DFL in heads without bins: L1 between distances as shares of the image, mean over sides."""
    parts = []
    for first, side in ((0, anchors.width_px), (1, anchors.height_px)):  # left and right, top and bottom
        own, other = (d[..., first::2] * strides_bk1 / side for d in (chosen_bk4, distances_bk4))
        parts.append((own - other).abs())
    return torch.cat(parts, -1).mean(-1)
