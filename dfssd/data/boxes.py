"""Boxes as arrays: columns by name, corners, overlap, mirroring, what reaches a threshold.

Legend: labels are (n,5) [cls, cx, cy, w, h], candidates (n,7) [cls, cx, cy, w, h, score, agreement]; coordinates 0..1.
Detections, as networks leave them, are (n,6) [x1, y1, x2, y2 (px), score, class], (n,7) with what hit a label.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # what a loading process does not need, it does not import
    from dfssd.data.manifest import Boxes

# Columns of labels and candidates.
CLS, X, Y, W, H, SCORE, AGREEMENT = range(7)
XY, WH, XYWH = slice(X, Y + 1), slice(W, H + 1), slice(X, H + 1)
LABEL_COLUMNS, CANDIDATE_COLUMNS = 5, 7
# Columns of detections; `line/detector.py`, which stands alone, has them once more.
X1, Y1, X2, Y2, DET_SCORE, DET_CLS, HIT = range(7)
XYXY, DETECTION = slice(X1, Y2 + 1), slice(X1, HIT)
CLASS_SCORES = slice(4, None)  # channels of a network's (B,4+C,A) output, after its four coordinates


def unflip(boxes: Boxes, left_right: bool, up_down: bool) -> Boxes:
    """Candidates found in a mirrored image, where they lie in the image itself (and the other way round)."""
    turned: Boxes = boxes.copy()
    if left_right:
        turned[:, X] = 1 - turned[:, X]
    if up_down:
        turned[:, Y] = 1 - turned[:, Y]
    return turned


def above(boxes: Boxes, tau_c: np.ndarray, share: float = 1.0) -> Boxes:
    """Candidates at or above this share of their class's threshold."""
    found: Boxes = boxes[boxes[:, SCORE] >= share * tau_c[boxes[:, CLS].astype(int)]]
    return found


def detections_above(found: np.ndarray, tau_c: np.ndarray) -> np.ndarray:
    """Detections at or above their class's threshold."""
    return np.asarray(found[found[:, DET_SCORE] >= tau_c[found[:, DET_CLS].astype(int)]])


def corners(boxes: Boxes) -> np.ndarray:
    """(n,4) x1, y1, x2, y2 of boxes whose columns 1..4 are cx, cy, w, h."""
    return np.concatenate([boxes[:, XY] - boxes[:, WH] / 2, boxes[:, XY] + boxes[:, WH] / 2], 1)


def iou(a_xyxy: np.ndarray, b_xyxy: np.ndarray) -> np.ndarray:
    """(n,m) intersection over union of two sets of boxes."""
    low = np.maximum(a_xyxy[:, None, :2], b_xyxy[None, :, :2])
    high = np.minimum(a_xyxy[:, None, 2:], b_xyxy[None, :, 2:])
    both = (high - low).clip(0).prod(-1)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(-1) for x in (a_xyxy, b_xyxy))
    return np.asarray(both / np.maximum(area_a[:, None] + area_b[None] - both, 1e-12))
