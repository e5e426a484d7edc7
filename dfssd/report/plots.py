"""Curves of a training run."""

from __future__ import annotations

import io
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a cluster; must come before pyplot

from matplotlib import pyplot as plt


def training_curves(history: list[dict[str, Any]], title: str) -> bytes:
    """PNG: loss terms, validation mAP, learning rate and speed over steps."""
    figure, axes = plt.subplots(1, 4, figsize=(18, 4.4), layout="constrained")
    steps = [h for h in history if "loss/total" in h]
    checks = [h for h in history if "val/map50" in h]
    names = sorted(
        {k for h in steps for k in h if k.startswith("loss/")}, key=lambda name: (name != "loss/total", name)
    )
    for k, name in enumerate(names):
        points = [(h["step"], h[name]) for h in steps if name in h]
        look = {"color": "black", "linewidth": 2} if name == "loss/total" else {"color": f"C{(k - 1) % 10}"}
        axes[0].plot(*zip(*points, strict=True), label=name[5:], **look)
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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    plt.close(figure)
    return buffer.getvalue()
