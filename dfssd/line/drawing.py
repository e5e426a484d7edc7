"""Boxes drawn on a picture, so large that a person can read them."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from dfssd.data.boxes import DET_CLS, DET_SCORE, XYXY

READABLE = 640  # px: smaller pictures are enlarged until the longer side has as many
COLOURS = (  # BGR, dark enough for white letters
    (75, 25, 230),
    (60, 140, 45),
    (216, 99, 67),
    (20, 100, 210),
    (180, 30, 145),
    (128, 128, 0),
    (36, 99, 154),
    (0, 110, 110),
    (117, 0, 0),
    (180, 40, 200),
)


def drawn(picture: np.ndarray, boxes: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """A copy of the picture with its boxes, names and scores; small pictures are enlarged by a whole factor.

    Args:
        picture: (H,W,3) uint8 BGR. boxes: (n,6) [x1, y1, x2, y2 (px), score, class].
    """
    zoom = max(1, -(-READABLE // max(picture.shape[:2])))
    canvas = cv2.resize(picture, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC) if zoom > 1 else picture.copy()
    side = max(canvas.shape[:2])
    thick, size = max(1, round(side / 400)), max(0.5, side / 1200)
    for box in boxes[np.argsort(boxes[:, DET_SCORE], kind="stable")]:  # the surest on top
        x1, y1, x2, y2 = (round(float(v) * zoom) for v in box[XYXY])
        colour = COLOURS[int(box[DET_CLS]) % len(COLOURS)]
        cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, thick)
        _write(canvas, f"{names[int(box[DET_CLS])]} {box[DET_SCORE]:.2f}", (x1, y1, y2), colour, size)
    return np.asarray(canvas)


def _write(canvas: np.ndarray, text: str, at: tuple[int, int, int], colour: tuple[int, int, int], size: float) -> None:
    """White letters on the box's colour, above it; below it where there is no room; never outside the picture."""
    x, top, bottom = at
    ink = max(1, round(size * 1.5))
    (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, ink)
    tall = height + below + 4
    y = top - tall if top >= tall else min(bottom, canvas.shape[0] - tall)
    x, y = max(0, min(x, canvas.shape[1] - width - 4)), max(0, y)
    cv2.rectangle(canvas, (x, y), (x + width + 4, y + tall), colour, cv2.FILLED)
    place = (x + 2, y + height + 2)
    cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, size, (255, 255, 255), ink, cv2.LINE_AA)
