"""What is in a data set that a person should look at before hours of training: sizes, labels that contradict each other,
boxes that look like slips, and how many labels stand behind each number. `report/audit_page.py` makes the page of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dfssd.data.boxes import CLS, WH, H, W, corners, iou, unflip
from dfssd.data.manifest import Boxes, Manifest, Row

SMALL = 12.0  # px of the shorter side at the training resolution, below which a detector with stride 8 sees little
AIM = 16.0  # px that a proposal of size or tiles brings the smaller boxes to
LARGEST = 1536  # px; above this tiles are proposed instead of a larger --imgsz
CLOSE = 0.95  # correlation from which two near-duplicates show the same defects at the same places
SAME = 0.5  # IoU from which two boxes are about the same defect
DOUBLED = 0.85  # IoU from which two boxes of one image are probably one
TINY_PX, THIN, WHOLE = (
    4.0,
    25.0,
    0.95,
)  # px at the training resolution; long by short side (or 4 times the class's median); share of the image


@dataclass
class ClassSizes:
    """Sizes of a class's boxes at the training resolution (px, shorter side)."""

    name: str
    boxes: int
    low: float  # 10th percentile
    median: float
    high: float  # 90th percentile
    original_low: float  # 10th percentile in px of the image
    small: float  # share below SMALL


@dataclass
class Suspect:
    """A box that looks like a slip."""

    row: Row
    boxes: Boxes
    which: int
    why: str


@dataclass
class Contradiction:
    """Two near-duplicates whose labels differ in `differing` boxes, whatever the mirroring."""

    a: Row
    b: Row
    boxes_a: Boxes
    boxes_b: Boxes
    differing: int


def labels_of(manifest: Manifest, withheld: dict[str, Boxes]) -> list[tuple[Row, Boxes]]:
    """All images with a label, hidden ones too."""
    found = ((r, r.boxes if r.boxes is not None else withheld.get(r.image_id)) for r in manifest.rows)
    return [(r, b) for r, b in found if b is not None]


def sides_px(row: Row, boxes: Boxes, imgsz: int | None = None) -> np.ndarray:
    """(n,2) width and height of boxes in px of the image, or at a training resolution."""
    scale = imgsz / max(row.width, row.height) if imgsz else 1.0
    return np.asarray(boxes[:, WH] * [row.width, row.height] * scale)


def class_sizes(labels: list[tuple[Row, Boxes]], names: list[str], imgsz: int) -> list[ClassSizes]:
    """Box sizes of every class that has boxes."""
    found = []
    for c, name in enumerate(names):
        own = [(r, b[b[:, CLS] == c]) for r, b in labels]
        short = np.concatenate([sides_px(r, b, imgsz).min(1) for r, b in own if len(b)] or [np.zeros(0)])
        original = np.concatenate([sides_px(r, b).min(1) for r, b in own if len(b)] or [np.zeros(0)])
        if len(short):
            low, median, high = np.percentile(short, [10, 50, 90])
            in_image, small = float(np.percentile(original, 10)), float((short < SMALL).mean())
            found.append(ClassSizes(name, len(short), float(low), float(median), float(high), in_image, small))
    return found


