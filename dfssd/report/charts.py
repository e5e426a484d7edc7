"""Charts of the report as inline SVG text: they follow the page's colours in light and dark, and stay sharp in print.

Legends stand below the axes, never over the curves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise

PALETTE = ("var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)", "var(--c5)", "var(--c6)", "var(--c7)", "var(--c8)")
DASHES = ("", "6 3", "2 3", "9 3 2 3")  # of the first, second, ... eight lines
WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 26, 38
LONG = 26  # letters of a name, above which the legend has one column

Points = Sequence[tuple[float, float | None]]
Place = Callable[[float, float], tuple[float, float]]  # of a point of the data in the picture (px)


def line_chart(
    title: str,
    lines: Mapping[str, Points],
    x_label: str,
    y_label: str = "",
    *,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = (0.0, 1.0),
    mark_x: float | None = None,
    diagonal: bool = False,
    dots: Mapping[str, tuple[float, float]] | None = None,
) -> str:
    """SVG of several lines; a point whose y is None interrupts its line.

    Args:
        mark_x: a vertical line here (an operating point). diagonal: also x = y.
        dots: a large dot in a line's colour, by its name.
    """
    points = [(x, y) for own in lines.values() for x, y in own if y is not None]
    if not points:
        return ""
    x0, x1 = x_range or (min(p[0] for p in points), max(p[0] for p in points))
    y0, y1 = y_range or (min(0.0, *(p[1] for p in points)), max(p[1] for p in points))
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)
    across, up = ticks(x0, x1), ticks(y0, y1)
    if y_range is None:
        up = up if up[-1] >= y1 else [*up, 2 * up[-1] - up[-2]]
        y1 = up[-1]
    columns = 1 if max(map(len, lines)) > LONG else 2
    rows = -(-len(lines) // columns) if len(lines) > 1 else 0
    height = HEIGHT + 18 * rows

    def place(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (min(max(x, x0), x1) - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        down = TOP + (y1 - min(max(y, y0), y1)) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
        return round(right, 1), round(down, 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<text x="{LEFT}" y="16" class="title">{escape(title)}</text>')
    parts += _axes(place, across, up, x_label, y_label)
    if diagonal:
        (a, b), (c, d) = place(x0, x0), place(x1, x1)
        parts.append(f'<line x1="{a}" y1="{b}" x2="{c}" y2="{d}" class="mark"/>')
    if mark_x is not None and x0 <= mark_x <= x1:
        x, _ = place(mark_x, y0)
        parts.append(f'<line x1="{x}" y1="{TOP}" x2="{x}" y2="{HEIGHT - BOTTOM}" class="mark"/>')
    for k, (name, own) in enumerate(lines.items()):
        colour, dash = look(k)
        parts += _curve(place, own, colour, dash)
        if dots and name in dots:
            x, y = place(*dots[name])
            parts.append(f'<circle cx="{x}" cy="{y}" r="5" fill="{colour}" stroke="var(--panel)" stroke-width="1.5"/>')
        if rows:
            x, y = LEFT + (k % columns) * (WIDTH - LEFT) / 2, HEIGHT + 10 + 18 * (k // columns)
            parts.append(f'<line x1="{x}" y1="{y}" x2="{x + 18}" y2="{y}" stroke="{colour}" stroke-width="3"{dash}/>')
            parts.append(f'<text x="{x + 23}" y="{y + 4}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def look(k: int) -> tuple[str, str]:
    """Colour and dash (an attribute, or nothing) of the k-th line: different for the first 32, more than a legend shows."""
    dash = DASHES[k // len(PALETTE) % len(DASHES)]
    return PALETTE[k % len(PALETTE)], f' stroke-dasharray="{dash}"' if dash else ""


def _axes(place: Place, across: Sequence[float], up: Sequence[float], x_label: str, y_label: str) -> list[str]:
    """Grid, numbers at the ticks, and what the axes are."""
    parts = []
    for value in up:
        _, y = place(across[0], value)
        parts.append(f'<line x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4}" text-anchor="end">{_number(value)}</text>')
    for value in across:
        x, _ = place(value, up[0])
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{_number(value)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    if y_label:
        turned = f'transform="translate(11 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"'
        parts.append(f'<text {turned} text-anchor="middle">{escape(y_label)}</text>')
    return parts


def _curve(place: Place, points: Points, colour: str, dash: str) -> list[str]:
    """A line for each piece of a curve; a dot for a piece of one point."""
    parts = []
    for piece in _pieces(points):
        path = " ".join("{},{}".format(*place(x, y)) for x, y in piece)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        if len(piece) == 1:
            x, y = place(*piece[0])
            parts.append(f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>')
    return parts


def _pieces(points: Points) -> list[list[tuple[float, float]]]:
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append((x, y))
    return [p for p in pieces if p]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`: four to seven of them."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 10) for k in range(first, last + 1)]


def thinned(points: Sequence[tuple[float, float]], most: int = 200) -> list[tuple[float, float]]:
    """At most so many points: means of equal pieces, so that a long training stays a small picture."""
    if len(points) <= most:
        return list(points)
    edges = [round(k * len(points) / most) for k in range(most + 1)]
    parts = [points[a:b] for a, b in pairwise(edges)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts if p]


def _number(value: float) -> str:
    return f"{value:.6g}"
