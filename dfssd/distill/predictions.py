"""Distillation of the head's predictions, anchor by anchor (n and s models of one family share the anchor points).

Legend: B images, A anchor points, C classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def dense_class(student_bca: Tensor, teacher_bca: Tensor) -> tuple[Tensor, Tensor]:
    """Class term: BCE to the teacher's soft scores, weighted by |p_T - p_S|^2 (quality focal form, Li et al. 2020, eq. 7;
    as distillation: BCKD, Yang et al. 2023).

    Args:
        student_bca, teacher_bca: class logits.

    Returns:
        The sum over images, anchors and classes, and its normaliser: the teacher's best score summed over anchors, which
        counts how much there is to teach (not clamped).
    """
    target = teacher_bca.detach().sigmoid()
    weight = (target - student_bca.detach().sigmoid()).square()
    loss = F.binary_cross_entropy_with_logits(student_bca, target, reduction="none")
    return (weight * loss).sum(), target.amax(1).sum()
