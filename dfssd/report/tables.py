"""Tables for the terminal and the report, as plain text and as rows."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from dfssd.data.boxes import CLS
from dfssd.data.manifest import Manifest
from dfssd.data.sampling import repeat_factors
from dfssd.runtime.artefact_names import LABEL_ONLY, STUDENT, TEACHER, ArtefactName

LABELS = {str(LABEL_ONLY): "student, labels alone", str(STUDENT): "student, distilled"}

WIDE = 10_000  # columns of a log
_ORDER = {"train": 0, "val": 1, "test": 2}  # of splits in a table; a record sorts them by the alphabet
CHOSEN = (
    "Val chose weights and scores, so its numbers flatter; test chose nothing. Escapes and rejects: pictures, on test."
)


def models_in(results: dict[str, Any]) -> dict[str, str]:
    """Measured models and what to call them: teachers of all rounds first."""
    others = [k for k, v in results.items() if isinstance(v, dict) and "test" in v and k not in LABELS]
    teachers = [(folder, ArtefactName.parse(folder)) for folder in others]
    teachers.sort(key=lambda one: (one[1].round, one[1].role != TEACHER.role))  # a file of JSON sorts by the alphabet
    titles = {k: n.role.replace("_", " ") + ("" if n.round == 1 else f", round {n.round}") for k, n in teachers}
    return titles | {name: label for name, label in LABELS.items() if name in results}


def in_prose(name: str, title: str) -> str:
    """What a sentence calls a model."""
    return {str(LABEL_ONLY): "the label-only student", str(STUDENT): "the distilled student"}.get(name, f"the {title}")


def render(title: str, header: list[str], rows: list[list[str]], width: int = 0) -> str:
    """A table as text: as wide as its longest row, for a log may be scrolled; where a terminal is narrower than that, cells
    are broken into lines, and rows become columns where words would not fit. Nothing is cut out of a cell.

    Args:
        width: of the terminal; 0: that of standard output, where it is one.
    """
    width = width or (shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDE)
    text = _drawn(title, header, rows, WIDE)
    if max(map(len, text.splitlines())) <= width:
        return text
    if sum(_longest_word(column) + 2 for column in zip(header, *rows, strict=True)) > width and len(rows) < len(header):
        header, *rows = (list(column) for column in zip(header, *rows, strict=True))  # a row becomes a column
    return _drawn(title, header, rows, width)


def _longest_word(cells: Sequence[str]) -> int:
    return max(len(word) for cell in cells for word in cell.split() or [""])


def _drawn(title: str, header: list[str], rows: list[list[str]], width: int) -> str:
    narrow = width < WIDE
    look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "show_edge": False, "padding": (0, 1, 0, 0)} if narrow else {}
    table = Table(**look)
    least = [_longest_word(column) for column in zip(header, *rows, strict=True)]
    room = narrow and sum(least) + 2 * len(least) <= width  # else words are broken: rich would not choose where
    for k, name in enumerate(header):
        side: Any = "left" if k == 0 else "right"
        table.add_column(name, justify=side, no_wrap=not narrow, overflow="fold", min_width=least[k] if room else None)
    for row in rows:
        table.add_row(*row)
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, highlight=False)
    console.print(title, markup=False)  # not as the title of the table, in whose width it would be broken
    console.print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().splitlines())


def model_title(results: dict[str, Any]) -> str:
    """What stands above the table of models: whose labels they used."""
    labels = results.get("labels")
    used = f"; labels used: {labels['train']} train + {labels['val']} val images" if labels else ""
    return f"measured on val and test{used}"


def model_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one a model, with its best weights on val, of students also the last ones; escapes and rejects at
    its operating point, on test."""
    header = [
        "model",
        "escapes",
        "rejects",
        "test mAP50",
        "test mAP50-95",
        "val mAP50",
        "last weights: test mAP50, mAP50-95",
        "parameters",
        "latency p50, p95 (ms)",
    ]
    rows = []
    for name, label in models_in(results).items():
        one = results[name]
        line = one["test"]["line"]
        rows.append(
            [
                label,
                *(f"{r['count']} of {r['pictures']}" for r in (line["escape"], line["overkill"])),
                f"{one['test']['map50']:.3f}",
                f"{one['test']['map50_95']:.3f}",
                f"{one['val']['map50']:.3f}",
                ", ".join(f"{one['last']['test'][k]:.3f}" for k in ("map50", "map50_95")) if "last" in one else "-",
                f"{one['params'] / 1e6:.2f} M",
                f"{one['latency_ms']:.1f}, {one['latency_p95_ms']:.1f}",
            ]
        )
    return header, rows


