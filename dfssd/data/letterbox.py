"""Images fitted into a rectangle, as Ultralytics' `LetterBox` does, and boxes into it and back without loss.

Ultralytics takes back boxes with one scale for both axes. The sides of the scaled image are whole px, so that on a strip of
4096 x 130 px at 640 px the height is scaled by 20/130 and not by 20.3/130: here each axis has its own scale.

An exported model has a letterbox of its own (`line/detector.py`): that file stands alone, and rounds sides up, as Ultralytics
does when it loads an image for `yolo val` (here `data/reading.py` has done so before).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from dfssd.data.boxes import AGREEMENT, CLS, SCORE, XYWH

if TYPE_CHECKING:  # what a loading process does not need, it does not import
    from dfssd.data.manifest import Boxes

GREY = 114  # of the borders


class Letterbox(NamedTuple):
    """Where an image came to lie in a rectangle (all px)."""

    image_wh: tuple[int, int]
    scaled_wh: tuple[int, int]
    left_top: tuple[int, int]
    rectangle_wh: tuple[int, int]

    def boxes_in(self, cxcywh: np.ndarray) -> np.ndarray:
        """(n,4) in shares of the image -> in shares of the rectangle."""
        scaled, whole = np.array(self.scaled_wh), np.array(self.rectangle_wh)
        centre = (cxcywh[:, :2] * scaled + self.left_top) / whole
        return np.concatenate([centre, cxcywh[:, 2:] * scaled / whole], 1).astype(cxcywh.dtype)

    def boxes_out(self, cxcywh: np.ndarray) -> np.ndarray:
        """(n,4) in shares of the rectangle -> in shares of the image, cut at its edges."""
        scaled, whole = np.array(self.scaled_wh), np.array(self.rectangle_wh)
        centre, half = cxcywh[:, :2].astype(np.float64) * whole, cxcywh[:, 2:].astype(np.float64) * whole / 2
        low, high = (((centre + s * half - self.left_top) / scaled).clip(0, 1) for s in (-1, 1))
        return np.concatenate([(low + high) / 2, high - low], 1)

    def pixels_out(self, xyxy: np.ndarray) -> np.ndarray:
        """(n,4) x1, y1, x2, y2 (px of the rectangle) -> px of the image."""
        gain = np.array(self.scaled_wh * 2, np.float32) / np.array(self.image_wh * 2, np.float32)
        return np.asarray((xyxy - np.array(self.left_top * 2, np.float32)) / gain)


def letterbox_of(image_wh: tuple[int, int], rectangle_hw: tuple[int, int], enlarge: bool = True) -> Letterbox:
    """Where an image would lie: as large as fits, in the middle.

    Args:
        enlarge: may it also be made larger.
    """
    (width, height), (high, wide) = image_wh, rectangle_hw
    ratio = min(high / height, wide / width)
    if not enlarge:
        ratio = min(ratio, 1.0)
    scaled = max(round(width * ratio), 1), max(round(height * ratio), 1)
    edges = round((wide - scaled[0]) / 2 - 0.1), round((high - scaled[1]) / 2 - 0.1)
    return Letterbox((width, height), scaled, edges, (wide, high))


def letterboxed(image: np.ndarray, rectangle_hw: tuple[int, int], enlarge: bool = True) -> tuple[np.ndarray, Letterbox]:
    """(H,W[,3]) uint8 scaled and set into a grey rectangle (high, wide px)."""
    frame = letterbox_of((image.shape[1], image.shape[0]), rectangle_hw, enlarge)
    if frame.scaled_wh != frame.image_wh:
        image = cv2.resize(image, frame.scaled_wh, interpolation=cv2.INTER_LINEAR)
    out = np.full((*rectangle_hw, *image.shape[2:]), GREY, np.uint8)
    (left, top), (width, height) = frame.left_top, frame.scaled_wh
    out[top : top + height, left : left + width] = image
    return out, frame


def out_of_letterbox(boxes: Boxes, size_wh: np.ndarray, side: int) -> Boxes:
    """Candidates in shares of the letterboxed input -> in shares of the image, cut at its edges."""
    width, height = (int(length) for length in size_wh)
    moved = letterbox_of((width, height), (side, side)).boxes_out(boxes[:, XYWH])
    columns = [boxes[:, CLS, None], moved, boxes[:, SCORE : AGREEMENT + 1]]
    return np.asarray(np.concatenate(columns, 1).astype(np.float32)[(moved[:, 2:] > 0).all(1)])
