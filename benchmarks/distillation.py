"""The table of docs/results.md on distillation: each term on top of the pseudo-label row, same steps in all.

    python benchmarks/distillation.py --data DIR --storage-path runs/distillation

The teacher is a YOLOv8s trained on labels and pseudo-labels for twice the steps: a teacher that knows no more than its
student has nothing to teach. All rows learn from the same pseudo-labels (teacher and two label-only students, hard, `gmm`);
weights follow `--balance gradnorm`, so that no divergence wins by its scale. Ultralytics' own distillation gets the same
teacher, optimiser, weight average, steps and size: on the labelled images, as it is made for, and once with our
pseudo-labels as label files. Stopped and started again it goes on where it was.
"""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import pseudo_labels as p
import tyro
from matplotlib.figure import Figure

FULL = ["--divergence", "pkd", "--lambda-p", "1", "--lambda-l", "1", "--lambda-f", "1"]


@dataclass
class Settings(p.Settings):
    """What all rows have in common."""

    storage_path: str = "runs/distillation"
    """Folder for all runs."""
    steps: int = 800
    """Optimiser steps of every row; the teacher of the distillation gets twice as many."""
    imgsz: int = 128
    """Side of the network input (px)."""
    val_every: int = 200
    """Steps between two validations."""
    full: list[str] = field(default_factory=lambda: list(FULL))
    """Settings of the row with all terms."""
    only: list[str] = field(default_factory=list)
    """Names of rows to run, with what they need; none: all."""


def base_row(s: Settings, seed: int) -> p.Row:
    """Pseudo-labels alone: what every term is added to."""
    return p.student(s, "labels and pseudo-labels", _run("gmm", seed), seed, ["--threshold-policy", "gmm", *p.HARD])


def oracle_row(s: Settings) -> p.Row:
    """All labels at the same steps, in the same batches: the base row with true boxes where it has pseudo-labels."""
    flags = [*p.HARD, "--threshold-policy", "fixed", "--lambda-p", "0", "--lambda-l", "0", "--lambda-f", "0"]
    commands = [["benchmarks/oracle_labels"], ["distill", *p.train_flags(s, 0), *flags]]
    return p.Row("all labels: true boxes for pseudo-labels", "oracle", "student", commands, ["data"], ["base/dataset"])


def teacher_row(s: Settings) -> p.Row:
    """The teacher that all rows are distilled from."""
    longer = Settings(**{**s.__dict__, "steps": 2 * s.steps, "val_every": 2 * s.val_every})
    flags = ["--student", "yolov8s.yaml", "--threshold-policy", "gmm", *p.HARD]
    return p.student(longer, "teacher: YOLOv8s on the same, twice the steps", "kd_teacher", 0, flags)


def distilled(s: Settings, title: str, run: str, seed: int, flags: list[str], labels: list[str] = p.HARD) -> p.Row:
    """The base row with distillation; `labels` says how pseudo-labels are used."""
    teacher = f"{s.storage_path}/kd_teacher/student/best.pt"
    common = ["--threshold-policy", "gmm", *labels, "--balance", "gradnorm", "--distill-teacher", teacher]
    command = ["distill", *p.train_flags(s, seed), *common, *flags]
    copies = ["base/dataset", "ensemble/pseudo"]
    return p.Row(title, run, "student", [command], ["ensemble", "kd_teacher"], copies)


