"""Do the unlabelled images pay? Teacher, mean teacher, student and what they are compared with, over data sets and seeds.

    python benchmarks/semi_supervised.py --data cr7-det --label-fraction 0.1 --imgsz 192 --steps 800 --seeds 0 1 2 \
        --teacher yolov8s.pt --student yolov8n.pt --out runs/semi --jobs 2

Several settings at once: give --data, --label-fraction, --imgsz, --steps once for all or once for each setting. Rows run in
--jobs processes side by side, each with one thread; a row that is finished is not run again, one that was stopped goes on
from its checkpoint. `--export DIR` writes a small copy of each data set to carry to another machine; `--table DIR` only
writes the tables. Needs torch, torchvision, ultralytics, pyarrow, pydantic, numpy, scipy, cv2 and pillow; no Ray, no
MLflow.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # the parent must not touch the GPU: children are forked
os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("YOLO_CONFIG_DIR", "/tmp/yolo-config")

from semi_data import all_labels, export
from semi_rows import Row, run_row, with_needs
from semi_table import write_tables

from dfssd.config import Config, Models, Run, Train

DEFAULT_ROWS = [
    "label_only",
    "full",
    "teacher",
    "mean_teacher",
    "full_without_mean_teacher",
    "pseudo_only",
    "distill_model",
    "ceiling",
]
ONE_SEED = ("ceiling",)
POLL_S, SAY_S = 0.2, 15.0


def arguments() -> argparse.Namespace:
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--data", nargs="+", default=[], help="data sets: folders as prepare reads them, or exported ones")
    a.add_argument("--label-fraction", nargs="+", type=float, default=[0.1])
    a.add_argument("--imgsz", nargs="+", type=int, default=[192])
    a.add_argument("--steps", nargs="+", type=int, default=[800], help="of students and teacher")
    a.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="also draw the labelled images")
    a.add_argument("--rows", nargs="+", default=DEFAULT_ROWS)
    a.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all rows, section.key=value")
    a.add_argument("--teacher", default="yolov8s.pt")
    a.add_argument("--student", default="yolov8n.pt")
    a.add_argument("--device", default="cpu")
    a.add_argument("--jobs", type=int, default=1, help="rows side by side")
    a.add_argument("--loaders", type=int, default=0, help="processes that load images, a row")
    a.add_argument(
        "--minutes", type=float, default=0.0, help="stop after this long, with tables of what is there; 0: never"
    )
    a.add_argument("--out", default="runs/semi")
    a.add_argument("--export", default="", help="write reduced copies of the data sets to this folder, and stop")
    a.add_argument("--table", default="", help="write the tables of this folder, and stop")
    return a.parse_args()


@dataclass
class Task:
    """One row of one setting and seed."""

    row: Row
    setting: str
    data: str
    fraction: float
    config: Config
    folder: Path  # of the seed
    device: str
    process: BaseProcess | None = None
    failed: bool = False

    @property
    def name(self) -> str:
        return f"{self.setting}/seed{self.config.run.seed}/{self.row.name}"

    def done(self) -> bool:
        return (self.folder / self.row.folder / "result.json").exists()

    def ready(self, tasks: dict[str, Task]) -> bool:
        own = f"{self.setting}/seed{self.config.run.seed}/"
        return all(tasks[own + n].done() for n in self.row.needs)


def all_tasks(a: argparse.Namespace) -> list[Task]:
    """Rows by order of the settings' first seeds, so that a first answer comes early."""
    tasks = []
    settings = spread(data=a.data, label_fraction=a.label_fraction, imgsz=a.imgsz, steps=a.steps)
    rows = with_needs(a.rows)
    for row in rows:
        for seed in a.seeds:
            if row.base in ONE_SEED and seed != a.seeds[0]:
                continue
            for data, fraction, imgsz, steps in settings:
                setting = f"{Path(data).name}_{fraction:g}_{imgsz}px_{steps}"
                config = Config(
                    run=Run(seed=seed),
                    models=Models(teacher=a.teacher, student=a.student),
                    train=Train(
                        imgsz=imgsz, steps=steps, loader_workers=a.loaders, val_every=max(1, steps // 5), log_every=20
                    ),
                )
                folder = Path(a.out) / setting / f"seed{seed}"
                tasks.append(Task(row, setting, data, fraction, with_settings(config, a.set), folder, a.device))
    return tasks


def spread(**lists: list[Any]) -> list[tuple[Any, ...]]:
    """Settings by place: what is given once holds for all.

    Raises:
        SystemExit: something is given neither once nor as often as the rest.
    """
    most = max(map(len, lists.values()))
    for name, values in lists.items():
        if len(values) not in (1, most):
            raise SystemExit(f"--{name.replace('_', '-')} is given {len(values)} times: give it once, or {most} times")
    return list(zip(*(v if len(v) == most else v * most for v in lists.values()), strict=True))


def copies(a: argparse.Namespace) -> list[tuple[str, int]]:
    """Data sets to copy, each with the side of its images (px).

    Raises:
        SystemExit: two would be written into one folder.
    """
    found: dict[str, tuple[str, int]] = {}
    for one in spread(data=a.data, imgsz=a.imgsz):
        if found.setdefault(Path(one[0]).name, one) != one:
            raise SystemExit(
                f"--export: the copy of {Path(one[0]).name} is of one folder and size: export others to another folder"
            )
    return list(found.values())


def with_settings(config: Config, pairs: list[str]) -> Config:
    """The config with what --set says."""
    from semi_rows import _value, changed

    return changed(config, {k: _value(v) for k, v in (p.split("=", 1) for p in pairs)})


def run_task(task: Task, out: Path) -> None:
    """Body of a child: its output goes to `log.txt` of its row."""
    folder = task.folder / task.row.folder
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / "log.txt").open("a", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        manifest = all_labels(task.data, out / "data" / Path(task.data).name)
        run_row(task.row, task.folder, manifest, task.config, task.fraction, task.device)


def speed(task: Task) -> tuple[int, int, float]:
    """(step, steps, seconds a step) by the last line of a row's log; zeros before the first."""
    log = task.folder / task.row.folder / "log.txt"
    if not log.exists():
        return 0, 0, 0.0
    tail = log.read_text()[-4000:]
    found = re.findall(r"step (\d+)/(\d+) .*?(\d+) ms/step", tail)
    return (int(found[-1][0]), int(found[-1][1]), int(found[-1][2]) / 1000) if found else (0, 0, 0.0)


def execute(tasks: list[Task], a: argparse.Namespace) -> None:
    """Run what is not done, as much side by side as asked for; stop everything when the time is up."""
    out, begun, said = Path(a.out), time.monotonic(), 0.0
    by_name = {t.name: t for t in tasks}
    context = multiprocessing.get_context("fork")
    left = [t for t in tasks if not t.done()]
    print(f"{len(tasks)} rows, {len(tasks) - len(left)} finished before", flush=True)
    while left:
        minutes = (time.monotonic() - begun) / 60
        running = [t for t in left if t.process]
        for task in running:
            assert task.process is not None
            if task.process.is_alive():
                continue
            task.process.join()
            left.remove(task)
            if task.done():
                report(task, minutes)
                write_tables(out)
            else:
                task.failed = True
                print(f"FAILED {task.name}, see {task.folder / task.row.folder / 'log.txt'}", flush=True)
        left = [t for t in left if t.process or not blocked(t, by_name)]
        if a.minutes and minutes > a.minutes:
            for task in left:
                if task.process:
                    task.process.terminate()
            print(f"{minutes:.1f} min: time is up, {len(left)} rows are not finished", flush=True)
            return
        running = [t for t in left if t.process]
        for task in [t for t in left if not t.process and t.ready(by_name)][: a.jobs - len(running)]:
            task.process = context.Process(target=run_task, args=(task, out), daemon=False)
            task.process.start()
        if time.monotonic() - said > SAY_S and running:
            said = time.monotonic()
            say(running, len(left), minutes)
        time.sleep(POLL_S)


def blocked(task: Task, tasks: dict[str, Task]) -> bool:
    """Has something failed that this row needs?"""
    own = f"{task.setting}/seed{task.config.run.seed}/"
    found = any(tasks[own + n].failed for n in task.row.needs)
    task.failed |= found
    return found


def report(task: Task, minutes: float) -> None:
    result = json.loads((task.folder / task.row.folder / "result.json").read_text())
    numbers = ""
    if "best" in result:
        numbers = "  ".join(
            f"{s} {100 * result['best'][s]['map50']:.1f}/{100 * result['best'][s]['map50_95']:.1f}"
            for s in ("val", "test")
        )
    print(f"{minutes:5.1f} min  {task.name}  {numbers}  in {result['seconds']:.0f} s", flush=True)


def say(running: list[Task], left: int, minutes: float) -> None:
    """Speed of all rows together, and how far each is."""
    numbers = [(t, *speed(t)) for t in running]
    rate = sum(1 / s for _, _, _, s in numbers if s)
    where = "  ".join(f"{t.name.split('/', 1)[1]} {k}/{n}" for t, k, n, _ in numbers)
    print(
        f"{minutes:5.1f} min  {left} rows left, {rate:.1f} steps/s over {len(running)} processes: {where}", flush=True
    )


def main() -> None:
    a = arguments()
    if a.table:
        print(write_tables(Path(a.table)))
        return
    if a.export:
        for data, imgsz in copies(a):
            export(data, imgsz, Path(a.export, Path(data).name))
        return
    for data in a.data:
        all_labels(data, Path(a.out, "data", Path(data).name))
    import torch
    import ultralytics.models  # noqa: F401  children are forked with it

    import dfssd.train.loop  # noqa: F401

    assert not torch.cuda.is_initialized(), "forked children could not use the GPU"
    execute(all_tasks(a), a)
    print(write_tables(Path(a.out)))


if __name__ == "__main__":
    main()
