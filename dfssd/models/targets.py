"""Boxes that a batch is trained on, in a fixed layout: padded, with masks, so that nothing on the device asks how many.

Legend: B images, M places for boxes an image, U places for ignored boxes an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

BUCKET = 8  # places are a multiple of it: shapes repeat, which allocators and compilers like
NOWHERE = -1.0  # centre of a padded ignored box, an image's width outside of the image


@dataclass
class Targets:
    """What the detection loss is told about B images. Made on the CPU (`dfssd.pseudo.selection`).

    Args:
        cls: (B,M) int64 class ids; 0 where there is no box.
        xywh: (B,M,4) cx, cy, w, h, 0..1; 0 where there is no box.
        valid: (B,M) bool, is there a box?
        weight: (B,M) weight of a box on its class term.
        box_weight: (B,M) weight of a box on its box and DFL terms.
        ignored_xywh: (B,U,4) areas that are neither defect nor background unless a box claims them; U may be 0.
        silent: (B,) bool, images of which nothing is known: ignored as a whole.
    """

    cls: Tensor
    xywh: Tensor
    valid: Tensor
    weight: Tensor
    box_weight: Tensor
    ignored_xywh: Tensor
    silent: Tensor

    def to(self, device: torch.device) -> Targets:
        """On another device, without waiting where the memory is pinned."""
        return Targets(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def of_images(self, first: int, last: int) -> Targets:
        """Those of the images first..last-1."""
        return Targets(*(getattr(self, f.name)[first:last] for f in fields(self)))

    def pin_memory(self) -> Targets:
        return Targets(*(getattr(self, f.name).pin_memory() for f in fields(self)))


def joined(parts: Sequence[Targets]) -> Targets:
    """One batch from several, in their order, with as many places as the fullest has."""
    columns = []
    for f in fields(Targets):
        values = [getattr(p, f.name) for p in parts]
        if f.name != "silent":
            places, empty = max(v.shape[1] for v in values), NOWHERE if f.name == "ignored_xywh" else 0
            short = [(v, places - v.shape[1]) for v in values]
            values = [torch.cat([v, v.new_full((len(v), n, *v.shape[2:]), empty)], 1) if n else v for v, n in short]
        columns.append(torch.cat(values))
    return Targets(*columns)


def padded(rows_nk: Tensor, image_n: Tensor, images: int, empty: float = 0.0) -> tuple[Tensor, Tensor]:
    """Rows of a batch, sorted by image, as (B,M,K) and (B,M) bool: is the place taken?

    M is the largest number of rows of one image, rounded up to a multiple of BUCKET, and at least that.
    """
    counts = torch.bincount(image_n, minlength=images)
    most = int(counts.max()) if len(image_n) else 0
    places = max(1, -(-most // BUCKET)) * BUCKET
    values = torch.full((images, places, rows_nk.shape[1]), empty)
    taken = torch.zeros(images, places, dtype=torch.bool)
    within = torch.arange(len(image_n)) - (counts.cumsum(0) - counts)[image_n]
    values[image_n, within] = rows_nk
    taken[image_n, within] = True
    return values, taken
