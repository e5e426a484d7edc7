"""Kills at random moments, from a seed, over one run: it ends with the weights of a run that nobody touched.

CHAOS_KILLS (default 30), CHAOS_SEED and CHAOS_JOB (pipeline, or label_only for a short one) choose what is done; what came of
it is printed: victims, seconds until the run was further than before, steps lost.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from dfssd.models.yolo.detector import read_detector

ROOT = Path(__file__).parents[2]
KILLS, SEED = int(os.environ.get("CHAOS_KILLS", "30")), int(os.environ.get("CHAOS_SEED", "0"))
JOB = os.environ.get("CHAOS_JOB", "pipeline")
STEPS = 40
WORKERS = ("RayTrainWorker", "MapWorker", "raylet", "ray::measure")


def _commands(strip, storage):
    place = ["--storage-path", str(storage), "--run-name", "c"]
    train = "--imgsz 64 --batch 4 --val-every 5 --log-every 1 --num-workers 1 --gpu never --amp fp32"
    train = [*train.split(), "--steps", str(STEPS), "--student", "yolov8n.yaml"]
    data = ["--data", str(strip), "--label-fraction", "0.4"]
    if JOB == "label_only":
        return [["prepare.py", *data, *place], ["teacher.py", "--role", "label_only", *train, *place]]
    more = ["--teacher", "yolov8n.yaml", "--teacher-steps", str(STEPS), "--teacher-amp", "fp32", "--tta", "none"]
    return [["pipeline.py", *data, *train, *more, *place]]


def _start(command, log):
    words = [sys.executable, str(ROOT / "jobs" / command[0]), *command[1:]]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)


def _position(text):
    """How far a log got: (finished stages, step)."""
    steps = re.findall(r": step (\d+)/", text)
    return len(re.findall(r": finished ", text)), int(steps[-1]) if steps else 0


def _end(process):
    """Kill a driver and what it started, as the loss of its machine would."""
    family = [process, *(psutil.Process(process.pid).children(recursive=True) if process.poll() is None else [])]
    for one in family:
        try:
            one.kill()
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    process.wait()


def _kill_one(process, rng):
    """Kill a worker or the object store's process of this driver, or the driver with all; who it was."""
    family = psutil.Process(process.pid).children(recursive=True)
    victims = [p for p in family if any(word in " ".join(p.cmdline()) for word in WORKERS)]
    if victims and rng.random() < 0.5:
        victim = rng.choice(victims)
        name = next(word for word in WORKERS if word in " ".join(victim.cmdline()))
        victim.send_signal(signal.SIGKILL)
        return name
    _end(process)
    return "driver"


def _with_kills(commands, folder, rng, kills):
    """Run the commands to their end, with so many kills on the way; a record for each."""
    records, number = [], 0
    for command in commands:
        while True:
            number += 1
            path = folder / f"log{number}"
            with path.open("w") as log:
                process = _start(command, log)
                try:
                    while process.poll() is None and len(records) < kills:
                        wanted = _position(path.read_text()), time.monotonic() + rng.uniform(5, 60)
                        while process.poll() is None and time.monotonic() < wanted[1]:
                            time.sleep(0.2)
                        if process.poll() is None:
                            at = _position(path.read_text())
                            records.append({"victim": _kill_one(process, rng), "at": at, "log": number})
                            print("chaos:", records[-1], flush=True)
                    code = process.wait(timeout=1500)
                finally:
                    if process.poll() is None:
                        _end(process)
            if code == 0:
                break
            said = path.read_text()
            assert "Traceback" not in said.partition("error: ")[2], said[-3000:]
            assert number < kills + 25, said[-3000:]
    return records


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(4 * 3600)
def test_a_run_that_is_killed_again_and_again_ends_with_equal_weights(strip, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    _with_kills(_commands(strip, whole), whole, random.Random(SEED), 0)
    records = _with_kills(_commands(strip, broken), broken, random.Random(SEED), KILLS)
    assert len(records) == KILLS, "the run ended before all kills: raise STEPS"
    models = [p.parent.name for p in sorted((whole / "c").glob("*/best.pt"))]
    assert models
    for model in models:
        for name in ("best.pt", "last.pt"):
            a, b = ((f / "c" / model / name).read_bytes() for f in (whole, broken))
            first, second = read_detector(a, name).state_dict(), read_detector(b, name).state_dict()
            assert all(torch.equal(first[k], second[k]) for k in first), f"{model}/{name}"
        steps = [
            sorted({h["step"] for h in json.loads((f / "c" / model / "history.json").read_text()) if "loss/total" in h})
            for f in (whole, broken)
        ]
        assert steps[0] == steps[1] == list(range(1, STEPS + 1))
    _once_in_mlflow(broken, models)


def _once_in_mlflow(storage, models):
    """One run a stage, each step once, ended."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("dfssd").experiment_id
    stages = [r for r in client.search_runs([experiment]) if "stage" in r.data.tags]
    for model in models:
        own = [r for r in stages if r.data.tags["stage"] == model]
        assert len(own) == 1 and own[0].info.status == "FINISHED", model
        logged = [row.step for row in client.get_metric_history(own[0].info.run_id, "loss/total")]
        assert sorted(logged) == list(range(1, STEPS + 1)), f"{model}: each step once"
