"""What a detection head says before boxes are decoded.

Legend: B images, A anchor points over all levels, C classes, R DFL bins a side (16; 1 in YOLO26).
"""

from __future__ import annotations

from dataclasses import dataclass

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
