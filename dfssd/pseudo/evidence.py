"""Candidates against boxes that somebody has drawn, as histograms over the score: what pseudo-labels would be worth.

Legend: C classes; candidates are (n,7) arrays [cls, cx, cy, w, h, score, agreement], truth (m,5) [cls, cx, cy, w, h].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dfssd.data.boxes import CLS, SCORE, corners, iou
from dfssd.data.manifest import Boxes
from dfssd.pseudo.scores import BINS, score_bin

HIT_IOU = 0.5


def match(candidates: Boxes, truth: Boxes) -> tuple[np.ndarray, np.ndarray]:
    """Which candidates hit a box: by falling score, each takes the free box of its class that it overlaps most.

    A candidate never loses its box to a lower one, so precision and recall at any threshold follow from one matching.

    Returns:
        (n,) bool hits at IoU 0.5 or more; (n,) IoU with the box hit, 0 where there is none.
    """
    hit, overlap = np.zeros(len(candidates), bool), np.zeros(len(candidates))
    free = np.ones(len(truth), bool)
    table = iou(corners(candidates), corners(truth)) * (candidates[:, CLS, None] == truth[None, :, CLS])
    for k in np.argsort(-candidates[:, SCORE], kind="stable"):
        row = table[k] * free
        if len(row) and row.max() >= HIT_IOU:
            best = int(row.argmax())
            hit[k], overlap[k], free[best] = True, row[best], False
    return hit, overlap


@dataclass
class Evidence:
    """Candidates against truth, as histograms over score: bounded memory, every threshold at once.

    Args:
        found, hits, iou: (C, BINS) candidates, those that hit a box, and the sum of their IoU.
        boxes: (C,) boxes that are there.
        images: images compared.
    """

    found: np.ndarray
    hits: np.ndarray
    iou: np.ndarray
    boxes: np.ndarray
    images: int = 0

    @classmethod
    def empty(cls, classes: int) -> Evidence:
        shape = (classes, BINS)
        return cls(np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape), np.zeros(classes, np.int64))

    def add(self, candidates: Boxes, truth: Boxes) -> None:
        """Take in one image."""
        hit, overlap = match(candidates, truth)
        index = candidates[:, CLS].astype(int), score_bin(candidates[:, SCORE])
        np.add.at(self.found, index, 1)
        np.add.at(self.hits, index, hit)
        np.add.at(self.iou, index, overlap)
        self.boxes += np.bincount(truth[:, CLS].astype(int), minlength=len(self.boxes))
        self.images += 1

    def at(self, tau_c: np.ndarray) -> dict[str, np.ndarray]:
        """(C+1,) precision, recall and mean IoU of hits at thresholds tau_c; the last entry is over all classes.

        NaN where there is nothing to measure (no pseudo-label, no box).
        """
        sums = [
            np.array([h[c, score_bin(t) :].sum() for c, t in enumerate(tau_c)])
            for h in (self.found, self.hits, self.iou)
        ]
        found, hits, overlap, boxes = (np.append(x, x.sum()) for x in (*sums, self.boxes))
        with np.errstate(invalid="ignore", divide="ignore"):
            return {"precision": hits / found, "recall": hits / boxes, "iou": overlap / hits}

    def curves(self) -> tuple[np.ndarray, np.ndarray]:
        """(C, BINS) precision and recall at threshold k/BINS; NaN where there is nothing to measure."""
        found, hits = (h[:, ::-1].cumsum(1)[:, ::-1] for h in (self.found, self.hits))
        with np.errstate(invalid="ignore", divide="ignore"):
            return hits / found, hits / self.boxes[:, None]

    def ap50(self) -> np.ndarray:
        """(C,) average precision at IoU 0.5 of all candidates (area under the envelope); NaN without a box."""
        precision, recall = (np.nan_to_num(c[:, ::-1]) for c in self.curves())
        envelope = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
        area = (np.diff(recall, prepend=0.0, axis=1) * envelope).sum(1)
        return np.asarray(np.where(self.boxes > 0, area, np.nan))
