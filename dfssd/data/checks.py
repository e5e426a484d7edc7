"""Is this image, is this label usable? Every reason comes from one fixed list, so that nothing is dropped uncounted."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from dfssd.data.manifest import Boxes

REASONS = {
    "zero_bytes": "the file is empty",
    "wrong_type": "the content is no image of a known type",
    "truncated": "the image ends before it should",
    "unreadable": "the file cannot be read or decoded",
    "absurd_size": "a side is below 8 px or above the limit",
    "label_unreadable": "the label file cannot be read or parsed",
    "label_columns": "a label line has not 5 columns, or a box lacks a corner",
    "label_nan": "a coordinate is not a finite number",
    "class_out_of_range": "a class that is not in the list of names",
    "box_outside_image": "a box reaches more than 1 % (or 2 px) beyond the image",
    "box_empty": "a box has no width or no height",
    "label_size_mismatch": "the label file is about an image of another shape",
    "label_without_image": "a label file has no image",
    "duplicate": "byte for byte the same as another image, which is kept",
}
NOT_COUNTED_AS_BAD = ("duplicate",)
THUMB_SIDE = 48  # px; the resolution near-duplicates are compared at
# Types by their first bytes, looked at before PIL: Ultralytics replaces PIL's open() by one that tries to install
# packages when it does not know a file.
TYPES = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG",),
    "BMP": (b"BM",),
    "TIFF": (b"II*\x00", b"MM\x00*"),
    "WEBP": (b"RIFF",),
    "PPM": (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"),
}


@dataclass(frozen=True)
class Problem:
    """Why a file cannot be used; `reason` is a key of REASONS."""

    reason: str
    detail: str = ""


@dataclass
class ImageFacts:
    """What one pass over an image's bytes yields; `thumb_hw` is (48,48) uint8 grey."""

    sha256: str
    width: int
    height: int
    thumb_hw: np.ndarray


def check_image(data: bytes, max_side: int) -> ImageFacts | Problem:
    """Decode an image to the last byte and return what the manifest and the grouping need of it.

    Args:
        data: the file's content.
        max_side: largest accepted side (px).
    """
    if not data:
        return Problem("zero_bytes")
    if not data.startswith(tuple(start for starts in TYPES.values() for start in starts)):
        return Problem("wrong_type", f"first bytes {data[:8]!r}")
    try:
        image = Image.open(io.BytesIO(data), formats=list(TYPES))
    except (UnidentifiedImageError, ImportError):
        return Problem("unreadable", "the header makes no sense")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return Problem("unreadable", str(error))
    if min(image.size) < 8 or max(image.size) > max_side:
        return Problem("absurd_size", f"{image.size[0]} x {image.size[1]} px")
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, IndexError) as error:
        return Problem("truncated" if "truncated" in str(error) else "unreadable", str(error))
    width, height = image.size
    if image.getexif().get(0x0112, 1) in (5, 6, 7, 8):  # orientation: turned by 90 degrees
        width, height = height, width
    if image.mode.startswith("I;16") or image.mode == "I":  # PIL clips 16 bit to white, a picture nobody sees
        grey = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
    else:
        grey = image.convert("L")
    thumb = np.asarray(grey.resize((THUMB_SIDE, THUMB_SIDE), Image.Resampling.BOX), np.uint8)
    return ImageFacts(hashlib.sha256(data).hexdigest(), width, height, thumb)


@dataclass
class Label:
    """The boxes of one image as its file states them.

    Args:
        boxes: (n,5) float array [class, cx, cy, w, h], 0..1 or px (see `pixels`).
        pixels: True where the numbers are px.
        size: (width, height) the file says it is about, where it says so.
        problem: why the file cannot be used.
    """

    boxes: np.ndarray
    pixels: bool = False
    size: tuple[int, int] | None = None
    problem: Problem | None = None


def check_label(label: Label, width: int, height: int, classes: int) -> Boxes | Problem:
    """Return normalised, clipped boxes (n,5) float32 without repeated rows, or what is wrong with them."""
    if label.problem:
        return label.problem
    boxes = np.asarray(label.boxes, np.float64).reshape(-1, 5)
    if not len(boxes):
        return boxes.astype(np.float32)
    if not np.isfinite(boxes).all():
        return Problem("label_nan", f"box {int(np.flatnonzero(~np.isfinite(boxes).all(1))[0])}")
    if label.pixels:
        w, h = label.size if label.size and min(label.size) > 0 else (width, height)
        if abs(w / h - width / height) > 0.02 * width / height:
            return Problem("label_size_mismatch", f"label says {w} x {h}, image is {width} x {height}")
        boxes[:, 1:] /= [w, h, w, h]
    known = (boxes[:, 0] >= 0) & (boxes[:, 0] < classes) & (boxes[:, 0] == np.round(boxes[:, 0]))
    if not known.all():
        return Problem("class_out_of_range", f"class {boxes[~known][0, 0]:g}, there are {classes} (from 0)")
    if (boxes[:, 3:] <= 0).any():
        return Problem("box_empty", f"box {int(np.flatnonzero((boxes[:, 3:] <= 0).any(1))[0])}")
    low, high = boxes[:, 1:3] - boxes[:, 3:] / 2, boxes[:, 1:3] + boxes[:, 3:] / 2
    over = np.maximum(-low, high - 1)
    if (over > np.maximum(0.01, 2 / np.array([width, height]))).any():
        return Problem("box_outside_image", f"box {int(over.max(1).argmax())} by {over.max():.3f} of the side")
    low, high = low.clip(0, 1), high.clip(0, 1)
    clipped = np.concatenate([boxes[:, :1], (low + high) / 2, high - low], 1).astype(np.float32)
    return np.unique(clipped, axis=0)