def size_rows(results: dict[str, Any], split: str = "test") -> tuple[list[str], list[list[str]]]:
    """Header and rows: COCO's mAP50-95 by box size (area in px of the picture) and model."""
    models = models_in(results)
    first = next(iter(models))
    titles = {"all": "all", "small": "small, below 32²", "medium": "medium", "large": "large, from 96²"}
    rows = []
    for size, title in titles.items():
        cells = [results[m][split]["coco"][size]["map50_95"] for m in models]
        boxes = results[first][split]["coco"][size]["boxes"]
        rows.append([title, str(boxes), *("-" if v is None else f"{v:.3f}" for v in cells)])
    return ["box size (px)", "boxes", *models.values()], rows


def escape_rows(results: dict[str, Any], names: list[str], model: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a model's threshold and escapes by class, on val and test."""
    one, rows = results[model], []
    for name in names:
        cells = [one[split]["line"]["escape_by_class"][name] for split in ("val", "test")]
        tau = one["operating_point"]["thresholds"][name]
        rows.append(
            [name, f"{tau:.3f}", *(f"{c['count']} of {c['pictures']}" for c in cells), str(cells[1]["not_named"])]
        )
    return ["class", "threshold", "escapes on val", "escapes on test", "test pictures without a box of the class"], rows


def tracked(results: dict[str, Any]) -> dict[str, float]:
    """The numbers of a measurement that MLflow gets, few enough to read as columns: group/model/number."""
    numbers: dict[str, float] = {}
    for name in models_in(results):
        one = results[name]
        for split in ("val", "test"):
            numbers |= {f"{split}/{name}/{k}": one[split][k] for k in ("map50", "map50_95", "precision", "recall")}
            for kind in ("escape", "overkill"):
                rate = one[split]["line"][kind]["rate"]
                numbers |= {} if rate is None else {f"{split}/{name}/{kind}": rate}
        last = one.get("last", {}).get("test", {})
        numbers |= {f"test/{name}/{k} of last weights": v for k, v in last.items()}
        numbers |= {f"cost/{name}/{k}": float(one[k]) for k in ("latency_ms", "latency_p95_ms", "params")}
    for measure in ("map50", "map50_95") if "gate" in results else ():
        numbers |= {f"gate/{measure}/{k}": results["gate"][measure][k] for k in ("difference", "low", "high")}
    return numbers


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
    """Header and rows: images and boxes by split; of val and test all labels are used, to choose and to measure."""
    names = summary["names"]
    header = ["split", "images", "labels trained on", *names]
    rows = [
        [
            name,
            str(s["images"]),
            str(s["labelled"]) if name == "train" else "-",
            *(str(s["boxes"][n]) for n in names),
        ]
        for name, s in sorted(summary["splits"].items(), key=lambda split: _ORDER.get(split[0], len(_ORDER)))
        if s["images"]
    ]
    boxes = [str(summary["labelled_boxes"][n]) for n in names]
    rows.append(["trained on", str(summary["labelled_images"]), str(summary["labelled_images"]), *boxes])
    return header, rows


def balance_rows(manifest: Manifest, repeat_threshold: float) -> tuple[list[str], list[list[str]]]:
    """Header and rows: how often each class is labelled, and how much more often repeat factors show it in an epoch."""
    labels = [r.boxes for r in manifest.labelled_rows()]
    shown = np.array(
        [[(b is not None and bool((b[:, CLS] == c).any())) for c in range(len(manifest.names))] for b in labels]
    )
    factors = np.array(repeat_factors(labels, len(manifest.names), repeat_threshold))
    rows = []
    for c, name in enumerate(manifest.names):
        images = int(shown[:, c].sum())
        boxes = sum(int((b[:, CLS] == c).sum()) for b in labels if b is not None)
        seen = f"{factors[shown[:, c]].mean():.2f}" if images else "-"
        rows.append([name, str(images), f"{images / len(labels):.1%}", str(boxes), seen])
    return ["class", "labelled images", "share of them", "labelled boxes", "times an epoch"], rows


def alike(summary: dict[str, Any]) -> str:
    """How many groups of near-duplicates there are, in words."""
    if summary["largest_group"] < 2:
        return "no near-duplicates"
    return f"{summary['groups']} groups of near-duplicates, the largest of {summary['largest_group']} images"


def split_table(summary: dict[str, Any]) -> str:
    """What `prepare` found, for the terminal."""
    header, rows = split_rows(summary)
    bad = ", ".join(f"{n} {reason}" for reason, n in summary["bad_files"].items()) or "none"
    return (
        render("boxes by split and class", header, rows)
        + f"\n{summary['files']} files, {summary['images']} images; set aside: {bad}"
        + f"\n{alike(summary)}; "
        + f"near-duplicates of val or test: {summary.get('left_out', 0)} images left out, and "
        + f"{summary['test_images_with_near_duplicate_in_train']} of the test images still have one among what trains"
        + "".join(f"\nNOTE: {note}" for note in summary.get("notes", []))
    )


def result_table(results: dict[str, Any]) -> str:
    """Models side by side, for the terminal."""
    return render(model_title(results), *model_rows(results)) + f"\n{CHOSEN}\nlatency: {results['latency']['note']}"
