"""Every job under `ray job submit`: exit codes, what is uploaded, stop and resubmit, and what can never be scheduled."""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from nodes import BIN, Place, free_port, token_environment
from small import SWEEP_BASE

from dfssd.data.synthetic import make_dataset

ROOT = Path(__file__).parents[2]
SIZE = ["--imgsz", "64", "--gpu", "never"]
LIGHT = ["--batch", "4", "--log-every", "1", "--amp", "fp32"]
STUDENT = ["--steps", "6", "--val-every", "3", *LIGHT]
TEACHER = ["--teacher-steps", "6", "--teacher", "yolov8n.yaml"]
JOBS = {  # each job refuses flags that it does not read
    "prepare": ["--label-fraction", "0.4"],
    "teacher": [*SIZE, *STUDENT, *TEACHER],
    "pseudo_label": [*SIZE, "--tta", "none", "--steps", "6", "--amp", "fp32"],
    "distill": [*SIZE, *STUDENT],
    "suggest": [*SIZE, "--k", "5"],
    "review": ["--export", "cvat", "--imgsz", "64"],
    "evaluate": [*SIZE, "--latency-repeats", "3", "--sample-images", "2"],
}
SPACE = 'ROWS = {"labels alone": {"method": "label_only"}, "distilled": {"method": "distill"}}'

pytestmark = pytest.mark.slow  # some five minutes


