"""Where the anchor points of a head lie, in cells and in pixels, and which of them lie in an ignored area.

Legend: B images, A anchor points over all levels, M places for boxes, U for ignored areas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dfssd.models.targets import Targets


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


def corners_px(xywh: Tensor, anchors: Anchors) -> Tensor:
    """(B,M,4) x1, y1, x2, y2 (px) of boxes given as shares of the image."""
    x, y, w, h = xywh.unbind(-1)
    x, w, y, h = x * anchors.width_px, w * anchors.width_px, y * anchors.height_px, h * anchors.height_px
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)


def ignored_points(targets: Targets, anchors: Anchors) -> Tensor:
    """(B,A) bool: anchor points inside an ignored area or of a silent image; a box thinner than a cell covers the cell it
    lies in.

    A box covers a product of rows and columns of a grid, so that boxes are counted by a product of matrices: memory grows
    with (rows + columns) x boxes, and not with anchor points x boxes.
    """
    silent = targets.silent.unsqueeze(1)
    if targets.ignored_xywh.shape[1] == 0:
        return silent.expand(-1, anchors.points_a2.shape[0])
    levels = []
    for k, (rows, columns) in enumerate(anchors.sizes):
        counts = _covered(targets.ignored_xywh, 1, rows, anchors, k).transpose(1, 2) @ _covered(
            targets.ignored_xywh, 0, columns, anchors, k
        )
        levels.append(counts.flatten(1) > 0)
    return torch.cat(levels, 1) | silent


def _covered(boxes_bu4: Tensor, axis: int, count: int, anchors: Anchors, level: int) -> Tensor:
    """(B,U,count) 1 where the box covers the grid's column (axis 0) or row (axis 1), else 0."""
    stride = anchors.strides[level]
    side = anchors.height_px if axis else anchors.width_px
    centre, half = boxes_bu4[..., axis, None] * side, (boxes_bu4[..., axis + 2, None] * side / 2).clamp(min=stride / 2)
    place = (torch.arange(count, device=boxes_bu4.device) + 0.5) * stride
    return ((place - centre).abs() <= half).to(torch.float32)
