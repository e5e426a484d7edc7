"""What the readers of labelling programs share: corners of shapes, and a sheet for each picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from dfssd.data.checks import Label
from dfssd.data.formats.listing import Tree
from dfssd.data.formats.matching import Reference
from dfssd.data.formats.source import Sheet, Source, assemble, unusable

Shape = tuple[str, float, float, float, float]  # class, x1, y1, x2, y2


def around(points: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
    """Corners x1, y1, x2, y2 of the box round points."""
    xy = np.asarray(points, np.float64)[:, :2]
    (x1, y1), (x2, y2) = xy.min(0), xy.max(0)
    return float(x1), float(y1), float(x2), float(y2)


def turned(x: float, y: float, w: float, h: float, degrees: float, pivot: tuple[float, float]) -> tuple[float, ...]:
    """Corners of the box round a rectangle that is turned clockwise about `pivot`."""
    corners = np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]]) - pivot
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return around(corners @ np.array([[cos, sin], [-sin, cos]]) + pivot)


def label_of(shapes: Sequence[Shape], size: tuple[int, int] | None, counts: Counter[str]) -> tuple[list[str], Label]:
    """Classes, and boxes in px."""
    rows = [[-1, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1] for _, x1, y1, x2, y2 in shapes]
    return [s[0] for s in shapes], Label(np.array(rows, np.float64).reshape(-1, 5), True, size, counts=counts)


def collect(tree: Tree, fmt: str, sheets: list[Sheet], declared: Sequence[str] = ()) -> Source:
    source = assemble(tree, fmt, sheets, declared=declared)
    for sheet in sheets:
        source.counts += sheet.label.counts
    return source


def guarded(reference: Reference, called: str, read: Callable[[], tuple[list[str], Label]]) -> Sheet:
    """A sheet, or one with the reason where its numbers make no sense."""
    try:
        classes, label = read()
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        return Sheet(reference, [], unusable("label_unreadable", f"{type(error).__name__}: {error}"), "", called)
    if label.problem is None and "" in classes:
        classes, label = [], unusable("label_columns", "a shape has no class")
    return Sheet(reference, classes, label, "", called)


def with_untouched(source: Source, untouched: int) -> Source:
    """Where a program lists every picture that was loaded, one without a shape is clean or was never looked at."""
    if untouched:
        source.notes.append(
            f"{untouched} pictures have no shape in what {source.format} wrote, which may mean that nobody has looked at "
            "them: they are unlabelled (--missing-labels background says that they are free of defects)"
        )
    return source
