"""Feature distillation over tap layers: bring the student's maps to the teacher's shape, compare, join the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfssd.config.choices import DIVERGENCES
from dfssd.distill import divergences as d

KINDS = tuple(DIVERGENCES)


class Projections(nn.Module):
    """What feature distillation trains beside the student: a 1x1 convolution a tap, and MGD's generators.

    Args:
        student, teacher: channels of each tap, pairwise.
        generators: also make MGD's two 3x3 convolutions (Yang et al., ECCV 2022, section 3.1).
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int], generators: bool = False) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(own, other, 1) for own, other in zip(student, teacher, strict=True))
        self.generators = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1))
            for c in (teacher if generators else ())
        )

    def forward(self, taps: Sequence[Tensor]) -> list[Tensor]:
        """Student's taps in the teacher's channels."""
        return [conv(tap) for conv, tap in zip(self.convs, taps, strict=True)]


def layer_terms(
    kind: str,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    scores: Sequence[Tensor] = (),
    tau: float = 0.0,
    generators: Sequence[nn.Module] = (),
    masks: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Divergence of each tap layer as a sum over images, and its normaliser.

    Args:
        kind: one of KINDS.
        student: (B,C,H,W) a tap, in the teacher's channels; another size than the teacher's is resized to it.
        teacher: (B,C,H,W) a tap.
        scores: (B,1,H,W) teacher's best class score, a level of its head (`by_level`); for those weighted by it.
        tau: temperature; 0 takes its own.
        masks: draws what MGD hides; None: the process's own.

    Returns:
        (L,) sums and (L,) normalisers; divided, the divergence of each of the L layers.
    """
    sums, normalisers, row = [], [], DIVERGENCES[kind]
    compare: Callable[..., Any] = getattr(d, row.function)
    for k, (s, t) in enumerate(zip(student, teacher, strict=True)):
        if s.shape[2:] != t.shape[2:]:
            s = resized(s.float(), t.shape[2:])
        if row.needs or row.tau:  # the others take half precision, which spares a copy of each map
            s, t = s.float(), t.float()
        if row.needs == "scores":
            assert scores, f"{kind} is weighted by the teacher's scores"
            value, images = compare(s, t, score_map(scores, s.shape[2:]))
        else:
            if row.needs == "generator":
                value = compare(s, t, generators[k], d.hidden_positions(s, generator=masks))
            elif row.tau:
                value = compare(d.standardise(s), d.standardise(t), tau or row.tau)
            else:
                value = compare(s, t)
            images = value.new_full((), float(s.shape[0]))  # a kernel, not a copy that is waited for
            value = images * value
        sums.append(value)
        normalisers.append(images)
    return torch.stack(sums), torch.stack(normalisers)


def joined(kind: str, shares_l: Tensor, values_l: Tensor) -> Tensor:
    """One number from all layers: weighted towards those that differ most where the divergence says so, else their mean.

    Args:
        shares_l: (L,) this worker's share of each layer's divergence.
        values_l: (L,) divergence of each layer in the global batch, a constant.
    """
    return d.hierarchical(shares_l, values_l) if DIVERGENCES[kind].hierarchical else shares_l.mean()


def resized(maps_bchw: Tensor, size: Sequence[int]) -> Tensor:
    """Maps in another (height, width): averaged where they shrink, interpolated where they grow."""
    if tuple(maps_bchw.shape[2:]) == tuple(size):
        return maps_bchw
    if size[0] <= maps_bchw.shape[2] and size[1] <= maps_bchw.shape[3]:
        return F.adaptive_avg_pool2d(maps_bchw, (size[0], size[1]))
    return F.interpolate(maps_bchw, (size[0], size[1]), mode="bilinear", align_corners=False)


def by_level(score_ba: Tensor, feats: Sequence[Tensor]) -> list[Tensor]:
    """(B,1,H,W) scores of each level of a head, from those of its anchor points.

    Args:
        score_ba: levels one after the other, each row by row.
        feats: the maps that entered the head, one a level.

    Raises:
        ValueError: the head has another number of anchor points than one a position.
    """
    sizes = [(int(f.shape[2]), int(f.shape[3])) for f in feats]
    counts = [height * width for height, width in sizes]
    if sum(counts) != score_ba.shape[1]:
        raise ValueError(f"{score_ba.shape[1]} anchor points are not one a position of maps of {sizes}")
    parts = score_ba.split(counts, 1)
    return [part.reshape(-1, 1, *size) for part, size in zip(parts, sizes, strict=True)]


def score_map(levels: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """(B,1,H,W) score at each position of a map: of the head's level of that size, else of the closest one, resized."""
    return resized(min(levels, key=lambda level: abs(level.shape[2] - size[0])), size)
