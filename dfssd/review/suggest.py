"""Which unlabelled images are most worth a label.

An image scores by what a label would settle there; the choice then takes one image of each group of near-duplicates, and
spreads over the feature space.

- **uncertainty**: candidates near their class's threshold, and pseudo-labels that moved between the mirrored forms of the
  image (`pseudo.quality.doubt`); as entropy-like scores do, it is high where the teacher is torn.
- **disagreement**: teacher against student, as the share of boxes without a partner of the same class (query by committee,
  Seung et al. 1992), where a student is trained.
- **rare**: candidates of classes that few labelled images show, weighted by the square root of rarity.
- **coverage**: the choice is greedy, each next image the one with the best score times its distance to the nearest image
  that is labelled or chosen (k-center, Sener and Savarese 2018), in the teacher's pooled neck features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dfssd.data.boxes import CLS, SCORE, above, corners, iou
from dfssd.data.manifest import Boxes, Manifest
from dfssd.pseudo.quality import doubt

PARTNER_IOU = 0.5
SATURATION = 3.0  # doubt at which uncertainty counts two thirds: many faint boxes in one image are not worth ten images


@dataclass
class Scores:
    """Of n images, each 0..1."""

    uncertainty: np.ndarray
    disagreement: np.ndarray
    rare: np.ndarray

    def total(self) -> np.ndarray:
        """(n,) 0..1; a part that says nothing about any image does not count."""
        parts = [p for p in (self.uncertainty, self.disagreement, self.rare) if np.ptp(p) > 0]
        return np.mean(parts, 0) if parts else np.ones(len(self.uncertainty))


def score(manifest: Manifest, teacher: list[Boxes], student: list[Boxes] | None, tau_c: np.ndarray) -> Scores:
    """Scores of images by the teacher's candidates and the student's, both (n,6) or more [cls, cx, cy, w, h, score, ...].

    Args:
        tau_c: (C,) thresholds of the chosen policy.
    """
    doubts = np.array([doubt(b, tau_c) for b in teacher], np.float64)
    rarity = rare_weights(manifest)
    rare = [
        max((rarity[int(c)] * min(s / tau_c[int(c)], 1) for c, s in b[:, [CLS, SCORE]]), default=0.0) for b in teacher
    ]
    apart = np.zeros(len(teacher))
    if student is not None:
        apart = np.array([disagreement(a, b, tau_c) for a, b in zip(teacher, student, strict=True)])
    return Scores(1 - np.exp(-doubts / SATURATION), apart, np.array(rare))


def rare_weights(manifest: Manifest) -> np.ndarray:
    """(C,) 0..1: 1 for the class that fewest labelled images show."""
    shown = np.ones(len(manifest.names))
    for row in manifest.labelled_rows():
        if row.boxes is not None:
            shown[np.unique(row.boxes[:, CLS].astype(int))] += 1
    return np.asarray(np.sqrt(shown.min() / shown))


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


def choose(
    total: np.ndarray,
    groups: np.ndarray,
    features: np.ndarray | None,
    known: np.ndarray | None,
    k: int,
    taken: set[int],
) -> tuple[list[int], np.ndarray]:
    """Greedy choice of k images.

    Args:
        total: (n,) scores.
        groups: (n,) near-duplicate groups.
        features: (n,d) unit vectors; None: no coverage.
        known: (m,d) those of labelled images.
        taken: groups that are labelled already.

    Returns:
        rows in the order of choice; (n,) distance (0..1) to the nearest labelled or chosen image, when chosen or at the end.
    """
    count = len(total)
    far = np.ones(count)
    if features is not None and known is not None and len(known):
        far = _distance(features, known)
    free = ~np.isin(groups, list(taken)) if taken else np.ones(count, bool)
    if not free.any():  # everything resembles something labelled: better that than nothing
        free[:] = True
    chosen: list[int] = []
    at_choice = far.copy()
    while len(chosen) < k and free.any():
        value = np.where(free, total * (far if features is not None else 1.0) + 1e-9 * total, -1.0)
        row = int(value.argmax())
        chosen.append(row)
        at_choice[row] = far[row]
        free &= groups != groups[row]
        if features is not None:
            far = np.minimum(far, _distance(features, features[row : row + 1]))
    rest = np.ones(count, bool)
    rest[chosen] = False
    at_choice[rest] = far[rest]
    return chosen, at_choice


def _distance(features: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n,) least cosine distance to one of the others, 0..1."""
    best = np.full(len(features), -1.0)
    for first in range(0, len(others), 1024):
        best = np.maximum(best, (features @ others[first : first + 1024].T).max(1))
    return np.asarray((1 - best).clip(0, 1))
