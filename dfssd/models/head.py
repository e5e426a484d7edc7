"""What a detection head says before boxes are decoded, and where its anchor points lie.

Legend: B images, A anchor points over all levels, C classes, R DFL bins a side (16; 1 in YOLO26).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

MAIN = "one2many"  # the branch that every head has, under Ultralytics' name


@dataclass
class HeadOutput:
    """Raw output of one branch of a head, in float32 but for the maps.

    Args:
        boxes: (B,4R,A) logits of the DFL bins, or the distances themselves (strides) where R is 1. (Another family than YOLO:
            whatever describes a box, in so many numbers.)
        scores: (B,C,A) class logits.
        feats: maps that entered the head, (B,C,H,W) each: P3, P4, P5.
    """

    boxes: Tensor
    scores: Tensor
    feats: list[Tensor]


@dataclass
class TeacherOutput:
    """What a teacher says of a batch: raw head output by branch, and its taps, (B,C,H,W) each."""

    raw: dict[str, HeadOutput]
    taps: list[Tensor]


def branches(output: Any) -> dict[str, HeadOutput]:
    """Raw output by branch: {"one2many": ...} and, for end-to-end heads, {"one2one": ...}."""
    raw = output[1] if isinstance(output, tuple) else output
    named = {k: v for k, v in raw.items() if k in ("one2many", "one2one") and v} or {MAIN: raw}
    return {k: HeadOutput(b["boxes"].float(), b["scores"].float(), b["feats"]) for k, b in named.items()}


@dataclass(frozen=True)
class Anchors:
    """Anchor points of a head for one input size, always in float32: in bfloat16 a point beyond 128 cells is not
    representable, and from 1032 px on the finest level's points would lie up to 4 px off.

    Args:
        points_a2: x, y of each point in cells of its own level.
        strides_a1: cell size (px).
        sizes: (height, width) of each level in cells.
        strides: cell size of each level (px).
    """

    points_a2: Tensor
    strides_a1: Tensor
    sizes: tuple[tuple[int, int], ...]
    strides: tuple[float, ...]

    @property
    def height_px(self) -> float:
        return self.sizes[0][0] * self.strides[0]

    @property
    def width_px(self) -> float:
        return self.sizes[0][1] * self.strides[0]


def anchors_of(feats: Sequence[Tensor], strides: tuple[float, ...]) -> Anchors:
    """The anchor points of maps of these sizes; made once for each size and device, so that no step waits for a copy."""
    return _anchors(tuple((int(f.shape[2]), int(f.shape[3])) for f in feats), strides, feats[0].device)


@lru_cache(maxsize=32)
def _anchors(sizes: tuple[tuple[int, int], ...], strides: tuple[float, ...], device: torch.device) -> Anchors:
    points, cells = [], []
    for (height, width), stride in zip(sizes, strides, strict=True):
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        points.append(torch.stack((x, y), -1).view(-1, 2))
        cells.append(torch.full((height * width, 1), stride))
    return Anchors(torch.cat(points).to(device), torch.cat(cells).to(device), sizes, strides)
