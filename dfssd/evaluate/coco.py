"""Average precision as COCO computes it, over all boxes and by box size.

Ultralytics' mAP interpolates precision differently (1 to 2 points apart on small sets), so both are given. Rules as in
pycocotools' COCOeval: 101 recall points, at most 100 boxes a picture, greedy matching by falling score; a truth outside
the size range is ignored, and so is an unmatched detection outside it. Sizes are areas in px of the picture (32^2, 96^2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dfssd.data.boxes import iou

SIZES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
LEVELS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MOST = 100


def coco_numbers(records: Sequence[dict[str, Any]], classes: int) -> dict[str, Any]:
    """AP by size: {all, small, medium, large} each {map50_95, map50, boxes}; None where no box has the size.

    Args:
        records: with `boxes` (n,4) x1, y1, x2, y2 in px of the picture, conf, pred_cls, `truth` (m,4), target_cls.
        classes: C.
    """
    result: dict[str, Any] = {}
    for name, (low, high) in SIZES.items():
        table = [_class_ap(records, c, low, high) for c in range(classes)]
        aps = np.array([ap for ap, _ in table if ap is not None])
        result[name] = {
            "map50_95": float(aps.mean()) if len(aps) else None,
            "map50": float(aps[:, 0].mean()) if len(aps) else None,
            "boxes": sum(n for _, n in table),
        }
    return result


def _class_ap(records: Sequence[dict[str, Any]], c: int, low: float, high: float) -> tuple[np.ndarray | None, int]:
    """(10,) AP of a class by IoU level, None without a box of the size; and how many boxes count."""
    scores, hits, ignored, boxes = [], [], [], 0
    for one in records:
        mine = one["pred_cls"] == c
        order = np.argsort(-one["conf"][mine], kind="stable")[:MOST]
        found, score = one["boxes"][mine][order].astype(np.float64), one["conf"][mine][order]
        truth = one["truth"][one["target_cls"] == c].astype(np.float64)
        outside = _outside(truth, low, high)
        truth, outside = truth[np.argsort(outside, kind="stable")], np.sort(outside)
        hit, skip = _match(found, truth, outside)
        skip |= ~hit & ~skip & _outside(found, low, high)[None]
        scores.append(score)
        hits.append(hit)
        ignored.append(skip)
        boxes += int((~outside).sum())
    if not boxes:
        return None, 0
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hit, skip = np.concatenate(hits, 1)[:, order], np.concatenate(ignored, 1)[:, order]
    return np.array([_area(h[~s], boxes) for h, s in zip(hit, skip, strict=True)]), boxes


def _outside(xyxy: np.ndarray, low: float, high: float) -> np.ndarray:
    area = (xyxy[:, 2:] - xyxy[:, :2]).prod(1)
    return np.asarray((area < low) | (area > high))


def _match(found: np.ndarray, truth: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(10,n) hits and (10,n) matches with a truth of another size; truths inside the range come first."""
    hit, skip = np.zeros((len(LEVELS), len(found)), bool), np.zeros((len(LEVELS), len(found)), bool)
    if not len(found) or not len(truth):
        return hit, skip
    table = iou(found, truth)
    for level, least in enumerate(LEVELS):
        free = np.ones(len(truth), bool)
        for k in range(len(found)):
            inside = np.where(free & ~outside, table[k], -1.0)
            best = int(inside.argmax())
            if inside[best] < least:  # only then may it take one that does not count
                others = np.where(free & outside, table[k], -1.0)
                best = int(others.argmax())
                if others[best] < least:
                    continue
            free[best] = False
            (skip if outside[best] else hit)[level, k] = True
    return hit, skip


def _area(hits: np.ndarray, boxes: int) -> float:
    """Area under the precision envelope, sampled at 101 recalls."""
    true = hits.cumsum()
    recall, precision = true / boxes, true / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    index = np.searchsorted(recall, RECALLS, side="left")
    return float(np.append(envelope, 0.0)[np.minimum(index, len(envelope))].mean())