def proposal(sizes: list[ClassSizes], labels: list[tuple[Row, Boxes]], imgsz: int) -> str:
    """A size or tiles where boxes are too small for the training resolution; '' where they are not."""
    worst = min((s for s in sizes if s.small > 0.1), key=lambda s: s.low, default=None)
    if worst is None:
        return ""
    side = max(max(r.width, r.height) for r, _ in labels)
    wanted = int(np.ceil(imgsz * AIM / worst.low / 32) * 32)
    said = (
        f"{worst.small:.0%} of the boxes of {worst.name!r} are under {SMALL:.0f} px at --imgsz {imgsz} (a tenth is "
        f"{worst.original_low:.0f} px in the image, {worst.low:.0f} px in training)"
    )
    if wanted <= LARGEST:
        return f"{said}: train with --imgsz {wanted}"
    tile = max(32, int(worst.original_low * imgsz / AIM // 32 * 32))
    return f"{said}: cut the images of {side} px into tiles of {tile} px that overlap by the largest defect, before training"


def suspects(labels: list[tuple[Row, Boxes]], names: list[str], imgsz: int) -> list[Suspect]:
    """Boxes that look like slips: tiny, thread-like, as large as the image, twice there, or far from their class's sizes."""
    found: list[Suspect] = []
    logs: list[list[float]] = [[] for _ in names]
    slender: list[list[float]] = [[] for _ in names]
    for row, boxes in labels:
        for box, side in zip(boxes, sides_px(row, boxes, imgsz), strict=True):
            logs[int(box[CLS])].append(float(np.log(max(side.prod(), 1e-6))))
            slender[int(box[CLS])].append(float(side.max() / max(side.min(), 1e-6)))
    lengths = [float(np.median(v)) if v else 1.0 for v in slender]
    middle, spread = zip(*map(_middle, logs), strict=True)
    for row, boxes in labels:
        if not len(boxes):
            continue
        sides = sides_px(row, boxes, imgsz)
        overlap = np.triu(iou(corners(boxes), corners(boxes)), 1)
        for k, (box, side) in enumerate(zip(boxes, sides, strict=True)):
            c = int(box[CLS])
            away = abs(np.log(max(side.prod(), 1e-6)) - middle[c]) / spread[c]
            twin = int(overlap[k].argmax())
            why = ""
            if overlap[k, twin] >= DOUBLED:
                other = names[int(boxes[twin, CLS])]
                why = (
                    f"nearly the same box as another {other!r}" if boxes[twin, CLS] == c else f"also labelled {other!r}"
                )
            elif side.min() < TINY_PX:
                why = f"{side[0]:.1f} x {side[1]:.1f} px at the training resolution"
            elif box[W] * box[H] > WHOLE:
                why = "as large as the image"
            elif side.max() / max(side.min(), 1e-6) > max(THIN, 4 * lengths[c]):
                why = f"{side.max() / side.min():.0f} times as long as wide"
            elif away > 5 and len(logs[c]) >= 20:
                why = f"its size is far from those of other {names[c]!r}"
            if why:
                found.append(Suspect(row, boxes, k, why))
    return found


def varied(found: list[Contradiction], count: int) -> list[Contradiction]:
    """The first `count`, none of whose images comes more than twice."""
    seen: dict[str, int] = {}
    chosen: list[Contradiction] = []
    for one in found:
        ids = (one.a.image_id, one.b.image_id)
        if len(chosen) < count and max(seen.get(i, 0) for i in ids) < 2:
            chosen.append(one)
            seen.update({i: seen.get(i, 0) + 1 for i in ids})
    return chosen


def _middle(logs: list[float]) -> tuple[float, float]:
    """Median and spread (1.48 times the median deviation, at least 0.2) of logarithms of areas."""
    if not logs:
        return 0.0, 1.0
    middle = float(np.median(logs))
    return middle, max(1.4826 * float(np.median(np.abs(np.array(logs) - middle))), 0.2)


def contradictions(
    labels: list[tuple[Row, Boxes]], pairs: list[tuple[str, str]], limit: int = 10_000
) -> list[Contradiction]:
    """Near-duplicates whose labels differ, most different first. A pair may be mirrored, so the best of four forms counts."""
    by_id = {row.image_id: (row, boxes) for row, boxes in labels}
    found = []
    for a, b in pairs[:limit]:
        if a in by_id and b in by_id:
            (row_a, own), (row_b, other) = by_id[a], by_id[b]
            differing = min(_differing(own, unflip(other, lr, ud)) for lr in (False, True) for ud in (False, True))
            if differing:
                found.append(Contradiction(row_a, row_b, own, other, differing))
    return sorted(found, key=lambda c: -c.differing)


def _differing(a: Boxes, b: Boxes) -> int:
    """Boxes of either image without a partner of the same class and place in the other."""
    if not len(a) or not len(b):
        return len(a) + len(b)
    fits = (iou(corners(a), corners(b)) >= SAME) & (a[:, None, 0] == b[None, :, 0])
    matched = 0
    while fits.any():
        i, j = np.unravel_index(int(fits.argmax()), fits.shape)
        fits[i], fits[:, j] = False, False
        matched += 1
    return len(a) + len(b) - 2 * matched


def clean_images(labels: list[tuple[Row, Boxes]]) -> dict[str, tuple[int, int]]:
    """By split: labelled images without a box, and labelled images."""
    counts: dict[str, tuple[int, int]] = {}
    for row, boxes in labels:
        clean, total = counts.get(row.split, (0, 0))
        counts[row.split] = clean + (not len(boxes)), total + 1
    return counts


def uncertainty(boxes: int) -> float:
    """Half width of a 95 % interval of a recall of one half, measured on so many boxes (normal approximation)."""
    return float(1.96 * np.sqrt(0.25 / boxes)) if boxes else float("nan")
