"""SIGTERM to each job as a user, or a scheduler, sends it: it ends by itself with how to go on, and goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from held import held
from small import SWEEP_BASE

from dfssd.cli import main
from dfssd.data.synthetic import make_dataset

ROOT = Path(__file__).parents[2]
SIZE = ["--imgsz", "64", "--batch", "4", "--log-every", "1", "--amp", "fp32", "--gpu", "never"]
TRAINING = [*SIZE, "--num-workers", "1", "--steps", "6", "--val-every", "3", "--teacher", "yolov8n.yaml"]
JOBS = [  # the job, its flags, what its log says once it is at work, and the stage that is then unfinished
    ("prepare", ["--label-fraction", "0.1"], "dataset: starts", "dataset"),
    ("teacher", [*TRAINING, "--teacher-steps", "200"], "teacher: step 8/", "teacher"),
    ("pseudo_label", ["--imgsz", "64", "--gpu", "never", "--num-actors", "1"], "labelling actor(s)", "pseudo"),
    ("evaluate", ["--imgsz", "64", "--gpu", "never", "--latency-repeats", "3"], "report: starts", "report"),
]
SPACE = 'ROWS = {"labels alone": {"method": "label_only"}, "distilled": {"method": "distill"}}'


def _start(storage, log, job, flags):
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *flags]
    command += ["--storage-path", str(storage), "--run-name", "s" if job == "sweep" else "r"]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as stream:
        return subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env=env)


def _terminated(storage, log, job, flags, reached, after_s=0.5):
    """Send SIGTERM once the log says so; what it said until it ended."""
    process = _start(storage, log, job, flags)
    deadline = time.monotonic() + 240
    while reached not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
    time.sleep(after_s)
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    code = process.wait(timeout=90)
    waited, said = time.monotonic() - begun, log.read_text()
    print(f"{job}: ended {waited:.1f} s after SIGTERM with {code}", flush=True)
    assert code in (130, 2) and waited < 30, said[-3000:]
    assert "the same command goes on from" in said, said[-3000:]
    return said


def test_the_first_signal_is_an_orderly_end(capsys):
    before, given_back = signal.getsignal(signal.SIGTERM), []

    def job():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)
        finally:
            given_back.append("lease")

    try:
        with pytest.raises(SystemExit) as ended:
            main(job)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 130 and given_back
    assert "the same command goes on from here" in capsys.readouterr().err


SLOW = """
import atexit, os, signal, time
from dfssd import cli
from dfssd.runtime import cluster

def job():
    cluster.connect()
    atexit.register(lambda: time.sleep(5))  # what is stored at the end
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

cli.main(job)
"""


@pytest.mark.slow  # it starts Ray
@pytest.mark.faults
def test_a_job_may_take_its_time_to_end_where_ray_runs():
    done = subprocess.run(
        [sys.executable, "-c", SLOW], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == 130 and b"the same command goes on from here" in done.stderr, done.stderr[-2000:]
    assert b"*** SIGTERM received" not in done.stderr, "Ray's stack trace"


HALF = """
import os, signal, threading
from dfssd import cli
from dfssd.runtime import cluster

def job():
    cluster._started = threading.Event()  # a Ray that never gets ready
    cluster.connect = lambda: None
    os.kill(os.getpid(), signal.SIGTERM)
    cluster._started.wait(60)

cli.HALF_STARTED_S = 0.2
import atexit
atexit.register(lambda: os.abort())  # as the end of an interpreter with half a Ray may
cli.main(job)
"""


@pytest.mark.slow  # it imports Ray
@pytest.mark.faults
def test_a_job_that_is_interrupted_while_ray_starts_does_not_abort():
    done = subprocess.run(
        [sys.executable, "-c", HALF], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == 130 and b"the same command goes on from here" in done.stderr, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_each_job_ends_by_itself_and_goes_on(tmp_path):
    make_dataset(tmp_path / "images", images=400, side=64, seed=3)
    for job, flags, reached, stage in JOBS:
        flags = [*(["--data", str(tmp_path / "images")] if job == "prepare" else []), *flags]
        with held(tmp_path / "r" / stage / "stage.json"):  # it does not finish before the signal
            _terminated(tmp_path, tmp_path / "log", job, flags, reached)
        if job == "teacher":
            assert list((tmp_path / "r" / "teacher" / "train").glob("step_*/MANIFEST.json"))
        process = _start(tmp_path, tmp_path / "again", job, flags)
        assert process.wait(timeout=300) == 0, (tmp_path / "again").read_text()[-3000:]
        assert (tmp_path / "r" / stage / "stage.json").exists()
        if job != "prepare":
            assert f"{stage}: goes on" in (tmp_path / "again").read_text()


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_sweep_ends_by_itself_and_goes_on(strip, tmp_path):
    (tmp_path / "own.py").write_text(SPACE + SWEEP_BASE)
    flags = [str(tmp_path / "own.py"), "--data", str(strip), "--gpu", "never", "--max-concurrent", "1"]
    _terminated(tmp_path, tmp_path / "log", "sweep", flags, "step 6  val")
    process = _start(tmp_path, tmp_path / "again", "sweep", [*flags, "--resume"])
    assert process.wait(timeout=400) == 0, (tmp_path / "again").read_text()[-3000:]
    assert len(list(tmp_path.glob("s/trials/*/result.json"))) == 2
