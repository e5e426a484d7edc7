"""Parity: does the exported file find what the network found, on real pictures, in the precision its runtime computes in?

Random input proves little (nothing is found in it), and a converter's own check runs in its own precision. Here both see the
same pictures through the same letterbox; boxes are compared in pixels of the picture, scores as they are, and the mAP of both
over the same pictures. int8 is another detector: it is measured the same way, but what it loses is a statement, not an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dfssd.data.boxes import iou
from dfssd.errors import DfssdError
from dfssd.evaluate.validation import summarise

MAP_LIMIT = 0.002  # mAP50-95 and mAP50
BOX_LIMIT = 0.5  # px of the picture
SCORE_LIMIT = 0.01
LOOK = 0.05  # boxes from this score on are compared one by one
SAME_IOU, SAME_SCORE = (
    0.95,
    1e-3,
)  # a pair further apart, but with equal scores, is another choice of NMS between the two
SWAPPED_LIMIT = 0.01  # share of boxes where NMS may have decided a tie the other way


@dataclass(frozen=True)
class Parity:
    """How far an exported model is from its network.

    Args:
        pictures, boxes: compared; missing: boxes of one that the other does not have, although its score is not marginal.
        swapped: boxes where NMS decided a tie of scores the other way (mAP judges these).
        box_px, score: largest difference of the other pairs. map50, map50_95: network's and exported model's.
        splits: how many of the pictures are of which split, in words: "75 test, 75 val".
        passed: defective pictures (of `defective`) in which network and model find nothing, each at its own operating point.
        precision: what the runtime computed in.
    """

    name: str
    precision: str
    pictures: int
    boxes: int
    missing: int
    swapped: int
    box_px: float
    score: float
    map50: tuple[float, float]
    map50_95: tuple[float, float]
    passed: tuple[int, int]
    defective: int
    splits: str

    @property
    def loss(self) -> float:
        """Points of mAP50-95 (0..1) that the exported model is below its network."""
        return self.map50_95[0] - self.map50_95[1]

    @property
    def failures(self) -> list[str]:
        """What is beyond its limit, in words."""
        said = []
        for label, (own, other) in (("mAP50", self.map50), ("mAP50-95", self.map50_95)):
            if abs(own - other) > MAP_LIMIT:
                said.append(f"{label} {own:.4f} became {other:.4f} (limit {MAP_LIMIT})")
        if self.missing:
            said.append(f"{self.missing} of {self.boxes} boxes have no counterpart")
        if self.swapped > SWAPPED_LIMIT * self.boxes:
            said.append(f"{self.swapped} of {self.boxes} boxes lie elsewhere")
        if self.box_px > BOX_LIMIT:
            said.append(f"a box is {self.box_px:.2f} px off (limit {BOX_LIMIT})")
        if self.score > SCORE_LIMIT:
            said.append(f"a score is {self.score:.3f} off (limit {SCORE_LIMIT})")
        return said

    def in_words(self) -> str:
        """One line for the terminal."""
        return (
            f"{self.name} ({self.precision}): {self.boxes} boxes on {self.pictures} pictures ({self.splits}), at most "
            f"{self.box_px:.2g} px and {self.score:.2g} of score off, {self.missing} without counterpart; mAP50-95 "
            f"{self.map50_95[0]:.4f} -> {self.map50_95[1]:.4f}; {self.passed[0]} -> {self.passed[1]} of the "
            f"{self.defective} defective ones pass"
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "loss": round(self.loss, 5), "failures": self.failures}


def compare(
    name: str,
    precision: str,
    own: Sequence[dict[str, Any]],
    other: Sequence[dict[str, Any]],
    names: Sequence[str],
    passed: tuple[int, int],
    splits: str,
) -> Parity:
    """Records of the network and of the exported model on the same pictures, in the same order.

    Args:
        passed: defective pictures in which they find nothing, at their operating points.
        splits: which pictures these are, in words.
    """
    boxes = missing = swapped = 0
    box_px = score = 0.0
    for one, two in zip(own, other, strict=True):
        assert one["image_id"] == two["image_id"], "both saw the same pictures"
        for a, b, counts in ((one, two, True), (two, one, False)):
            lost, other_choice, px, points, seen = _differences(a, b)
            missing, swapped = missing + lost, swapped + other_choice
            box_px, score = max(box_px, px), max(score, points)
            boxes += seen if counts else 0
    metrics = [summarise(list(records), dict(enumerate(names))) for records in (own, other)]
    pairs = {k: (round(metrics[0][k], 5), round(metrics[1][k], 5)) for k in ("map50", "map50_95")}
    defective = sum(len(one["target_cls"]) > 0 for one in own)
    return Parity(
        name,
        precision,
        pictures=len(own),
        boxes=boxes,
        missing=missing,
        swapped=swapped,
        box_px=round(box_px, 5),
        score=round(score, 6),
        map50=pairs["map50"],
        map50_95=pairs["map50_95"],
        passed=passed,
        defective=defective,
        splits=splits,
    )


def _differences(one: dict[str, Any], two: dict[str, Any]) -> tuple[int, int, float, float, int]:
    """Boxes of `one` that `two` lacks, pairs of another choice, largest difference of box (px) and score, boxes looked at."""
    keep = one["conf"] >= LOOK + SCORE_LIMIT
    near = two["conf"] >= LOOK
    a, b = ({k: r[k][which] for k in ("boxes", "conf", "pred_cls")} for r, which in ((one, keep), (two, near)))
    if not len(a["conf"]) or not len(b["conf"]):
        return len(a["conf"]), 0, 0.0, 0.0, len(a["conf"])
    overlap = iou(a["boxes"], b["boxes"]) * (a["pred_cls"][:, None] == b["pred_cls"][None])
    best = overlap.argmax(1)
    found = overlap[np.arange(len(best)), best] > 0.5
    px, points = np.abs(a["boxes"] - b["boxes"][best]).max(1), np.abs(a["conf"] - b["conf"][best])
    swapped = found & (overlap[np.arange(len(best)), best] < SAME_IOU) & (points < SAME_SCORE)
    px, points = px[found & ~swapped], points[found & ~swapped]
    return int((~found).sum()), int(swapped.sum()), float(px.max(initial=0)), float(points.max(initial=0)), len(found)


def require(parities: Sequence[Parity]) -> None:
    """Stop where an exported model in floating point is not its network.

    Raises:
        DfssdError: boxes, scores or mAP are beyond their limits.
    """
    bad = {p.name: p.failures for p in parities if p.precision != "int8" and p.failures}
    if bad:
        raise DfssdError(
            "the exported model does not find what the network finds:\n    "
            + "\n    ".join(f"{name}: {'; '.join(said)}" for name, said in bad.items()),
            todo="leave this format out (--formats), or update its runtime; nothing was published",
        )
