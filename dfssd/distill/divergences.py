"""How two feature maps are compared: pure functions (student, teacher) -> scalar.

Both maps are (B,C,H,W) float32 with equal shapes; the caller has projected the student to the teacher's channels and
normalised both with `standardise`. Each is a mean over images, so two halves of a batch average to the whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def standardise(features_bchw: Tensor, eps: float = 1e-6) -> Tensor:
    """Zero mean and unit variance over the positions of each channel of each image (an all-equal channel becomes 0).

    Scale differences between networks carry no information about what was seen where (PKD, Cao et al. 2022, section 3.2,
    does the same over the batch; per image keeps the loss independent of how a batch is split).
    """
    mean = features_bchw.mean((2, 3), keepdim=True)
    centred = features_bchw - mean
    return centred * torch.rsqrt(centred.square().mean((2, 3), keepdim=True) + eps)


def mse(student_bchw: Tensor, teacher_bchw: Tensor) -> Tensor:
    """Mean squared difference (mimic; Li et al. 2017, "Mimicking very efficient network for object detection")."""
    return F.mse_loss(student_bchw, teacher_bchw)


def js(student_bchw: Tensor, teacher_bchw: Tensor, tau: float = 1.0) -> Tensor:
    """Jensen-Shannon divergence (nats) of each channel's spatial softmax, mean over images and channels; in [0, ln 2].

    JS = 1/2 KL(P||M) + 1/2 KL(Q||M), M = (P+Q)/2 (Lin 1991). Spatial softmax per channel as in CWD (Shu et al. 2021,
    section 3.1). All in log space, so that a position of probability 0 contributes 0 and not NaN.

    Args:
        tau: temperature of the softmax.
    """
    log_p = F.log_softmax(student_bchw.flatten(2) / tau, -1)
    log_q = F.log_softmax(teacher_bchw.flatten(2) / tau, -1)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=log_p.dtype))
    terms = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    return 0.5 * terms.sum(-1).mean()


def hierarchical(divergences_l: Tensor) -> Tensor:
    """Sum over tap layers with weights softmax(divergence), which pay most attention to the layers that differ most.

    HW-JS = sum_l stopgrad(softmax_l(JS_l)) JS_l (DFSSD). Without the stop, the loss could fall by moving weight between
    layers instead of by moving features.
    """
    return (torch.softmax(divergences_l.detach(), 0) * divergences_l).sum()


def feature_loss(kind: str, student: list[Tensor], teacher: list[Tensor], tau: float) -> Tensor:
    """Divergence over all tap layers: 'mse' (mean over layers) or 'hw_js'.

    Args:
        student, teacher: one (B,C,H,W) map a tap layer, equal shapes pairwise; not yet standardised.
    """
    pairs = [(standardise(s.float()), standardise(t.float())) for s, t in zip(student, teacher, strict=True)]
    if kind == "mse":
        return torch.stack([mse(s, t) for s, t in pairs]).mean()
    return hierarchical(torch.stack([js(s, t, tau) for s, t in pairs]))
