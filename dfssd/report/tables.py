"""Tables for the terminal and the report, as plain text and as rows."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dfssd.data.manifest import Manifest
from dfssd.data.sampling import repeat_factors
from dfssd.runtime.artefact_names import split_round

LABELS = {"label_only": "student, labels alone", "student": "student, distilled"}


def models_in(results: dict[str, Any]) -> dict[str, str]:
    """Measured models and what to call them: teachers of all rounds first."""
    teachers = [name for name in results if split_round(name)[0] == "teacher"]
    titles = {name: "teacher" if name == "teacher" else f"teacher, round {split_round(name)[1]}" for name in teachers}
    return titles | {name: label for name, label in LABELS.items() if name in results}


def render(title: str, header: list[str], rows: list[list[str]]) -> str:
    """A table as text, 100 columns wide at most where it fits, so that a job's log shows it too."""
    table = Table(title=title, title_justify="left")
    for k, name in enumerate(header):
        table.add_column(name, justify="left" if k == 0 else "right")
    for row in rows:
        table.add_row(*row)
    buffer = io.StringIO()
    Console(file=buffer, width=120).print(table)
    return buffer.getvalue().rstrip()


def model_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one a model, measured on the test split."""
    header = ["model", "test mAP50", "test mAP50-95", "parameters", "latency (ms)"]
    rows = []
    for name, label in models_in(results).items():
        one = results[name]
        numbers = [f"{one['test']['map50']:.3f}", f"{one['test']['map50_95']:.3f}"]
        rows.append([label, *numbers, f"{one['params'] / 1e6:.2f} M", f"{one['latency_ms']:.1f}"])
    return header, rows


def class_rows(results: dict[str, Any], names: list[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: test mAP50 by class and model."""
    models = models_in(results)
    header = ["class", "boxes", *models.values()]
    rows = []
    for name in names:
        cells = [results[m]["test"]["by_class"].get(name) for m in models]
        count = next((c["boxes"] for c in cells if c), 0)
        rows.append([name, str(count), *(f"{c['map50']:.3f}" if c else "-" for c in cells)])
    return header, rows


def split_rows(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: images and boxes by split."""
    header = ["split", "images", "labelled", *summary["names"]]
    rows = [
        [name, str(s["images"]), str(s["labelled"]), *(str(s["boxes"][n]) for n in summary["names"])]
        for name, s in summary["splits"].items()
        if s["images"]
    ]
    rows.append(
        ["labelled", str(summary["labelled_images"]), "", *(str(v) for v in summary["labelled_boxes"].values())]
    )
    return header, rows


def balance_rows(manifest: Manifest, repeat_threshold: float) -> tuple[list[str], list[list[str]]]:
    """Header and rows: how often each class is labelled, and how much more often repeat factors show it in an epoch."""
    labels = [r.boxes for r in manifest.labelled_rows()]
    shown = np.array(
        [[(b is not None and bool((b[:, 0] == c).any())) for c in range(len(manifest.names))] for b in labels]
    )
    factors = np.array(repeat_factors(labels, len(manifest.names), repeat_threshold))
    rows = []
    for c, name in enumerate(manifest.names):
        images = int(shown[:, c].sum())
        boxes = sum(int((b[:, 0] == c).sum()) for b in labels if b is not None)
        seen = f"{factors[shown[:, c]].mean():.2f}" if images else "-"
        rows.append([name, str(images), f"{images / len(labels):.1%}", str(boxes), seen])
    return ["class", "labelled images", "share of them", "labelled boxes", "times an epoch"], rows


def split_table(summary: dict[str, Any]) -> str:
    """What `prepare` found, for the terminal."""
    header, rows = split_rows(summary)
    bad = ", ".join(f"{n} {reason}" for reason, n in summary["bad_files"].items()) or "none"
    return (
        render("boxes by split and class", header, rows)
        + f"\n{summary['files']} files, {summary['images']} images; set aside: {bad}"
        + f"\n{summary['groups']} groups of near-duplicates, the largest has {summary['largest_group']} images; "
        + f"near-duplicates of val or test: {summary.get('left_out', 0)} images left out, and "
        + f"{summary['test_images_with_near_duplicate_in_train']} of the test images still have one among what trains"
        + "".join(f"\nNOTE: {note}" for note in summary.get("notes", []))
    )


def result_table(results: dict[str, Any]) -> str:
    """Models side by side, for the terminal."""
    return render("measured on the test split", *model_rows(results))
