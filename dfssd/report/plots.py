"""Curves of a training run."""

from __future__ import annotations

import io
import math
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a cluster; must come before pyplot

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

DASHES = ("-", "--", ":", "-.")  # of the first, second, ... ten lines
OWN = " (own)"  # ending of the terms that the student's own average teaches


def look(k: int) -> dict[str, Any]:
    """Colour and dash of the k-th line: different for the first 40."""
    return {"color": f"C{k % 10}", "linestyle": DASHES[k // 10 % len(DASHES)]}


def training_curves(history: list[dict[str, Any]], title: str) -> bytes:
    """PNG: loss terms, validation mAP, learning rate and speed over steps."""
    figure, axes = plt.subplots(1, 4, figsize=(18, 4.8), layout="constrained")
    steps = [h for h in history if "loss/total" in h]
    checks = [h for h in history if "val/map50" in h]
    _terms(axes[0], steps)
    axes[0].set(title=f"{title}: loss terms", xlabel="step", yscale="log")
    for name, label in (("map50", "mAP50"), ("map50_95", "mAP50-95")):
        axes[1].plot([h["step"] for h in checks], [h[f"val/{name}"] for h in checks], marker=".", label=label)
    axes[1].set(title="val split", xlabel="step", ylim=(0, 1))
    for axis in axes[:2]:  # over the curves a legend hides some of them
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4, frameon=False)
    axes[2].plot([h["step"] for h in steps], [h["lr"] for h in steps])
    axes[2].set(title="learning rate", xlabel="step")
    axes[3].plot([h["step"] for h in steps], [h["speed (img/s)"] for h in steps])
    axes[3].set(title="speed (img/s)", xlabel="step", ylim=(0, None))
    for axis in axes:
        axis.grid(alpha=0.3)
    if note := remark(steps):
        figure.supxlabel(note, fontsize=9, x=0.01, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    plt.close(figure)
    return buffer.getvalue()


def _terms(axis: Axes, steps: list[dict[str, Any]]) -> None:
    """A line for each loss term, interrupted where its weight is 0; grey where the student is ahead of its teacher."""
    names = sorted(
        {k for h in steps for k in h if k.startswith("loss/")}, key=lambda name: (name != "loss/total", name)
    )
    for k, name in enumerate(names):
        style = {"color": "black", "linewidth": 2} if name == "loss/total" else look(k - 1)
        values = [h[name] if h.get(name) else math.nan for h in steps]
        axis.plot([h["step"] for h in steps], values, label=name[5:], **style)
    for first, last in ahead(steps):
        axis.axvspan(first, last, color="0.5", alpha=0.15, linewidth=0)


def ahead(steps: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Stretches of logged steps (first, last) in which the student's own average teaches instead of its teacher."""
    found: list[tuple[float, float]] = []
    open_ = False
    for h in steps:
        own = any(k.endswith(OWN) for k in h)
        if own:
            found = [*found[:-1], (found[-1][0], h["step"])] if open_ else [*found, (h["step"], h["step"])]
        open_ = own
    return found


def remark(steps: list[dict[str, Any]]) -> str:
    """What a fall of terms to zero means, where there is one; else ''."""
    said = []
    if ahead(steps):
        said.append(
            "Grey: on val the student is ahead of its teacher, so the teacher's terms fade to zero as meant (--fade), and "
            f"those of the student's own average,{OWN}, take over."
        )
    ended = any(k.startswith("loss/feat") and v == 0 for k, v in (steps[-1] if steps else {}).items())
    if ended and not ahead(steps):
        said.append("Lines of feat/ that end: the schedule has set their weight to zero (--feature-schedule).")
    return " ".join(said)
