"""Sweeps under a search with early stopping, with trials that fail, of two workers each, and one that is only planned."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small import SWEEP_BASE

from dfssd.runtime.storage import Storage
from dfssd.sweep.driver import records, stopped

ROOT = Path(__file__).parents[2]
SEARCH = """
from ray import tune
SPACE = {"distill.share_f": tune.loguniform(0.05, 2.0), "distill.lambda_u": tune.uniform(0.2, 2.0)}
SEARCH, TRIALS, SCHEDULER, GRACE, REDUCTION, METRIC = "optuna", 4, "asha", 0.25, 2, "val/map50"
"""
ROWS = 'ROWS = {"labels alone": {"method": "label_only"}, "wrong": {"distill.taps": (99,)}, "pkd": {"distill.share_f": 0.4}}'
TWO = 'ROWS = {"labels alone": {"method": "label_only"}, "pkd": {"distill.share_f": 0.4}}'

pytestmark = pytest.mark.slow  # some six minutes


def sweep(storage: Path, strip: Path, text: str, *more: str) -> subprocess.CompletedProcess:
    (storage / "own.py").write_text(SWEEP_BASE + text)
    command = [sys.executable, str(ROOT / "jobs/sweep.py"), str(storage / "own.py"), "--data", str(strip), *more]
    command += ["--storage-path", str(storage), "--run-name", "s", "--gpu", "never"]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env={**os.environ})


def test_a_search_goes_on_with_what_it_has_learned(strip, tmp_path):
    done = sweep(tmp_path, strip, SEARCH)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    storage = Storage(str(tmp_path))
    full, early = records(storage, "s"), stopped(storage, "s")
    assert len(full) + len(early) == 4 and full
    assert f"{len(early)} trials stopped early" in done.stdout
    assert all(r["reports"][-1]["step"] < 12 and set(r["settings"]) == set(full[0]["settings"]) for r in early)
    assert "| share_f" in (tmp_path / "s" / "table.md").read_text()
    again = sweep(tmp_path, strip, SEARCH)
    assert again.returncode == 0 and "student: starts" not in again.stdout, "all have ended, the stopped ones too"
    lost = full[0]["trial"]
    shutil.rmtree(tmp_path / "s" / "trials" / lost)
    more = sweep(tmp_path, strip, SEARCH)
    assert more.returncode == 0 and "4 trials, 3 of them ended before" in more.stdout, more.stdout[-3000:]
    assert len(records(storage, "s")) + len(stopped(storage, "s")) == 4
    assert not (tmp_path / "s" / "trials" / lost).exists(), "another point, drawn after what is known"


def test_a_trial_that_cannot_work_is_tried_once_and_the_others_run(strip, tmp_path):
    done = sweep(tmp_path, strip, ROWS)
    assert done.returncode == 2, done.stdout[-3000:] + done.stderr[-3000:]
    assert "1 trials failed" in done.stderr and "wrong, seed 0" in done.stderr and "99" in done.stderr
    assert (done.stdout + done.stderr).count("student: starts") == 2, "the wrong one once, the other once"
    assert "RayTaskError" not in done.stderr, (
        "Tune would have tried again; lines of a trial that dies at once may be lost"
    )
    assert {r["row"] for r in records(Storage(str(tmp_path)), "s")} == {"labels alone", "pkd"}
    assert (tmp_path / "s" / "table.md").exists()


def test_trials_of_two_workers(strip, tmp_path):
    done = sweep(tmp_path, strip, TWO, "--num-workers", "2")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = records(Storage(str(tmp_path)), "s")
    assert len(found) == 2 and all([r["step"] for r in one["reports"]] == [3, 6, 9, 12] for one in found)


def test_a_dry_run_says_what_it_would_do(strip, tmp_path):
    done = sweep(tmp_path, strip, ROWS, "--dry-run")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for text in ("3 trials", "labels alone", "1 x dataset, 1 x teacher, 1 x pseudo", "at a time, each 1 worker(s)"):
        assert text in done.stdout
    assert "steps alone take about 0:" in done.stdout
    assert not (tmp_path / "s" / "trials").exists() and not (tmp_path / "s" / "sweep.json").exists()
