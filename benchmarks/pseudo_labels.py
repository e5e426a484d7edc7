"""The table of docs/results.md on pseudo-labels: policies against labels alone and against all labels, same steps.

    python benchmarks/pseudo_labels.py --data DIR --storage-path runs/results

Every row is one run of the jobs of this repository in a process of its own; rows share data set, teacher and candidates
by copying those artefacts, which the stages check by digest. Stopped and started again it goes on where it was. Distillation
is off (lambda_p = lambda_l = lambda_f = 0): this is about pseudo-labels alone.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from dfssd.config import Config, Run, Train
from dfssd.config.choices import POLICIES
from dfssd.evaluate.measure import measure
from dfssd.runtime.storage import Storage

ROOT = Path(__file__).resolve().parent.parent
HARD = ["--score-power", "0", "--uncertain", "background"]
SOFT = ["--score-power", "1", "--uncertain", "ignore"]


@dataclass
class Settings:
    """What all rows have in common."""

    data: str
    """Folder of the data set."""
    storage_path: str = "runs/results"
    """Folder for all runs."""
    labels_per_class: int = 2
    """Labelled images a class."""
    steps: int = 1200
    """Optimiser steps of every row."""
    imgsz: int = 160
    """Side of the network input (px)."""
    seeds: int = 3
    """Seeds of the first row and of the best one."""
    lanes: int = 2
    """Rows at a time; the CPUs are shared evenly."""
    val_every: int = 300
    """Steps between two validations."""
    close_mosaic: float = 0.3
    """Share of the steps, at the end, without mosaic."""


@dataclass
class Row:
    """One line of the table: commands to run in order, and the model to measure.

    A command is a job of this repository, or the path of a script that takes --storage-path and --run-name likewise.
    """

    title: str
    run: str
    model: str
    commands: list[list[str]]
    needs: list[str] = field(default_factory=list)  # runs that must be finished
    copies: list[str] = field(default_factory=list)  # artefacts to take over from other runs, as run/artefact


def train_flags(s: Settings, seed: int) -> list[str]:
    """Flags of every training."""
    cpus = max(1, (os.cpu_count() or 1) // s.lanes)
    flags = f"--imgsz {s.imgsz} --steps {s.steps} --seed {seed} --cpus-per-worker {cpus} --log-every 100"
    return f"{flags} --val-every {s.val_every} --close-mosaic {s.close_mosaic}".split()


def student(s: Settings, title: str, run: str, seed: int, flags: list[str]) -> Row:
    """A student on pseudo-labels alone."""
    off = ["--lambda-p", "0", "--lambda-l", "0", "--lambda-f", "0"]
    command = ["distill", *train_flags(s, seed), *off, *flags]
    return Row(title, run, "student", [command], needs=["ensemble"], copies=["base/dataset", "ensemble/pseudo"])


def first_rows(s: Settings) -> list[Row]:
    """All rows that do not depend on which policy is best."""
    few = ["prepare", "--data", s.data, "--labels-per-class", str(s.labels_per_class)]
    flags = train_flags(s, 0)
    label = ["pseudo_label", "--imgsz", str(s.imgsz)]
    rows = [Row("teacher (YOLOv8s, labels alone)", "base", "teacher", [few, ["teacher", *flags], label])]
    for seed in range(s.seeds):
        alone = ["teacher", "--role", "label_only", *train_flags(s, seed)]
        rows.append(Row("label-only student", f"label_only_{seed}", "label_only", [alone], ["data"], ["base/dataset"]))
    # Not the teacher alone: on a handful of labels it is no better than its students, and together they know more.
    files = [
        f"{s.storage_path}/{run}/best.pt"
        for run in ("base/teacher", "label_only_0/label_only", "label_only_1/label_only")
    ]
    label = [*label, "--label-teachers", *files]
    rows.append(Row("", "ensemble", "", [label], ["base", "label_only_0", "label_only_1"], ["base/dataset"]))
    every = ["prepare", "--data", s.data, "--label-fraction", "1.0"]
    ceiling = [every, ["teacher", "--role", "label_only", *flags]]
    rows.append(Row("ceiling: all labels", "ceiling", "label_only", ceiling))
    for policy in POLICIES:
        title = f"+ pseudo-labels, {policy}" + (" 0.5" if policy == "fixed" else "")
        rows.append(student(s, title, policy, 0, ["--threshold-policy", policy, *HARD]))
    return rows


def execute(s: Settings, rows: list[Row]) -> None:
    """Run all rows, `lanes` at a time, each as soon as what it needs is finished.

    Raises:
        SystemExit: a row failed; its log says why.
    """
    storage, lock = Path(s.storage_path), threading.Condition()
    waiting, finished, failed = list(rows), {r.name for r in storage.glob("*") if (r / "row.done").exists()}, []

    def ready(row: Row) -> bool:
        have_data = (storage / "base" / "dataset" / "stage.json").exists()
        return all(n in finished or (n == "data" and have_data) for n in row.needs)

    def lane() -> None:
        while True:
            with lock:
                while not failed and waiting and not any(ready(r) for r in waiting):
                    lock.wait(5)
                if failed or not waiting:
                    return
                row = next(r for r in waiting if ready(r))
                waiting.remove(row)
            ok = run_row(storage, row)
            with lock:
                (finished.add if ok else failed.append)(row.run)
                lock.notify_all()

    threads = [threading.Thread(target=lane) for _ in range(s.lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; see {storage}/*/row.log")


def run_row(storage: Path, row: Row) -> bool:
    """Run the commands of a row, its output to `row.log`; True where all of them succeeded."""
    folder = storage / row.run
    if (folder / "row.done").exists():
        return True
    folder.mkdir(parents=True, exist_ok=True)
    for name in row.copies:
        source, target = Storage(str(storage / name)), Storage(str(folder / name.split("/")[1]))
        for file in source.files():
            if not target.exists(file):
                target.write(file, source.read(file))
    begun = time.monotonic()
    with (folder / "row.log").open("a") as log:
        for job, *flags in row.commands:
            where = ["--storage-path", str(storage), "--run-name", row.run]
            script = ROOT / (f"{job}.py" if "/" in job else f"jobs/{job}.py")
            command = [sys.executable, str(script), *where, *flags]
            if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT).returncode:
                return False
    minutes = (time.monotonic() - begun) / 60
    (folder / "row.done").write_text(f"{minutes:.1f} min\n")
    print(f"{row.run}: {minutes:.1f} min", flush=True)
    return True


def measured(s: Settings, row: Row) -> dict[str, float]:
    """Test mAP50 and mAP50-95 of a finished row, and its best val mAP50-95."""
    run = Storage(s.storage_path).at(row.run)
    if not run.exists("row.json"):
        config = Config(run=Run(gpu="never"), train=Train(imgsz=s.imgsz))
        test = measure(config, run.uri, [row.model], max(1, (os.cpu_count() or 1) // s.lanes))[row.model]["test"]
        best = run.read_json(f"{row.model}/stage.json")["summary"]["best"]["map50_95"]
        run.write_json("row.json", {"map50": test["map50"], "map50_95": test["map50_95"], "val": best})
    return dict(run.read_json("row.json"))


def best_on_val(s: Settings, rows: list[Row]) -> Row:
    """The row whose model reached the highest val mAP50-95."""
    best = max(rows, key=lambda r: measured(s, r)["val"])
    print(f"best on val among {', '.join(r.run for r in rows)}: {best.run}", flush=True)
    return best


def table(s: Settings, rows: list[Row]) -> str:
    """Markdown: one line a title, mean and standard deviation over its seeds, share of the gap that it closes."""
    by_title: dict[str, list[dict[str, float]]] = {}
    for row in (r for r in rows if r.model):
        by_title.setdefault(row.title, []).append(measured(s, row))
    low, high = (
        statistics.mean(r["map50"] for r in by_title[t]) for t in ("label-only student", "ceiling: all labels")
    )
    lines = [
        "| row | seeds | test mAP50 | test mAP50-95 | against label-only | share of the gap |",
        "|---|---|---|---|---|---|",
    ]
    for title, results in by_title.items():
        cells = []
        for key in ("map50", "map50_95"):
            values = [100 * r[key] for r in results]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        gain = statistics.mean(r["map50"] for r in results) - low
        own = title == "label-only student"
        share = "" if own or title.startswith("teacher") else f"{100 * gain / max(high - low, 1e-9):.0f} %"
        lines.append(
            f"| {title} | {len(results)} | {' | '.join(cells)} | {'' if own else f'{100 * gain:+.1f}'} | {share} |"
        )
    return "\n".join(lines)


def main() -> None:
    s = tyro.cli(Settings, description=__doc__)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    s.storage_path = str(Path(s.storage_path).absolute())
    rows = first_rows(s)
    execute(s, rows)
    hard = best_on_val(s, [r for r in rows if r.run in POLICIES])
    title = f"+ pseudo-labels, {hard.run}, soft weights, uncertain boxes ignored"
    soft = student(s, title, "soft", 0, ["--threshold-policy", hard.run, *SOFT])
    execute(s, [soft])
    best = best_on_val(s, [hard, soft])
    flags = ["--threshold-policy", hard.run, *(SOFT if best is soft else HARD)]
    seeds = [student(s, best.title, f"{best.run}_{seed}", seed, flags) for seed in range(1, s.seeds)]
    execute(s, seeds)
    order = [r for r in rows if r.run.startswith("label_only")] + [r for r in rows if r.run in POLICIES]
    text = table(s, [*order, soft, *seeds, *(r for r in rows if r.run in ("base", "ceiling"))])
    Path(s.storage_path, "table.md").write_text(text + "\n")
    print(text)
    for run, who in (("base", "teacher"), ("ensemble", "teacher and two label-only students")):
        quality = Storage(s.storage_path).read_json(f"{run}/quality/quality.json")["candidates_ap50"]
        print(f"candidates of {who}: " + ", ".join(f"mAP50 {v:.3f} against {k}" for k, v in quality.items()))


if __name__ == "__main__":
    main()
