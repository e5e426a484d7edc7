"""Is this image, is this label usable? Every reason comes from one fixed list, so that nothing is dropped uncounted."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from dfssd.data import images
from dfssd.data.boxes import CLS, LABEL_COLUMNS, WH, XY, XYWH
from dfssd.data.manifest import Boxes

REASONS = {
    "zero_bytes": "the file is empty",
    "wrong_type": "the content is no image of a known type",
    "truncated": "the image ends before it should",
    "unreadable": "the file cannot be read or decoded",
    "absurd_size": "a side is below 8 px or above --max-side, or it has more than 2^30 px",
    "label_unreadable": "the label file cannot be read or parsed",
    "label_columns": "a label line has not 5 columns and is no polygon, or a box lacks a corner or a bbox",
    "label_nan": "a coordinate is not a finite number",
    "class_out_of_range": "a class that is not in the list of names",
    "box_outside_image": "a box reaches more than 1 % (or 2 px) beyond the image",
    "box_empty": "a box has no width or no height",
    "label_units": "coordinates are shares of the picture (0..1) where px are meant",
    "label_size_mismatch": "the label file is about an image of another shape",
    "label_without_image": "a label file, or an entry of one, has no image",
    "annotation_without_image": "an annotation names an image id that the file does not list",
    "listed_not_there": "a list names an image that does not exist",
    "dangling_link": "a link leads to nothing",
    "duplicate": "byte for byte the same as another image, which is kept",
}
NOT_COUNTED_AS_BAD = ("duplicate",)
THUMB_SIDE = 48  # px; the resolution near-duplicates are compared at


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a file cannot be used; `reason` is a key of REASONS."""

    reason: str
    detail: str = ""

    def said(self) -> str:
        """Reason and detail in words."""
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


@dataclass(slots=True)
class ImageFacts:
    """What one pass over an image's bytes yields.

    Args:
        sha256: of the file.
        width, height: px, after the EXIF rotation.
        thumb_hw: (48,48) uint8 grey; None where it is kept elsewhere (large sets).
        grey: are the three channels the same?
        top: largest value of a picture of more than 8 bits, else 0.
        floating: are its values floats?
        pages: pictures in the file, of which the first is used.
    """

    sha256: str
    width: int
    height: int
    thumb_hw: np.ndarray | None
    grey: bool = False
    top: float = 0.0
    floating: bool = False
    pages: int = 1


def is_usable(width: int, height: int, max_side: int) -> bool:
    """Is a picture of so many px neither too small nor too large?"""
    return min(width, height) >= 8 and max(width, height) <= max_side and width * height <= images.MAX_PIXELS


def check_image(data: bytes, max_side: int) -> ImageFacts | Problem:
    """Open an image as training does and return what the manifest and the grouping need of it.

    Args:
        data: the file's content.
        max_side: largest accepted side (px).
    """
    try:
        width, height = images.size_of(data)
        if not is_usable(width, height, max_side):
            return Problem("absurd_size", f"{width} x {height} px")
        raw = images.decode_raw(data)
        top = images.top_value(raw)
        floating = raw.dtype.kind == "f"
        image = images.to_uint8(raw, images.white_level(top, floating))
        pages = images.pages(data)
    except images.BadImage as error:
        return Problem(error.reason, error.detail)
    height, width = image.shape[:2]
    grey, levels = images.grey_levels(image)
    thumb = np.asarray(Image.fromarray(levels).resize((THUMB_SIDE, THUMB_SIDE), Image.Resampling.BOX), np.uint8)
    return ImageFacts(hashlib.sha256(data).hexdigest(), width, height, thumb, grey, top, floating, pages)


@dataclass(slots=True)
class Checked:
    """A usable image and its usable label; `place`: its number among all that were looked at; `repeated`: boxes that stand
    several times in the label, less one each."""

    uri: str
    facts: ImageFacts
    boxes: Boxes | None
    given_split: str
    place: int = -1
    repeated: int = 0

    @property
    def image_id(self) -> str:
        return self.facts.sha256[:16]


@dataclass
class Label:
    """The boxes of one image as its file states them.

    Args:
        boxes: (n,5) float array [class, cx, cy, w, h], 0..1 or px (see `pixels`).
        pixels: True where the numbers are px.
        size: (width, height) the file says it is about, where it says so.
        problem: why the file cannot be used.
        counts: what was read in another way than it was written, by a key of `source.COUNTED`.
    """

    boxes: np.ndarray
    pixels: bool = False
    size: tuple[int, int] | None = None
    problem: Problem | None = None
    counts: Counter[str] = field(default_factory=Counter)


def check_label(label: Label, width: int, height: int, classes: int) -> Boxes | Problem:
    """Return normalised, clipped boxes (n,5) float32 without repeated rows, or what is wrong with them."""
    if label.problem:
        return label.problem
    boxes = np.array(label.boxes, np.float64).reshape(-1, LABEL_COLUMNS)  # a copy: it is scaled below
    if not len(boxes):
        return boxes.astype(np.float32)
    if not np.isfinite(boxes).all():
        return Problem("label_nan", f"box {int(np.flatnonzero(~np.isfinite(boxes).all(1))[0])}")
    if label.pixels:
        w, h = label.size if label.size and min(label.size) > 0 else (width, height)
        if max(w, h) > images.MAX_PIXELS:
            return Problem("label_size_mismatch", f"label says a side of more than {images.MAX_PIXELS} px")
        if abs(w / h - width / height) > 0.02 * width / height:
            swapped = abs(h / w - width / height) < 0.02 * width / height
            hint = "; drawn before the picture was turned as its EXIF data says?" if swapped else ""
            return Problem("label_size_mismatch", f"label says {w} x {h}, image is {width} x {height}{hint}")
        if (boxes[:, XYWH] <= 1).all():
            return Problem("label_units", "no number is above 1: write px, or the labels as YOLO")
        boxes[:, XYWH] /= [w, h, w, h]
    ids = boxes[:, CLS]
    known = (ids >= 0) & (ids < classes) & (ids == np.round(ids))
    if not known.all():
        return Problem("class_out_of_range", f"class {ids[~known][0]:g}, there are {classes} (from 0)")
    if (boxes[:, WH] <= 0).any():
        return Problem("box_empty", f"box {int(np.flatnonzero((boxes[:, WH] <= 0).any(1))[0])}")
    low, high = boxes[:, XY] - boxes[:, WH] / 2, boxes[:, XY] + boxes[:, WH] / 2
    over = np.maximum(-low, high - 1)
    if (over > np.maximum(0.01, 2 / np.array([width, height]))).any():
        in_px = (
            "" if label.pixels or over.max() <= 1 else "; px? YOLO's numbers are shares (0..1) of the picture's sides"
        )
        return Problem("box_outside_image", f"box {int(over.max(1).argmax())} by {over.max():.3f} of the side{in_px}")
    low, high = low.clip(0, 1), high.clip(0, 1)
    clipped = np.concatenate([ids[:, None], (low + high) / 2, high - low], 1).astype(np.float32)
    return np.unique(clipped, axis=0)
