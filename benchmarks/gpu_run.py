"""A whole run on one GPU in a few minutes: a teacher, its pseudo-labels, a student; history and final numbers as JSON.

    python benchmarks/gpu_run.py --minutes 2 --out gpu-results

The real loop and the real labelling, in this process: no Ray, no MLflow. As many steps are made as fit into the time, which
a few steps of each tell. Needs what benchmarks/gpu.py needs; `gpu_run.json` is written again after each part.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu import Enough
from gpu_report import environment
from made_up import MadeUp  # first: it finds the package

from dfssd.pseudo.in_process import label_in_process
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train.in_process import train_in_process
from dfssd.train.loop import train

TEACHER_SHARE = 0.4  # of the time, the student's is the rest
PROBE = 30  # steps that tell how long one takes


def seconds_a_step(made: MadeUp, stage: str, settings: dict[str, Any], probe: int) -> float:
    """Of the last of some first steps, loader and all."""
    seen: list[float] = []

    def log(metrics: dict[str, float], step: int) -> None:
        seen.append(metrics["time/step (s)"])
        if step >= probe:
            raise Enough

    config = made.config(**{**settings, "log_every": max(1, probe // 3), "steps": 10_000, "teacher_steps": 10_000})
    try:
        train(made.job(config, stage), WorkerGroup(), made.device, log, lambda *_: None)
    except Enough:
        return seen[-1]
    raise AssertionError("the loop ended before its log did")


def run(
    made: MadeUp, settings: dict[str, Any], minutes: float, quick: bool, write: Callable[[dict[str, Any]], None]
) -> None:
    """Teacher, labelling, student; `write` takes what is there after each."""
    found: dict[str, Any] = {"environment": environment(made.device), "settings": settings}
    for stage, share in (("teacher", TEACHER_SHARE), ("student", 1 - TEACHER_SHARE)):
        each = seconds_a_step(made, stage, settings, 2 if quick else PROBE)
        steps = 4 if quick else max(100, round(60 * minutes * share / each))
        config = made.config(**settings | {"steps": steps, "teacher_steps": steps, "val_every": max(1, steps // 4)})
        begun = time.monotonic()
        result = train_in_process(made.job(config, stage), made.device)
        history = made.job(config, stage).store.read_json("history.json")
        found[stage] = {"seconds": time.monotonic() - begun, "result": result, "history": history}
        write(found)
        if stage == "teacher":
            made.run.delete("pseudo")
            begun = time.monotonic()
            summary = label_in_process(config, made.run, "pseudo", made.manifest, ["teacher/best.pt"], made.device)
            found["pseudo"] = {"seconds": time.monotonic() - begun, "summary": summary}
            write(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--minutes", type=float, default=2.0, help="of training; images, labelling and starts come on top"
    )
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch", type=int, default=32, help="labelled images a step; as many unlabelled ones on top")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run")
    parser.add_argument("--out", default="gpu-results")
    o = parser.parse_args()
    logging.getLogger("ultralytics").setLevel(logging.ERROR)
    out = Path(o.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {"imgsz": 64, "batch": 2, "loader_workers": 0} if o.quick else {"imgsz": o.imgsz, "batch": o.batch}
    images, size = (24, (80, 64)) if o.quick else (1024, (1024, 768))

    def write(found: dict[str, Any]) -> None:
        (out / "gpu_run.json").write_text(json.dumps(found, indent=2, default=str))

    with tempfile.TemporaryDirectory(prefix="dfssd-gpu-run-") as folder:
        teacher = "yolov8n.yaml" if o.quick else "yolov8s.yaml"
        made = MadeUp(Path(folder), torch.device(o.device), images, size, teacher=teacher)
        run(made, settings, o.minutes, o.quick, write)


if __name__ == "__main__":
    main()
