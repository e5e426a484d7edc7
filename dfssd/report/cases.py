"""Single pictures worth a look: what the model misses, what it invents, and the same pictures seen by all models."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from dfssd.data.boxes import CLS, DET_CLS, DET_SCORE, HIT, SCORE, corners, detections_above, iou
from dfssd.data.manifest import Manifest, Row
from dfssd.evaluate.detections import Found
from dfssd.report.pictures import LARGE, as_candidates, draw, jpeg, sample_rows

MISSES, ALARMS = 6, 6
HIT_IOU = 0.5  # from which a box of the right class is a hit
TOUCH_IOU = 0.1  # below it a box does not mean the defect (TIDE's background threshold)
Case = dict[str, str]
Detections = Mapping[tuple[str, str], Found]


def case(row: Row, boxes: np.ndarray | None, manifest: Manifest, caption: str, **how: Any) -> Case:
    """One picture for the report, as base64 of a JPEG, with its caption, and its boxes in words for who cannot see them."""
    picture = draw(row, boxes, manifest.names, side=LARGE, **how)
    shown = [
        f"{manifest.names[int(b[0])]} {b[5]:.2f}" if len(b) > 5 else manifest.names[int(b[0])]
        for b in (() if boxes is None else boxes)
    ]
    alt = f"{name_of(row)}, boxes drawn: {', '.join(shown) or 'none'}"
    return {"kind": "jpeg", "data": base64.b64encode(jpeg(picture)).decode(), "caption": caption, "alt": alt}


def embedded(data: bytes, caption: str, kind: str = "png") -> Case:
    """A picture that a stage has left."""
    return {"kind": kind, "data": base64.b64encode(data).decode(), "caption": caption, "alt": f"Figure: {caption}"}


def name_of(row: Row) -> str:
    return row.uri.rsplit("/", 1)[-1]


def worst_misses(manifest: Manifest, found: Found, tau_c: np.ndarray) -> list[Case]:
    """Defective test pictures that pass, those that the model comes least near to first."""
    escaped = []
    for row in _labelled(manifest):
        boxes = found.get(row.image_id, np.zeros((0, 7), np.float32))
        if len(row.boxes if row.boxes is not None else ()) and not len(detections_above(boxes, tau_c)):
            escaped.append((float(boxes[:, DET_SCORE].max()) if len(boxes) else 0.0, row.image_id, row, boxes))
    cases = []
    for score, _, row, boxes in sorted(escaped, key=lambda e: e[:2])[:MISSES]:
        best = boxes[np.argsort(-boxes[:, DET_SCORE])][:1]
        guess = as_candidates(best, row)
        labels = row.boxes if row.boxes is not None else np.zeros((0, 5))
        what = ", ".join(sorted({manifest.names[int(c)] for c in labels[:, CLS]}))
        said = "no guess"
        if len(best):
            c = int(best[0, DET_CLS])
            said = f"best guess {manifest.names[c]} {score:.3f}, threshold {tau_c[c]:.3f}"
        caption = f"{name_of(row)}: {what}; {said}"
        cases.append(case(row, guess, manifest, caption, truth=row.boxes, uncertain_below=np.full(len(tau_c), 2.0)))
    return cases


def worst_alarms(manifest: Manifest, found: Found, tau_c: np.ndarray) -> list[Case]:
    """Test pictures with the surest false boxes at the operating point, clean pictures first."""
    wrong = []
    for row in _labelled(manifest):
        boxes = found.get(row.image_id, np.zeros((0, 7), np.float32))
        false = detections_above(boxes, tau_c)
        false = false[false[:, HIT] == 0]
        if len(false):
            clean = row.boxes is None or not len(row.boxes)
            wrong.append((not clean, -float(false[:, DET_SCORE].max()), row.image_id, row, false))
    cases = []
    for _, score, _, row, false in sorted(wrong, key=lambda e: e[:3])[:ALARMS]:
        drawn = as_candidates(false, row)
        surest = drawn[drawn[:, SCORE].argmax()]
        caption = (
            f"{name_of(row)}: {_fault(surest, row, manifest.names)}, {manifest.names[int(surest[CLS])]} {-score:.2f}"
        )
        cases.append(case(row, drawn, manifest, caption, truth=row.boxes))
    return cases


def _fault(box: np.ndarray, row: Row, names: list[str]) -> str:
    """What is wrong with a box that counts as no hit, in words (the kinds of Bolya et al., TIDE, 2020, section 2.2).

    Args:
        box: (7,) [cls, cx, cy, w, h (0..1), score, hit].
    """
    if row.boxes is None or not len(row.boxes):
        return "clean picture"
    scale = np.tile([row.width, row.height], 2)
    overlap = iou(corners(box[None]) * scale, corners(row.boxes) * scale)[0]
    own = row.boxes[:, CLS] == box[CLS]
    if overlap[own].max(initial=0.0) >= HIT_IOU:
        return "a second box on a defect that has one"
    if overlap.max() >= HIT_IOU:
        return f"wrong class, labelled {names[int(row.boxes[overlap.argmax(), CLS])]}"
    if overlap[own].max(initial=0.0) >= TOUCH_IOU:
        return f"too far off its label (IoU {overlap[own].max():.2f})"
    return "beside labelled defects"


def side_by_side(
    manifest: Manifest, detections: Detections, tau: Mapping[str, np.ndarray], titles: Mapping[str, str], count: int
) -> list[dict[str, Any]]:
    """Rows of cases: labels, then each model at its operating point, on the same sample test pictures."""
    rows = []
    for row in sample_rows(manifest, count):
        cases = [case(row, row.boxes, manifest, "labels")]
        for model, title in titles.items():
            boxes = as_candidates(detections.get((model, "test"), {}).get(row.image_id), row, tau[model])
            cases.append(case(row, boxes, manifest, f"{title}: {len(boxes)} box{'es' * (len(boxes) != 1)}"))
        rows.append({"title": name_of(row), "cases": cases})
    return rows


def _labelled(manifest: Manifest) -> list[Row]:
    return [r for r in manifest.of_split("test") if r.boxes is not None]
