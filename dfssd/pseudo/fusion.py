"""One set of boxes from several views of an image: mirrored forms, several teachers, or both.

Weighted box fusion (Solovyev et al., Image and Vision Computing 2021): boxes of a class that overlap become one, at the
mean of their corners weighted by score; a box that few views saw loses score in proportion.

Legend: V views; candidates are (n,7) arrays [cls, cx, cy, w, h (0..1), score, agreement].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dfssd.data.manifest import Boxes

FLIPS = ((False, False), (True, False), (False, True), (True, True))  # left-right, up-down


def unflip(boxes: Boxes, left_right: bool, up_down: bool) -> Boxes:
    """Candidates found in a mirrored image, where they lie in the image itself (and the other way round)."""
    turned: Boxes = boxes.copy()
    if left_right:
        turned[:, 1] = 1 - turned[:, 1]
    if up_down:
        turned[:, 2] = 1 - turned[:, 2]
    return turned


def corners(boxes: Boxes) -> np.ndarray:
    """(n,4) x1, y1, x2, y2 of boxes whose columns 1..4 are cx, cy, w, h."""
    return np.concatenate([boxes[:, 1:3] - boxes[:, 3:5] / 2, boxes[:, 1:3] + boxes[:, 3:5] / 2], 1)


def iou(a_xyxy: np.ndarray, b_xyxy: np.ndarray) -> np.ndarray:
    """(n,m) intersection over union of two sets of boxes."""
    low = np.maximum(a_xyxy[:, None, :2], b_xyxy[None, :, :2])
    high = np.minimum(a_xyxy[:, None, 2:], b_xyxy[None, :, 2:])
    both = (high - low).clip(0).prod(-1)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(-1) for x in (a_xyxy, b_xyxy))
    return np.asarray(both / np.maximum(area_a[:, None] + area_b[None] - both, 1e-12))


def fuse(views: Sequence[Boxes], iou_limit: float, floor: float, most: int) -> Boxes:
    """Fuse what V views of one image show, each brought back to the image itself.

    Args:
        iou_limit: overlap above which boxes of a class are the same defect.
        floor: lowest fused score that is kept.
        most: most candidates that are kept, by score.

    Returns:
        (n,7) candidates by falling score. Score: mean over all views, a view without the box counting 0. Agreement:
        mean IoU of a view's box with the fused one, a view without it counting 0; so 1 where there is one view.
    """
    if len(views) == 1:
        kept = views[0][views[0][:, 5] >= floor]
        return kept[np.argsort(-kept[:, 5], kind="stable")][:most]
    every = np.concatenate(views).astype(np.float64)
    source = np.repeat(np.arange(len(views)), [len(v) for v in views])
    fused = []
    for c in np.unique(every[:, 0]):
        mine = every[:, 0] == c
        for members in _clusters(corners(every[mine]), every[mine, 5], source[mine], iou_limit):
            fused.append(_one_box(c, *members, views=len(views)))
    result = np.asarray(fused, np.float32).reshape(-1, 7)
    result = result[result[:, 5] >= floor]
    return result[np.argsort(-result[:, 5], kind="stable")][:most]


Members = tuple[np.ndarray, np.ndarray]  # (k,4) corners and (k,) scores, one view each


def _clusters(xyxy: np.ndarray, score: np.ndarray, source: np.ndarray, limit: float) -> list[Members]:
    """Group boxes of one class, best score first: each joins the fused box it overlaps most, one box a view."""
    clusters: list[list[int]] = []
    means = np.zeros((0, 4))
    for k in np.argsort(-score, kind="stable"):
        overlap = iou(xyxy[k : k + 1], means)[0]
        near = [j for j in np.argsort(-overlap, kind="stable") if overlap[j] > limit]
        free = next((j for j in near if source[k] not in source[clusters[j]]), None)
        if free is not None:
            clusters[free].append(int(k))
            means[free] = np.average(xyxy[clusters[free]], axis=0, weights=score[clusters[free]])
        elif not near:  # where all near ones have a box of this view already, it is a double, not another defect
            clusters.append([int(k)])
            means = np.concatenate([means, xyxy[k : k + 1]])
    return [(xyxy[c], score[c]) for c in clusters]


def _one_box(cls: float, xyxy: np.ndarray, score: np.ndarray, views: int) -> np.ndarray:
    """(7,) candidate from the boxes of a cluster."""
    mean = np.average(xyxy, axis=0, weights=score)
    agreement = iou(mean[None], xyxy).sum() / views
    centre, wh = (mean[:2] + mean[2:]) / 2, mean[2:] - mean[:2]
    return np.array([cls, *centre, *wh, score.sum() / views, agreement])
