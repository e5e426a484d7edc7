"""Tables for the terminal and the report, as plain text and as rows."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.table import Table

LABELS = {"teacher": "teacher", "label_only": "student, labels alone", "student": "student, distilled"}


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
    for name, label in LABELS.items():
        if name in results:
            one = results[name]
            numbers = [f"{one['test']['map50']:.3f}", f"{one['test']['map50_95']:.3f}"]
            rows.append([label, *numbers, f"{one['params'] / 1e6:.2f} M", f"{one['latency_ms']:.1f}"])
    return header, rows


def class_rows(results: dict[str, Any], names: list[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: test mAP50 by class and model."""
    models = [m for m in LABELS if m in results]
    header = ["class", "boxes", *(f"{LABELS[m]}" for m in models)]
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


def split_table(summary: dict[str, Any]) -> str:
    """What `prepare` found, for the terminal."""
    header, rows = split_rows(summary)
    bad = ", ".join(f"{n} {reason}" for reason, n in summary["bad_files"].items()) or "none"
    return (
        render("boxes by split and class", header, rows)
        + f"\n{summary['files']} files, {summary['images']} images; set aside: {bad}"
        + f"\n{summary['groups']} groups of near-duplicates, the largest has {summary['largest_group']} images; "
        + f"{summary['test_images_with_near_duplicate_in_train']} test images have a near-duplicate in train"
    )


def result_table(results: dict[str, Any]) -> str:
    """Models side by side, for the terminal."""
    return render("measured on the test split", *model_rows(results))


def verdict(results: dict[str, Any]) -> str:
    """One line: did the unlabelled images pay?"""
    if not {"label_only", "student"} <= results.keys():
        return ""
    gain = [100 * (results["student"]["test"][k] - results["label_only"]["test"][k]) for k in ("map50", "map50_95")]
    if gain[0] > 0:
        return f"The unlabelled images paid: {gain[0]:+.1f} points of test mAP50, {gain[1]:+.1f} of mAP50-95."
    return (
        f"The unlabelled images did NOT pay: {gain[0]:+.1f} points of test mAP50, {gain[1]:+.1f} of mAP50-95. "
        "Use label_only/best.pt, and look at pseudo/pseudo.png."
    )
