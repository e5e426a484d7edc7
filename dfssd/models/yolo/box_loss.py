"""Box regression losses of the detection loss, pair by pair."""

from __future__ import annotations

import torch
from torch import Tensor
from ultralytics.utils.metrics import bbox_iou

RATIO = 0.75  # size of Inner-IoU's auxiliary boxes, as published
INTERVAL = (0.0, 0.95)  # IoUs that Focaler-IoU stretches to 0..1, as published
EPS = 1e-7


def inner_focaler_eiou(
    predicted_xyxy: Tensor, target_xyxy: Tensor, ratio: float = RATIO, interval: tuple[float, float] = INTERVAL
) -> Tensor:
    """1 - Focaler(Inner-IoU) + EIoU's three penalties, for each pair of boxes.

    Inner-IoU: IoU of both boxes shrunk about their centres (Zhang et al. 2023, arXiv 2311.02877, eq. 6 to 11).
    Focaler-IoU: linear stretch of an interval of IoUs to 0..1 (Zhang & Zhang 2024, arXiv 2401.10525, eq. 7). EIoU: squared
    distance of centres, and of widths and heights, over those of the enclosing box (Zhang et al. 2022, arXiv 2101.08158,
    eq. 6). Boxes without overlap keep the penalties' gradient.

    Args:
        predicted_xyxy, target_xyxy: (...,4) x1, y1, x2, y2 in any one unit.

    Returns:
        (...) losses.
    """
    (p1, p2), (t1, t2) = ((b[..., :2], b[..., 2:]) for b in (predicted_xyxy, target_xyxy))
    p_centre, t_centre, p_size, t_size = (p1 + p2) / 2, (t1 + t2) / 2, p2 - p1, t2 - t1
    low = torch.maximum(p_centre - p_size * ratio / 2, t_centre - t_size * ratio / 2)
    high = torch.minimum(p_centre + p_size * ratio / 2, t_centre + t_size * ratio / 2)
    overlap = (high - low).clamp(min=0).prod(-1)
    union = (p_size.prod(-1) + t_size.prod(-1)) * ratio**2 - overlap
    iou = overlap / (union + EPS)
    focused = ((iou - interval[0]) / (interval[1] - interval[0])).clamp(0, 1)
    hull = torch.maximum(p2, t2) - torch.minimum(p1, t1)
    distance = (p_centre - t_centre).square().sum(-1) / (hull.square().sum(-1) + EPS)
    shape = ((p_size - t_size).square() / (hull.square() + EPS)).sum(-1)
    return 1 - focused + distance + shape


def ciou(predicted_xyxy: Tensor, target_xyxy: Tensor) -> Tensor:
    """1 - Complete-IoU (Zheng et al., AAAI 2020, eq. 10), Ultralytics' own; shapes as `inner_focaler_eiou`."""
    overlap: Tensor = bbox_iou(predicted_xyxy, target_xyxy, xywh=False, CIoU=True)
    return 1.0 - overlap.squeeze(-1)


# The functions behind the table of `dfssd.config.choices`.
BOX_LOSSES = {"ciou": ciou, "inner_focaler_eiou": inner_focaler_eiou}
