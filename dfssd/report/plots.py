"""Curves of a training run."""

from __future__ import annotations

import io
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a cluster; must come before pyplot

from matplotlib import pyplot as plt


def training_curves(history: list[dict[str, Any]], title: str) -> bytes:
    """PNG: loss terms, validation mAP, learning rate and speed over steps."""
    figure, axes = plt.subplots(1, 4, figsize=(18, 3.6), layout="constrained")
    steps = [h for h in history if "loss/total" in h]
    checks = [h for h in history if "val/map50" in h]
    for name in sorted({k for h in steps for k in h if k.startswith("loss/")}):
        points = [(h["step"], h[name]) for h in steps if name in h]
        axes[0].plot(*zip(*points, strict=True), label=name[5:], linewidth=2 if name == "loss/total" else 1)
    axes[0].set(title=f"{title}: loss terms", xlabel="step", yscale="log")
    axes[0].legend(fontsize=7)
    for name in ("map50", "map50_95"):
        axes[1].plot([h["step"] for h in checks], [h[f"val/{name}"] for h in checks], marker=".", label=name)
    axes[1].set(title="val split", xlabel="step", ylim=(0, 1))
    axes[1].legend(fontsize=7)
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
