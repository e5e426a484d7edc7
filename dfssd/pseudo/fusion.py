"""One set of boxes from several views of an image: mirrored forms, several teachers, or both.

Weighted box fusion (Solovyev et al., Image and Vision Computing 2021): boxes of a class that overlap become one, at the
mean of their corners weighted by score; a box that few views saw loses score in proportion.

Legend: V views; candidates are (n,7) arrays [cls, cx, cy, w, h (0..1), score, agreement].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dfssd.data.boxes import CANDIDATE_COLUMNS, CLS, SCORE, corners
from dfssd.data.manifest import Boxes

FLIPS = ((False, False), (True, False), (False, True), (True, True))  # left-right, up-down


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
        kept = views[0][views[0][:, SCORE] >= floor]
        return kept[np.argsort(-kept[:, SCORE], kind="stable")][:most]
    every = np.concatenate(views)
    source = np.repeat(np.arange(len(views)), [len(v) for v in views])
    fused = []
    for c in np.unique(every[:, CLS]):
        mine = every[:, CLS] == c
        boxes = corners(every[mine].astype(np.float64)).tolist()
        for cluster in _clusters(boxes, every[mine, SCORE].tolist(), source[mine].tolist(), iou_limit):
            fused.append([float(c), *cluster.candidate(len(views))])
    result = np.asarray(fused, np.float32).reshape(-1, CANDIDATE_COLUMNS)
    result = result[result[:, SCORE] >= floor]
    return result[np.argsort(-result[:, SCORE], kind="stable")][:most]


Corners = list[
    float
]  # x1, y1, x2, y2. Plain floats: for some ten boxes NumPy's overhead is ten times their arithmetic.


class _Cluster:
    """Boxes of several views that are one defect: at most one a view."""

    def __init__(self) -> None:
        self.boxes: list[Corners] = []
        self.views: set[int] = set()
        self.score = 0.0  # sum
        self.mean: Corners = [0.0] * 4  # weighted by score

    def add(self, box: Corners, score: float, view: int) -> None:
        old, self.score = self.score, self.score + score
        self.mean = [(m * old + x * score) / self.score for m, x in zip(self.mean, box, strict=True)]
        self.boxes.append(box)
        self.views.add(view)

    def candidate(self, views: int) -> list[float]:
        """cx, cy, w, h, score, agreement."""
        x1, y1, x2, y2 = self.mean
        agreement = sum(_overlap(self.mean, box) for box in self.boxes) / views
        return [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, self.score / views, agreement]


def _clusters(boxes: list[Corners], score: list[float], source: list[int], limit: float) -> list[_Cluster]:
    """Group boxes of one class, best score first: each joins the fused box it overlaps most, one box a view."""
    clusters: list[_Cluster] = []
    for k in sorted(range(len(boxes)), key=lambda k: -score[k]):
        near = [(o, c) for c in clusters if (o := _overlap(boxes[k], c.mean)) > limit]
        near.sort(key=lambda pair: -pair[0])
        cluster = next((c for _, c in near if source[k] not in c.views), None)
        if cluster is None and near:
            continue  # all of them have a box of this view already: a double, not another defect
        if cluster is None:
            cluster = _Cluster()
            clusters.append(cluster)
        cluster.add(boxes[k], score[k], source[k])
    return clusters


def _overlap(a: Corners, b: Corners) -> float:
    """IoU of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)
