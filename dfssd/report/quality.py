"""The quality report of pseudo-labels: table, curves, and the images that a person should look at first."""

from __future__ import annotations

import csv as csv_module
import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a cluster; must come before pyplot

import numpy as np
from matplotlib import pyplot as plt

from dfssd.config.choices import POLICIES
from dfssd.pseudo.quality import Quality
from dfssd.pseudo.scores import BINS
from dfssd.report.tables import render


def rows(numbers: dict[str, Any], policies: list[str], names: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one a policy and class. P precision, R recall, IoU mean over hits; boxes an image.

    Args:
        names: classes in order; none: as in `numbers` (which a file of JSON sorts).
    """
    sources = [s for s in ("val", "withheld") if any(f"{s}_recall" in v["all"] for v in numbers["policies"].values())]
    header = ["policy", "class", "threshold", "an image", "labelled"]
    header += [f"{s} {k}" for s in sources for k in ("P", "R", "IoU")]
    keys = ["tau", "per_image", *(f"{s}_{k}" for s in sources for k in ("precision", "recall", "iou"))]
    usual = {**numbers["labelled_rate"], "all": sum(numbers["labelled_rate"].values())}
    table = []
    for policy in policies:
        found = numbers["policies"][policy]
        for name in [*(n for n in names or found if n in found and n != "all"), "all"]:
            one = found[name]
            cells = ["-" if one[k] is None else f"{one[k]:.3f}" for k in keys]
            if one["tau"] is not None and one["tau"] > 1:  # `NEVER`
                cells[0] = "none"
            table.append([policy, name, *cells[:2], f"{usual[name]:.3f}", *cells[2:]])
    return header, table


def terminal_table(numbers: dict[str, Any]) -> str:
    """The chosen policy class by class, and the others in one line each; warnings below."""
    chosen = numbers["chosen"]
    header, own = rows(numbers, [chosen])
    others = [r for p in numbers["policies"] if p != chosen for r in rows(numbers, [p])[1] if r[1] == "all"]
    text = render(f"pseudo-labels of policy '{chosen}', and the other policies in short", header, own + others)
    ap = ", ".join(f"{s} {v:.3f}" for s, v in numbers["candidates_ap50"].items() if v is not None)
    legend = "an image: pseudo-labels an image; labelled: boxes a labelled image; P, R: precision, recall at IoU 0.5"
    lines = [text, legend, f"candidates as detections: mAP50 {ap}", *(f"WARNING: {w}" for w in numbers["warnings"])]
    return "\n".join(lines)


def csv(numbers: dict[str, Any]) -> bytes:
    """All policies and classes as comma-separated values."""
    header, table = rows(numbers, list(numbers["policies"]))
    buffer = io.StringIO()
    csv_module.writer(buffer, lineterminator="\n").writerows([header, *table])
    return buffer.getvalue().encode()


def curves(quality: Quality) -> bytes:
    """PNG: precision and recall over the threshold for each class and source, with the thresholds of all policies."""
    count, sources = len(quality.names), list(quality.evidence)
    figure, axes = plt.subplots(
        len(sources), count, figsize=(2.6 * count + 1, 2.5 * len(sources) + 0.6), squeeze=False, layout="constrained",
        sharex=True, sharey=True,
    )  # fmt: skip
    x = np.arange(BINS) / BINS
    for row, source in zip(axes, sources, strict=True):
        precision, recall = quality.evidence[source].curves()
        for c, (axis, name) in enumerate(zip(row, quality.names, strict=True)):
            axis.plot(x, precision[c], color="#4363d8", label="precision")
            axis.plot(x, recall[c], color="#e6194b", label="recall")
            for policy, tau in quality.tau.items():
                mine = policy == quality.chosen
                style = POLICIES[policy].line, "black" if mine else "#999", 2 if mine else 1
                label = policy + (" (chosen)" if mine else "")
                axis.axvline(tau[c], linestyle=style[0], color=style[1], linewidth=style[2], label=label)
            axis.set(title=f"{name}, {source}", xlim=(0, 1), ylim=(0, 1.02))
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("threshold (score)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    plt.close(figure)
    return buffer.getvalue()
