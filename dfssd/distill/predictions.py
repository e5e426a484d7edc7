"""Distillation of the head's predictions, anchor by anchor: networks with strides 8, 16, 32 share their anchor points.

Every term comes as (sum, normaliser), so that both can be added over workers first. The teacher is a constant.

Legend: B images, A anchor points, C classes, R DFL bins a side (16; 1 in YOLO26, where the distance itself is predicted).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TAU = 10.0  # temperature of the localisation term, LD's value
TOP = 0.05  # share of the anchor points of an image that the localisation term looks at


def best_score(teacher_bca: Tensor) -> Tensor:
    """(B,A) the teacher's best class score at each anchor point, from its class logits."""
    return teacher_bca.detach().amax(1).sigmoid()


def dense_class(student_bca: Tensor, teacher_bca: Tensor, score_ba: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Class term: BCE to the teacher's soft scores, weighted by |p_T - p_S|^2 (quality focal form, Li et al. 2020, eq. 7;
    as distillation: BCKD, Yang et al. 2023).

    Args:
        student_bca, teacher_bca: class logits.
        score_ba: `best_score` of the teacher, where it is known already.

    Returns:
        The sum over images, anchors and classes, and its normaliser: the teacher's best score summed over anchors, which
        counts how much there is to teach (not clamped).
    """
    target = teacher_bca.detach().sigmoid()
    weight = (target - student_bca.detach().sigmoid()).square()
    loss = F.binary_cross_entropy_with_logits(student_bca, target, reduction="none")
    return (weight * loss).sum(), (best_score(teacher_bca) if score_ba is None else score_ba).sum()


def best_anchors(score_ba: Tensor, top: float = TOP) -> tuple[Tensor, Tensor]:
    """(B,k) scores and indices of the best `top` share (0..1) of the anchor points of each image, at least one."""
    count = max(1, round(top * score_ba.shape[1]))
    return score_ba.topk(count, dim=1)


def dfl_localisation(
    student_bra: Tensor, teacher_bra: Tensor, score_ba: Tensor, tau: float = TAU, top: float = TOP
) -> tuple[Tensor, Tensor]:
    """Localisation term: tau^2 KL(teacher || student) between the DFL bins of each side at the anchor points the teacher
    is surest of, weighted by its score (LD, Zheng et al., CVPR 2022, eq. 3; weights as in its "valuable" region).

    Args:
        student_bra, teacher_bra: (B,4R,A) logits of the bins.
        score_ba: (B,A) teacher's best class score.
        tau: temperature.
        top: share of the anchor points of an image.

    Returns:
        Sum over images and anchors of the mean over the four sides, and the sum of scores (not clamped).
    """
    weight_bk, index_bk = best_anchors(score_ba, top)
    size, channels, _ = student_bra.shape
    s, t = (_chosen(x, index_bk).view(size, 4, channels // 4, -1) / tau for x in (student_bra, teacher_bra.detach()))
    log_t = F.log_softmax(t, 2)
    divergence = (log_t.exp() * (log_t - F.log_softmax(s, 2))).sum(2).mean(1)  # (B,k)
    return tau**2 * (weight_bk * divergence).sum(), weight_bk.sum()


def distance_localisation(
    student_bra: Tensor, teacher_bra: Tensor, score_ba: Tensor, top: float = TOP
) -> tuple[Tensor, Tensor]:
    """Localisation term where one of the two has no bins, or other ones: smooth L1 between the predicted distances to the
    four sides (in strides), weighted by the teacher's score at the anchor points it is surest of.

    Args, Returns: as `dfl_localisation`, with 4R of student and teacher each of its own.
    """
    weight_bk, index_bk = best_anchors(score_ba, top)
    s, t = distances(_chosen(student_bra, index_bk)), distances(_chosen(teacher_bra.detach(), index_bk))
    return (weight_bk * F.smooth_l1_loss(s, t, reduction="none").mean(1)).sum(), weight_bk.sum()


def distances(boxes_bra: Tensor) -> Tensor:
    """(B,4,A) distances to the four sides (strides): the mean of the bins, or the output itself where there are none."""
    size, channels, anchors = boxes_bra.shape
    if channels == 4:
        return boxes_bra
    bins = torch.arange(channels // 4, device=boxes_bra.device, dtype=boxes_bra.dtype)
    return (boxes_bra.view(size, 4, -1, anchors).softmax(2) * bins.view(1, 1, -1, 1)).sum(2)


def raw_mse(
    student_bra: Tensor, teacher_bra: Tensor, student_bca: Tensor, teacher_bca: Tensor
) -> tuple[Tensor, Tensor]:
    """Squared difference of the raw head output, box bins and class logits alike, times 1/4: the published form.

    Returns:
        Sum over all elements, and their number.
    """
    total = (student_bra - teacher_bra.detach()).square().sum() + (student_bca - teacher_bca.detach()).square().sum()
    return 0.25 * total, total.new_full((), float(student_bra.numel() + student_bca.numel()))


def _chosen(values_bra: Tensor, index_bk: Tensor) -> Tensor:
    """Values at the chosen anchor points."""
    return values_bra.gather(2, index_bk[:, None].expand(-1, values_bra.shape[1], -1))
