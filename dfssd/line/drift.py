"""Do new pictures still look like those the model was trained on, and does it still see in them what it saw?

A few numbers of each picture (brightness, contrast, sharpness, best score) are compared with those of the training
pictures, kept as quantiles in the model's metadata, by the two-sample Kolmogorov-Smirnov distance: it needs no assumption
on how they are distributed, and works from some fifty pictures on. Pictures are judged in a sliding window.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from dfssd.data.boxes import DET_SCORE

MEASURES = ("brightness", "contrast", "sharpness", "score")
WORDS = {
    "brightness": "brightness (mean grey value, 0..1)",
    "contrast": "contrast (spread of grey values, 0..1)",
    "sharpness": "sharpness (spread of the Laplacian)",
    "score": "best score of a picture",
}
QUANTILES = np.linspace(0, 1, 41)
FEWEST = 50  # pictures before anything is said
WINDOW = 200
LIMIT = 0.3  # distance that is worth a warning whatever the number of pictures


def picture_numbers(picture: np.ndarray, boxes: np.ndarray) -> dict[str, float]:
    """Numbers of one picture: (H,W,3) or (H,W) uint8, and its boxes (n,6), detections."""
    grey = picture if picture.ndim == 2 else cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
    scale = 256 / max(grey.shape)  # sharpness depends on the size, and pictures may come in any
    small = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else grey
    return {
        "brightness": float(small.mean()) / 255,
        "contrast": float(small.std()) / 255,
        "sharpness": float(np.log1p(cv2.Laplacian(small, cv2.CV_32F).var())),
        "score": float(boxes[:, DET_SCORE].max()) if len(boxes) else 0.0,
    }


def reference(numbers: Sequence[Mapping[str, float]]) -> dict[str, object]:
    """What a model keeps of its training pictures: 41 quantiles of each number; JSON-ready."""
    table = {m: np.quantile([n[m] for n in numbers], QUANTILES).round(5).tolist() for m in MEASURES} if numbers else {}
    return {"pictures": len(numbers), "quantiles": table}


class Drift:
    """Watches a stream of pictures.

    Args:
        known: `reference` of the model; without pictures nothing is ever said.
    """

    def __init__(self, known: Mapping[str, object]) -> None:
        quantiles = known.get("quantiles") or {}
        assert isinstance(quantiles, Mapping)
        self.known = {m: np.array(v) for m, v in quantiles.items()}
        self.reference_pictures = int(str(known.get("pictures", 0)))
        self.seen: deque[Mapping[str, float]] = deque(maxlen=WINDOW)

    def add(self, numbers: Mapping[str, float]) -> None:
        """Take in one picture."""
        self.seen.append(numbers)

    def distances(self) -> dict[str, float]:
        """Kolmogorov-Smirnov distance (0..1) of each number; empty below fifty pictures."""
        if len(self.seen) < FEWEST:
            return {}
        return {m: _distance(np.array([n[m] for n in self.seen]), q) for m, q in self.known.items()}

    def warnings(self) -> list[str]:
        """Plain sentences on what has left the range of the training pictures."""
        # Two samples of n and m part by chance by more than this once in a thousand times (Smirnov, 1948).
        n, m = len(self.seen), max(1, self.reference_pictures)
        chance = 1.95 * np.sqrt((n + m) / (n * m)) if n else 1.0
        said = []
        for measure, distance in self.distances().items():
            if distance < max(LIMIT, chance):
                continue
            new, old = float(np.median([x[measure] for x in self.seen])), float(np.median(self.known[measure]))
            said.append(
                f"{WORDS[measure]} has drifted: median {new:.3f} over the last {n} pictures, {old:.3f} in training "
                f"(distance {distance:.2f})"
            )
        return said


def _distance(values: np.ndarray, quantiles: np.ndarray) -> float:
    """Largest distance between the distribution of `values` and the one with these quantiles.

    Where many reference values are equal (pictures without any box have score 0), a step is compared as a whole.
    """
    values = np.sort(values)
    points = np.unique(np.concatenate([values, quantiles]))
    mine = np.searchsorted(values, points, side="right") / len(values)
    level, last = np.unique(quantiles[::-1], return_index=True)
    upper = QUANTILES[::-1][last]  # the highest quantile of each value
    theirs = np.where(points < level[0], 0.0, np.interp(points, level, upper))
    return float(np.abs(mine - theirs).max())
