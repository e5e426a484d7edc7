"""The picture of a sweep: dots with intervals, curves, or parallel coordinates."""

from __future__ import annotations

import io
import statistics
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dfssd.sweep.ablation import AblationRow

INK, PALE = "#1f4e79", "#9db4c8"
COLOURS = ("#8a8a8a", "#1f4e79", "#c0572b", "#3b7d4f", "#7a4b94", "#b08a1e")


def draw(rows: list[AblationRow], records: list[dict[str, Any]], title: str, search: bool) -> bytes:
    """PNG of the figure that suits the sweep.

    Args:
        search: parallel coordinates of the points instead of one dot a row.
    """
    if search:
        return _png(_parallel(records, title))
    if all(row.x is not None for row in rows):
        return _png(_curves(rows, title))
    return _png(_dots(rows, title))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    return buffer.getvalue()


def _bare(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _dots(rows: list[AblationRow], title: str) -> Figure:
    """One line a row: every seed pale, the mean dark with one standard deviation to both sides."""
    figure = Figure(figsize=(7, 0.42 * len(rows) + 1.1))
    axes = figure.subplots()
    for k, row in enumerate(rows):
        axes.plot([100 * v for v in row.values.values()], [k] * len(row.values), "o", color=PALE, ms=5)
        axes.errorbar(100 * row.mean, k, xerr=100 * row.sd, fmt="o", color=INK, ms=6, capsize=3)
    axes.axvline(100 * rows[0].mean, color="#cccccc", lw=1, zorder=0)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("test mAP50 (%): seeds, mean ± standard deviation")
    axes.set_title(title, loc="left", fontsize=10)
    _bare(axes)
    return figure


def _curves(rows: list[AblationRow], title: str) -> Figure:
    """Over x, one curve for rows of the same first part of their name, with a band of one standard deviation."""
    series: dict[str, list[AblationRow]] = {}
    for row in rows:
        series.setdefault(row.name.split(",")[0], []).append(row)
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for colour, (name, own) in zip(COLOURS * 9, series.items(), strict=False):
        own = sorted(own, key=lambda row: row.x or 0.0)
        x = [float(row.x or 0.0) for row in own]
        mean, sd = (np.array([100 * getattr(row, key) for row in own]) for key in ("mean", "sd"))
        axes.plot(x, mean, "o-", color=colour, label=name, ms=4)
        axes.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.15, lw=0)
    spread = [row.x for row in rows if row.x]
    if spread and max(spread) / min(spread) > 20:
        axes.set_xscale("log")
    axes.set_xlabel("setting")
    axes.set_ylabel("test mAP50 (%)")
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)  # over curves it hides some
    _bare(axes)
    return figure


def _parallel(records: list[dict[str, Any]], title: str) -> Figure:
    """A line a trial through its settings, each axis from its lowest to its highest value; the best are dark."""
    keys = list(records[0]["settings"])
    columns = [[record["settings"][key] for record in records] for key in keys]
    columns.append([100 * record["result"]["test/map50"] for record in records])
    figure = Figure(figsize=(1.9 * len(columns) + 1, 4))
    axes = figure.subplots()
    places, labels = [], []
    for column in columns:
        numeric = all(isinstance(v, int | float) for v in column)
        levels = sorted({str(v) for v in column})
        values = np.array(column, float) if numeric else np.array([levels.index(str(v)) for v in column], float)
        spread = values.max() - values.min() or 1.0
        places.append((values - values.min()) / spread)
        low, high = (min(column), max(column)) if numeric else (levels[0], levels[-1])
        labels.append([f"{v:.3g}" if numeric else str(v) for v in (low, high)])
    limit = statistics.quantiles(columns[-1], n=5)[-1] if len(records) > 1 else 0.0
    for k in np.argsort(columns[-1]):
        best = columns[-1][k] >= limit
        axes.plot([p[k] for p in places], color=INK if best else PALE, lw=1.6 if best else 0.8)
    for k, (low, high) in enumerate(labels):
        axes.text(k, -0.05, low, ha="center", va="top", fontsize=8)
        axes.text(k, 1.05, high, ha="center", va="bottom", fontsize=8)
        axes.axvline(k, color="#cccccc", lw=0.8, zorder=0)
    names = [*(key.rsplit(".", 1)[-1] for key in keys), "test mAP50 (%)"]
    axes.set_xticks(range(len(columns)), names)
    axes.tick_params(axis="x", pad=14, length=0)
    axes.set_yticks([])
    axes.set_title(title, loc="left", fontsize=10, pad=18)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    return figure
