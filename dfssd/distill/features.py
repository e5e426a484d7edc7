"""Feature distillation over tap layers: bring the student's maps to the teacher's shape, compare, join the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfssd.choices import DIVERGENCES
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
    score_ba: Tensor | None = None,
    tau: float = 0.0,
    generators: Sequence[nn.Module] = (),
    masks: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Divergence of each tap layer as a sum over images, and its normaliser.

    Args:
        kind: one of KINDS.
        student: (B,C,H,W) a tap, in the teacher's channels; another size than the teacher's is resized to it.
        teacher: (B,C,H,W) a tap.
        score_ba: (B,A) teacher's best class score at each anchor point, levels one after the other; for those weighted by it.
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
            assert score_ba is not None, f"{kind} is weighted by the teacher's scores"
            value, images = compare(s, t, score_map(score_ba, s.shape[2:]))
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


def score_map(score_ba: Tensor, size: Sequence[int]) -> Tensor:
    """(B,1,H,W) score at each position of a map: of the head's level of that size, else of the closest one, resized.

    The levels follow one another in A with strides 8, 16, 32 on a square input: A = 21 n^2 with n the side at stride 32.
    """
    n = round((score_ba.shape[1] / 21) ** 0.5)
    if 21 * n * n != score_ba.shape[1]:
        raise ValueError(f"{score_ba.shape[1]} anchor points are not those of strides 8, 16, 32 on a square input")
    sides, first = (4 * n, 2 * n, n), 0
    closest = min(sides, key=lambda side: abs(side - size[0]))
    for side in sides:
        if side == closest:
            break
        first += side * side
    level = score_ba[:, first : first + closest * closest].reshape(-1, 1, closest, closest)
    return resized(level, size)
