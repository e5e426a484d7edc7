"""Which unlabelled images are most worth a label.

Few labels are best spent on what is typical of each class and not yet covered, not on what is strange: with few labels the
most uncertain images teach less than random ones (Hacohen et al., "Active Learning on a Budget", ICML 2022; on CR7-DET
docs/results.md has the numbers). So the choice as a whole is asked how well it covers what the teacher sees, class by class
(`coverage.py`):

- **class by class**: an image covers others that show the same class, as far as they look alike. What it shows is the
  teacher's candidates, as probabilities calibrated on val; every class asks for as much as any other, so that rare ones are
  not left over (class-balanced choice: Agarwal et al., ECCV 2020; category-wise similarity for detection: Yang et al., "Plug
  and Play Active Learning", CVPR 2024).
- **boxes**: images with more expected boxes teach more, by the square root of their number.
- **uncertainty** of the teacher and **disagreement** of teacher and student raise the worth of an image by up to a half:
  candidates near their threshold or that moved under flips (`pseudo.quality.doubt`); boxes of one without a partner in the
  other (query by committee, Seung et al. 1992).
- **one of each group** of near-duplicates, and none where one is labelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dfssd.data.boxes import CLS, SCORE, above, corners, iou
from dfssd.data.manifest import Boxes
from dfssd.pseudo.calibration import FEWEST, Calibration
from dfssd.pseudo.quality import doubt
from dfssd.pseudo.scores import score_bin

PARTNER_IOU = 0.5
SATURATION = 3.0  # doubt at which uncertainty counts two thirds: many faint boxes in one image are not worth ten images
DOUBT_SHARE = 0.5  # what full uncertainty and disagreement add to the worth of an image
MOST_BOXES = 4.0  # expected boxes, as a multiple of the mean, from which more do not count


@dataclass
class Scores:
    """What n images say, by the teacher's candidates (and the student's).

    Args:
        shows: (n,C) probability that the image shows the class.
        boxes: (n,C) boxes of the class that are expected on it.
        uncertainty, disagreement: (n,) 0..1.
    """

    shows: np.ndarray
    boxes: np.ndarray
    uncertainty: np.ndarray
    disagreement: np.ndarray

    def worth(self) -> np.ndarray:
        """(n,) factor of what a label of this image adds to the choice: more boxes, and boxes in doubt, teach more."""
        count = self.boxes @ demand(self.shows)
        count = count / max(float(count.mean()), 1e-9)
        parts = [p for p in (self.uncertainty, self.disagreement) if np.ptp(p) > 0]
        doubts = np.mean(parts, 0) if parts else np.zeros(len(count))
        return np.asarray(np.sqrt(np.minimum(count, MOST_BOXES) + 0.5) * (1 + DOUBT_SHARE * doubts))

    def alone(self) -> np.ndarray:
        """(n,) what an image is worth by itself: what it shows, as far as the classes ask for it, times `worth`."""
        return np.asarray((self.shows @ demand(self.shows)) * self.worth())


def demand(shows: np.ndarray) -> np.ndarray:
    """(C,) weights under which every class that is seen at all asks for as much as any other; they sum to C."""
    total = shows.sum(0)
    weights = np.divide(1.0, total, out=np.zeros(len(total)), where=total > 0)
    return np.asarray(weights * len(total) / max(weights.sum(), 1e-12))


def score(
    teacher: Sequence[Boxes], student: Sequence[Boxes] | None, tau_c: np.ndarray, calibration: Calibration | None
) -> Scores:
    """Scores of images by the teacher's candidates and the student's, both (n,6) or more [cls, cx, cy, w, h, score, ...].

    Args:
        tau_c: (C,) thresholds of the chosen policy.
        calibration: of scores to shares of right boxes, by class; where it rests on too little, scores are taken as they are.
    """
    classes = len(tau_c)
    shows, boxes = np.zeros((len(teacher), classes)), np.zeros((len(teacher), classes))
    for i, found in enumerate(teacher):
        cls, right = found[:, CLS].astype(int), _right(found, calibration)
        np.add.at(boxes[i], cls, right)
        missing = np.ones(classes)
        np.multiply.at(missing, cls, 1 - right)
        shows[i] = 1 - missing
    doubts = np.array([doubt(b, tau_c) for b in teacher], np.float64)
    apart = np.zeros(len(teacher))
    if student is not None:
        apart = np.array([disagreement(a, b, tau_c) for a, b in zip(teacher, student, strict=True)])
    return Scores(shows, boxes, 1 - np.exp(-doubts / SATURATION), apart)


def _right(boxes: Boxes, calibration: Calibration | None) -> np.ndarray:
    """(n,) probability that each candidate hits a box."""
    cls, own = boxes[:, CLS].astype(int), boxes[:, SCORE].astype(np.float64)
    if calibration is None:
        return own
    return np.where(calibration.counts[cls] >= FEWEST, calibration.right_cb[cls, score_bin(own)], own)


def shown(labels: Sequence[Boxes | None], classes: int) -> np.ndarray:
    """(m,C) 1 where a labelled image shows the class."""
    found = np.zeros((len(labels), classes))
    for i, boxes in enumerate(labels):
        if boxes is not None:
            found[i, boxes[:, CLS].astype(int)] = 1
    return found


def disagreement(a: Boxes, b: Boxes, tau_c: np.ndarray) -> float:
    """Share of the boxes above half their thresholds that have no partner of the same class in the other's, 0..1."""
    a, b = (above(x, tau_c, 0.5) for x in (a, b))
    if not len(a) and not len(b):
        return 0.0
    fits = (iou(corners(a), corners(b)) >= PARTNER_IOU) & (a[:, None, CLS] == b[None, :, CLS])
    matched = 0
    while fits.any():
        i, j = np.unravel_index(int(fits.argmax()), fits.shape)
        fits[i], fits[:, j] = False, False
        matched += 1
    return 1 - 2 * matched / (len(a) + len(b))
