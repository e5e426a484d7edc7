"""Numbers behind the pictures of a report: precision, recall and F1 over the score, confusion, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dfssd.data.boxes import iou

SCORES = np.arange(0, 100) / 100
BINS = 10
MATCH_IOU = 0.5


def score_curves(records: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Precision, recall and F1 at IoU 0.5 over the score, by class and for all; best F1 and its score.

    Precision is None where nothing is found. Lists belong to `score`.
    """
    cls = _joined(records, "pred_cls")
    conf, hit = _joined(records, "conf"), _joined([{"tp": r["tp"][:, 0]} for r in records], "tp").astype(bool)
    truth = _joined(records, "target_cls")
    result: dict[str, Any] = {"score": SCORES.tolist(), "by_class": {}}
    for c, name in [*enumerate(names), (-1, "all")]:
        mine = np.ones(len(cls), bool) if c < 0 else cls == c
        boxes = len(truth) if c < 0 else int((truth == c).sum())
        found, true = (np.sort(conf[mine & which]) for which in (np.ones(len(cls), bool), hit))
        n = len(found) - np.searchsorted(found, SCORES)
        k = len(true) - np.searchsorted(true, SCORES)
        recall = k / max(boxes, 1)
        f1 = 2 * k / np.maximum(n + boxes, 1)
        result["by_class"][name] = {
            "boxes": boxes,
            "precision": [round(float(a / b), 4) if b else None for a, b in zip(k, n, strict=True)],
            "recall": recall.round(4).tolist(),
            "f1": f1.round(4).tolist(),
            "best_f1": round(float(f1.max()), 4),
            "best_score": round(float(SCORES[f1.argmax()]), 3),
        }
    return result


def confusion(records: Sequence[dict[str, Any]], tau_c: np.ndarray) -> list[list[int]]:
    """(C+1,C+1) counts: row = what is there, column = what was found; the last row and column are 'nothing'.

    Boxes at or above their class's threshold, matched by falling score to any truth at IoU 0.5, whatever its class.
    """
    classes = len(tau_c)
    table = np.zeros((classes + 1, classes + 1), int)
    for one in records:
        keep = one["conf"] >= tau_c[one["pred_cls"].astype(int)]
        boxes, cls, conf = one["boxes"][keep], one["pred_cls"][keep].astype(int), one["conf"][keep]
        target = one["target_cls"].astype(int)
        free = np.ones(len(target), bool)
        overlap = iou(boxes, one["truth"]) if len(boxes) and len(target) else np.zeros((len(boxes), len(target)))
        for k in np.argsort(-conf, kind="stable"):
            row = np.where(free, overlap[k], -1.0)
            best = int(row.argmax()) if len(row) else -1
            if best >= 0 and row[best] >= MATCH_IOU:
                free[best] = False
                table[target[best], cls[k]] += 1
            else:
                table[classes, cls[k]] += 1
        np.add.at(table, (target[free], classes), 1)
    return table.tolist()


def calibration(records: Sequence[dict[str, Any]], floor: float = 0.05) -> dict[str, Any]:
    """Is a box of score 0.7 right in 70 % of the cases (IoU 0.5)? Ten bins of score, boxes from `floor` on.

    Returns:
        bins: score (mean), precision, boxes; error: expected calibration error, 0..1 (Guo et al., ICML 2017, for
        detections as in Kueppers et al., CVPR workshops 2020); None without a box.
    """
    conf, hit = _joined(records, "conf"), _joined([{"tp": r["tp"][:, 0]} for r in records], "tp").astype(bool)
    keep = conf >= floor
    conf, hit = conf[keep], hit[keep]
    index = np.minimum((conf * BINS).astype(int), BINS - 1)
    bins = []
    for b in range(BINS):
        mine = index == b
        if mine.any():
            bins.append([float(conf[mine].mean()), float(hit[mine].mean()), int(mine.sum())])
    error = sum(n * abs(p - s) for s, p, n in bins) / len(conf) if len(conf) else None
    return {
        "bins": [{"score": round(s, 4), "precision": round(p, 4), "boxes": n} for s, p, n in bins],
        "error": None if error is None else round(error, 4),
        "boxes": len(conf),
    }


def _joined(records: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    return np.concatenate([r[key] for r in records]) if records else np.zeros(0)
