"""Which anchor point answers for which box: task-aligned assignment (TOOD, Feng et al., ICCV 2021, section 3.2) as
Ultralytics computes it, on padded boxes with masks, so that the device is never asked how many there are.

Ultralytics looks at pairs of box and anchor point that lie in each other (`nonzero`, a wait for the device); here all
pairs are computed, some images at a time so that memory stays bounded. Choice and scores are the same, bit by bit.

Legend: B images, M places for boxes, A anchor points, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from ultralytics.utils.metrics import bbox_iou

PAIRS = 2**24  # of box and anchor point at a time: 64 MiB a tensor
EPS = 1e-9


@dataclass(frozen=True)
class Rule:
    """How boxes are assigned; values are those of an Ultralytics assigner.

    Args:
        topk: anchor points that each box proposes itself to.
        topk2: of these, how many it keeps after conflicts (1 in one-to-one branches).
        alpha, beta: powers of score and overlap in the alignment metric.
        smallest: side (px) to which smaller boxes are enlarged when points are looked for inside.
    """

    topk: int
    topk2: int
    alpha: float
    beta: float
    smallest: float

    @classmethod
    def of(cls, assigner: Any) -> Rule:
        """The rule of an Ultralytics `TaskAlignedAssigner`."""
        return cls(assigner.topk, assigner.topk2, assigner.alpha, assigner.beta, float(assigner.stride_val))


@dataclass
class Assignment:
    """Args:
    foreground: (B,A) bool, is the anchor point responsible for a box?
    box: (B,A) place of its box; arbitrary elsewhere.
    score: (B,A) target of its class score; 0 elsewhere.
    """

    foreground: Tensor
    box: Tensor
    score: Tensor


class AssignmentInputs(NamedTuple):
    """What is to be assigned.

    Args:
        scores_bca: class scores, 0..1.
        predicted_ba4: predicted corners x1, y1, x2, y2 (px).
        cls_bm, boxes_bm4, valid_bm: class ids, corners (px) and which places hold a box.
    """

    scores_bca: Tensor
    predicted_ba4: Tensor
    cls_bm: Tensor
    boxes_bm4: Tensor
    valid_bm: Tensor


@torch.no_grad()
def assign(asked: AssignmentInputs, points_a2: Tensor, rule: Rule) -> Assignment:
    """Assign anchor points (px) to boxes."""
    images, places = asked.cls_bm.shape
    step = max(1, PAIRS // (places * points_a2.shape[0]))
    parts = [
        _assign(AssignmentInputs(*(t[k : k + step] for t in asked)), points_a2, rule) for k in range(0, images, step)
    ]
    if len(parts) == 1:
        return parts[0]
    return Assignment(*(torch.cat([getattr(p, name) for p in parts]) for name in ("foreground", "box", "score")))


def _assign(asked: AssignmentInputs, points_a2: Tensor, rule: Rule) -> Assignment:
    scores_bca, predicted_ba4, cls_bm, boxes_bm4, valid_bm = asked
    candidate = _inside(points_a2, boxes_bm4, valid_bm, rule.smallest)  # (B,M,A)
    score = scores_bca.gather(1, cls_bm.unsqueeze(-1).expand(-1, -1, scores_bca.shape[2]))
    overlap = bbox_iou(boxes_bm4.unsqueeze(2), predicted_ba4.unsqueeze(1), xywh=False, CIoU=True).squeeze(-1).clamp_(0)
    overlap = overlap.masked_fill_(~candidate, 0)
    aligned = (score.pow(rule.alpha) * overlap.pow(rule.beta)).masked_fill_(~candidate, 0)

    best = aligned.topk(min(rule.topk, aligned.shape[2]), -1).indices
    positive = torch.zeros_like(candidate).scatter_(-1, best, True) & candidate
    # A point that several boxes want goes to the one it overlaps most.
    contested = positive.sum(1, keepdim=True) > 1
    closest = torch.zeros_like(candidate).scatter_(1, overlap.argmax(1, keepdim=True), True)
    positive = torch.where(contested, closest, positive)
    if rule.topk2 != rule.topk:
        best = (aligned * positive).topk(rule.topk2, -1).indices
        positive &= torch.zeros_like(candidate).scatter_(-1, best, True)

    aligned *= positive
    overlap *= positive
    highest = aligned.amax(-1, keepdim=True)
    target = aligned.mul_(overlap.amax(-1, keepdim=True)).div_(highest + EPS).amax(1)
    foreground, box = positive.to(torch.uint8).max(1)
    return Assignment(foreground.bool(), box, target)


def _inside(points_a2: Tensor, boxes_bm4: Tensor, valid_bm: Tensor, smallest: float) -> Tensor:
    """(B,M,A) bool: the point lies in the box, small ones enlarged about their centre."""
    low, high = boxes_bm4.split(2, -1)
    centre, size = (low + high) / 2, high - low
    half = size.clamp(min=smallest) / 2
    low, high = (centre - half).unsqueeze(2), (centre + half).unsqueeze(2)
    inside: Tensor = (points_a2 - low > EPS) & (high - points_a2 > EPS)
    return torch.logical_and(inside.all(-1), valid_bm.unsqueeze(-1))
