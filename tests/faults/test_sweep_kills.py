"""A sweep under each scheduler: a trial's process and then the driver are killed, and the same command ends it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from held import MARK, end_all
from small import SWEEP_BASE

from dfssd.runtime.storage import Storage
from dfssd.sweep.driver import records, stopped

ROOT = Path(__file__).parents[2]
AXES = """
from ray import tune
SPACE = {"distill.share_f": tune.loguniform(0.05, 2.0), "distill.lambda_u": tune.uniform(0.2, 2.0)}
"""
SCHEDULERS = {
    "asha": 'SEARCH, TRIALS, SCHEDULER, GRACE, REDUCTION, METRIC = "optuna", 3, "asha", 0.25, 2, "val/map50"\n',
    "pbt": 'SEARCH, TRIALS, SCHEDULER, PERTURB = "random", 3, "pbt", 0.5\n',
}


def _start(storage, strip, log):
    command = [sys.executable, str(ROOT / "jobs/sweep.py"), str(storage / "own.py"), "--data", str(strip)]
    command += ["--storage-path", str(storage), "--run-name", "s", "--gpu", "never"]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", MARK: str(storage)}
    with log.open("w") as stream:
        return subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env=env)


def _until(text, process, log, limit_s=240):
    """The first match of a pattern in the log."""
    deadline = time.monotonic() + limit_s
    while not (found := re.search(text, log.read_text())):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
    return found


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_a_trial_and_the_driver_are_killed_and_the_same_command_ends_it(strip, tmp_path, scheduler):
    from mlflow import MlflowClient

    (tmp_path / "own.py").write_text(SWEEP_BASE + AXES + SCHEDULERS[scheduler])
    first, second = tmp_path / "log1", tmp_path / "log2"
    process = _start(tmp_path, strip, first)
    try:
        pid = int(_until(r"pid=(\d+)[^\n]*student: step 3  val", process, first).group(1))
        psutil.Process(pid).send_signal(signal.SIGKILL)
        _until(rf"(?s)student: step 3  val.*pid=(?!{pid})\d+[^\n]*student: (resumed|step)", process, first)
        _until(r"sweep: 1/\d+ trials", process, first)
    finally:
        process.kill()
        process.wait()
        end_all(str(tmp_path))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("s/trials/*/result.json")}
    process = _start(tmp_path, strip, second)
    assert process.wait(timeout=600) == 0, second.read_text()[-4000:]
    storage = Storage(str(tmp_path))
    full, early = records(storage, "s"), stopped(storage, "s")
    assert full and (len(full) + len(early) == 3 if scheduler == "asha" else len(full) == 3), second.read_text()[-3000:]
    assert all(path.stat().st_mtime_ns == written for path, written in before.items()), "what had ended stays"
    assert all([r["step"] for r in one["reports"]][-1] == 12 for one in full)
    for one in full:
        steps = [
            h["step"] for h in storage.read_json(f"s/trials/{one['trial']}/student/history.json") if "loss/total" in h
        ]
        assert steps == list(range(1, 13)), "each step once"
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("dfssd").experiment_id], "tags.kind = 'trial'")
    trials = [r.data.tags["trial"] for r in runs]
    assert len(trials) == len(set(trials)), "one MLflow run a trial"
    assert {one["trial"] for one in full} <= {r.data.tags["trial"] for r in runs if r.info.status == "FINISHED"}