def stock(s: Settings, title: str, run: str, seed: int, flags: list[str]) -> p.Row:
    """Ultralytics' own distillation."""
    teacher = f"{s.storage_path}/kd_teacher/student/best.pt"
    cpus = max(1, (os.cpu_count() or 1) // s.lanes)
    own = f"--imgsz {s.imgsz} --steps {s.steps} --seed {seed} --threads {cpus} --close-mosaic {s.close_mosaic}".split()
    command = ["benchmarks/ultralytics_distill", *own, "--teacher", teacher, *flags]
    return p.Row(title, run, "stock", [command], ["ensemble", "kd_teacher"], ["base/dataset", "ensemble/pseudo"])


def all_rows(s: Settings) -> list[p.Row]:
    """Everything, in the order in which it should run."""
    first = {r.run: r for r in p.first_rows(s)}
    rows = [first[n] for n in ("base", "label_only_0", "label_only_1", "ensemble")]
    rows += [teacher_row(s), *(base_row(s, seed) for seed in range(s.seeds)), first["label_only_2"], oracle_row(s)]
    features = ["--lambda-p", "0", "--lambda-l", "0", "--lambda-f", "1"]
    for kind in ("pkd", "hw_js", "mse", "score_l2"):
        rows.append(distilled(s, f"+ features, {kind}", f"kd_{kind}", 0, [*features, "--divergence", kind]))
    alone = ["--lambda-f", "0"]
    rows.append(distilled(s, "+ class term", "kd_cls", 0, [*alone, "--lambda-p", "1", "--lambda-l", "0"]))
    rows.append(distilled(s, "+ localisation term", "kd_loc", 0, [*alone, "--lambda-p", "0", "--lambda-l", "1"]))
    title, ours = "full: features, class and localisation term", "Ultralytics distill_model, labelled images"
    for seed in range(s.seeds):
        rows.append(distilled(s, title, _run("kd_full", seed), seed, s.full))
        rows.append(stock(s, ours, _run("stock", seed), seed, []))
    rows.append(stock(s, "Ultralytics distill_model, our pseudo-labels as labels", "stock_pseudo", 0, ["--pseudo"]))
    title = "full, soft weights, uncertain boxes ignored (the defaults)"
    rows.append(distilled(s, title, "kd_soft", 0, s.full, p.SOFT))
    rows.append(distilled(s, "full, fp32", "kd_full_fp32", 0, [*s.full, "--amp", "fp32"]))
    boxes = [*s.full, "--box-loss", "inner_focaler_eiou"]
    rows.append(distilled(s, "full, box loss inner_focaler_eiou", "kd_full_box", 0, boxes))
    return rows


def _run(name: str, seed: int) -> str:
    return name if seed == 0 else f"{name}_{seed}"


def chosen(s: Settings, rows: list[p.Row]) -> list[p.Row]:
    """The rows that were asked for and what they need."""
    if not s.only:
        return rows
    by_name, wanted = {r.run: r for r in rows}, set()
    unknown = [n for n in s.only if n not in by_name]
    if unknown:
        raise SystemExit(f"no such row: {', '.join(unknown)}; there are {', '.join(by_name)}")
    todo = list(s.only)
    while todo:
        name = todo.pop()
        wanted.add(name)
        todo += [n for n in by_name[name].needs if n != "data"]
    return [r for r in rows if r.run in wanted]


def table(s: Settings, rows: list[p.Row]) -> str:
    """Markdown: one line a title; gains are against the base row, where a row's seeds are those of the base paired."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for row in (r for r in rows if r.model):
        results.setdefault(row.title, {})[row.run] = p.measured(s, row)
    base = [100 * r["map50"] for r in results["labels and pseudo-labels"].values()]
    lines = [
        "| row | seeds | val mAP50-95 | test mAP50 | test mAP50-95 | against the base row's same seeds |",
        "|---|---|---|---|---|---|",
    ]
    for title, runs in results.items():
        values = list(runs.values())
        cells = [_cell([100 * v[k] for v in values]) for k in ("val", "map50", "map50_95")]
        gains = [100 * v["map50"] - b for v, b in zip(values, base, strict=False)]
        gain = "" if title == "labels and pseudo-labels" else f"{statistics.mean(gains):+.1f}"
        lines.append(f"| {title} | {len(values)} | {' | '.join(cells)} | {gain} |")
    return "\n".join(lines)


def figure(s: Settings, rows: list[p.Row]) -> Figure:
    """Test mAP50 of every row, a dot a seed, with the base row's mean as a line and its seeds' range as a band."""
    points: dict[str, list[float]] = {}
    for row in (r for r in rows if r.run.startswith(("gmm", "kd_", "stock"))):
        points.setdefault(row.title, []).append(100 * p.measured(s, row)["map50"])
    base = points["labels and pseudo-labels"]
    canvas = Figure(figsize=(9, 0.42 * len(points) + 1), layout="constrained")
    axes = canvas.add_subplot()
    axes.axvspan(min(base), max(base), color="0.9", label="range of the base row's seeds")
    axes.axvline(statistics.mean(base), color="0.5", linewidth=1)
    for k, (title, values) in enumerate(points.items()):
        colour = "C3" if title.startswith("Ultralytics") else "0.4" if k < 2 else "C0"
        axes.plot(values, [k] * len(values), "o", color=colour, alpha=0.8)
    axes.set(yticks=range(len(points)), yticklabels=list(points), xlabel="test mAP50 (%), a dot a seed")
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.92")
    axes.legend(loc="lower left", fontsize=8, frameon=False)
    return canvas


def _cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main() -> None:
    s = tyro.cli(Settings, description=__doc__)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    s.storage_path = str(Path(s.storage_path).absolute())
    rows = chosen(s, all_rows(s))
    p.execute(s, rows)
    if s.only:
        return
    figure(s, rows).savefig(Path(s.storage_path, "distillation.png"), dpi=130)
    text = table(s, rows)
    Path(s.storage_path, "distillation.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