class Cluster:
    """A head with token authentication, and a checkout with things in it that must not travel."""

    def __init__(self, root: Path, place: Place) -> None:
        self.root, self.place = root, place
        self.checkout, self.data = root / "checkout", root / "images"
        files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
        for name in files:
            target = self.checkout / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        (self.checkout / "own_space.py").write_text(SPACE + SWEEP_BASE)
        make_dataset(self.data, images=60, side=64, seed=3)
        shutil.copytree(self.data, self.checkout / "my_data")  # as users do
        for name in ("runs/old/teacher/best.pt", "runs/mlflow.db", "demo/runs/x.bin", "mlruns/0/y.bin"):
            (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (self.checkout / name).write_bytes(b"0" * 5_000_000)
        port, dashboard, ray = free_port(), free_port(), root / "ray"
        ray.mkdir()
        self.env = {**token_environment(), "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        self.env["RAY_JOB_STOP_WAIT_TIME_S"] = "35"  # as cluster.yaml has it
        own = ["--head", "--port", str(port), "--num-cpus", "2", "--object-store-memory", str(150 * 2**20)]
        own += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard), "--temp-dir", str(ray)]
        own += ["--node-ip-address", "127.0.0.1", "--dashboard-agent-listen-port", str(free_port())]
        self.place.start("head", [str(BIN / "ray"), "start", *own, "--disable-usage-stats", "--block"], self.env)
        deadline = time.monotonic() + 90
        while self.submit("true").returncode:  # the agent that takes jobs comes up after the server
            assert time.monotonic() < deadline, (root / "head.log").read_text()[-3000:]
            time.sleep(1)

    def ray(self, *words: str, timeout: float = 240) -> subprocess.CompletedProcess:
        command = [str(BIN / "ray"), *words]
        return subprocess.run(command, cwd=self.checkout, env=self.env, capture_output=True, text=True, timeout=timeout)

    def submit(self, *command: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        return self.ray("job", "submit", "--working-dir", ".", *flags, "--", *command)

    def job(self, name: str, *more: str, run: str = "r", flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        own = ["--storage-path", str(self.root / "runs"), "--run-name", run]
        own += ["--data", str(self.data)] if name in ("prepare", "pipeline", "sweep") else []
        return self.submit(sys.executable, f"jobs/{name}.py", *own, *more, flags=flags)


@pytest.fixture(scope="module")
def cluster():
    root = Path(tempfile.mkdtemp(prefix="dfssd-s-"))
    place = Place(root)
    try:
        yield Cluster(root, place)
    finally:
        place.stop()
        shutil.rmtree(root, ignore_errors=True)


def said(done: subprocess.CompletedProcess) -> str:
    return done.stdout + done.stderr


def test_each_job_runs_and_ends_with_0(cluster):
    for name, flags in JOBS.items():
        done = cluster.job(name, *flags)
        assert done.returncode == 0, said(done)[-4000:]
        if name == "distill":
            assert "student: step 6/6 (100 %)" in said(done), "the log of the job has its progress"
    runs = cluster.root / "runs" / "r"
    assert (runs / "suggest" / "suggest.csv").exists() and (runs / "review" / "annotations.xml").exists()
    assert (runs / "student" / "best.pt").exists() and (runs / "report" / "report.html").exists()
    whole = [
        *JOBS["teacher"],
        *JOBS["prepare"],
        "--tta",
        "none",
        *JOBS["evaluate"][len(SIZE) :],
        "--no-baseline",
        "--no-mean-teacher",
    ]
    done = cluster.job("pipeline", *whole)
    assert done.returncode == 0 and said(done).count(", skipped") >= 6, said(done)[-4000:]


def test_a_sweep_runs_as_a_job(cluster):
    done = cluster.job("sweep", "own_space.py", "--gpu", "never", run="sweep")
    assert done.returncode == 0 and "2/2 trials" in said(done), said(done)[-4000:]
    assert (cluster.root / "runs" / "sweep" / "table.md").exists()


def test_a_user_error_is_the_jobs_exit_code_and_in_its_log(cluster):
    wrong = cluster.job("prepare", "--label-fraction", "2", run="wrong")
    relative = cluster.submit(sys.executable, "jobs/prepare.py", "--data", "my_data", "--storage-path", "/tmp/x")
    for done, text in ((wrong, "less than or equal to 1"), (relative, "--data my_data is relative")):
        assert done.returncode != 0 and text in said(done) and "Traceback" not in said(done), said(done)[-3000:]


def test_neither_data_nor_runs_are_uploaded(cluster):
    script = (
        "import os; print('FILES', sorted(os.path.relpath(os.path.join(d, f)) for d, _, n in os.walk('.') for f in n))"
    )
    done = cluster.submit(sys.executable, "-c", script)
    assert done.returncode == 0, said(done)
    names = re.findall(r"'([^']+)'", said(done).split("FILES ")[1].split("]")[0])
    assert {"jobs/pipeline.py", "dfssd/train/loop.py", "own_space.py", "pyproject.toml"} <= set(names)
    travelled = [n for n in names if n.split("/")[0] in ("runs", "demo", "mlruns", ".venv", ".git", "tests")]
    assert not travelled and not [n for n in names if n.endswith((".jpg", ".png", ".pt", ".db"))], names
    package = next((cluster.root / "ray").rglob("working_dir_files"))
    assert sum(f.stat().st_size for f in package.rglob("*") if f.is_file()) < 8_000_000


def test_a_stopped_job_goes_on_when_submitted_again(cluster):
    steps = [*SIZE, *LIGHT, "--teacher-steps", "400", "--val-every", "400", "--teacher", "yolov8n.yaml"]
    assert cluster.job("prepare", *JOBS["prepare"], run="stopped").returncode == 0
    first = cluster.job("teacher", *steps, run="stopped", flags=("--no-wait", "--submission-id", "first"))
    assert first.returncode == 0, said(first)
    teacher = cluster.root / "runs" / "stopped" / "teacher"
    deadline = time.monotonic() + 120
    while "step 10/400" not in (log := cluster.ray("job", "logs", "first").stdout):
        assert time.monotonic() < deadline, log[-3000:]
    stopped = cluster.ray("job", "stop", "first")
    assert stopped.returncode == 0 and not (teacher / "best.pt").exists(), said(stopped)
    log = cluster.ray("job", "logs", "first").stdout
    step = re.search(r"asked to end: the checkpoint of step (\d+) is stored", log)
    assert step and "interrupted: the same command goes on from here" in log, log[-3000:]
    again = cluster.job("teacher", *steps, run="stopped", flags=("--submission-id", "second"))
    assert again.returncode == 0, said(again)[-4000:]
    assert int(re.search(r"resumed at step (\d+) of 400", said(again))[1]) == int(step[1]) >= 10


def test_what_can_never_be_scheduled_ends_within_a_minute(cluster):
    begun = time.monotonic()
    done = cluster.job("teacher", "--role", "label_only", *SIZE, *STUDENT, "--cpus-per-worker", "64")
    assert done.returncode != 0 and "need 64 CPUs, the cluster has 2" in said(done), said(done)[-3000:]
    assert time.monotonic() - begun < 60
