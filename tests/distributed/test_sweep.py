"""A sweep as a user types it: killed, resumed, a trial's process killed, and its table rebuilt from MLflow alone."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from held import MARK, end_all
from small import SWEEP_BASE

from dfssd.runtime.storage import Storage
from dfssd.sweep.driver import records

ROOT = Path(__file__).parents[2]
SPACE = """
ROWS = {
    "labels alone": {"method": "label_only"},
    "mse": {"distill.divergence": "mse"},
}
"""


def command(storage: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / "sweep.py"), "--storage-path", str(storage), "--run-name", "s", *more]


def start(storage: Path, strip: Path, log: Path, *more: str) -> subprocess.Popen:
    own = ["--data", os.path.relpath(strip, ROOT), "--gpu", "never", "--max-concurrent", "1", *more]
    return subprocess.Popen(
        command(Path(os.path.relpath(storage, ROOT)), str(storage / "own.py"), *own),  # as one types it: relative
        cwd=ROOT,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", MARK: str(storage)},
    )


def wait_for(condition, process: subprocess.Popen, log: Path, limit_s: float = 240) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


def kill_a_trial(log: Path, said: list[int]) -> None:
    """End the process that trains the `mse` trial, once it has a checkpoint."""
    me = psutil.Process()
    while not said:
        text = log.read_text()
        begun = max(text.rfind(f"student: {word}") for word in ("starts", "goes on"))
        part = text[begun:]
        if begun >= 0 and "step 6  val" in part:
            pid = int(part.split("step 6  val")[0].rsplit("pid=", 1)[1].split(")")[0])
            assert pid in {p.pid for p in me.children(recursive=True)} | {p.pid for p in psutil.process_iter()}
            psutil.Process(pid).kill()
            said.append(pid)
        time.sleep(0.02)


@pytest.fixture(scope="module")
def swept(strip, tmp_path_factory):
    """(storage path, log of the second start, mtimes of what was finished before it, pid of the killed trial)."""
    storage = tmp_path_factory.mktemp("sweep")
    (storage / "own.py").write_text(SPACE + SWEEP_BASE)
    first, second = storage / "log1", storage / "log2"
    process = start(storage, strip, first)
    wait_for(lambda: len(list(storage.glob("s/trials/*/result.json"))) >= 1, process, first)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    end_all(str(storage))
    before = {p: p.stat().st_mtime_ns for p in storage.glob("s/trials/*/*/best.pt")}
    process, killed = start(storage, strip, second, "--resume", "--register", "small"), []
    threading.Thread(target=kill_a_trial, args=(second, killed), daemon=True).start()
    assert process.wait(timeout=300) == 0, second.read_text()[-4000:]
    return storage, second.read_text(), before, killed


def test_a_resumed_sweep_runs_only_what_is_missing(swept):
    storage, log, before, _ = swept
    assert len(before) == 1, "killed in the middle"
    assert f"{len(before)} of them ended before" in log
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    assert len(records(Storage(str(storage)), "s")) == 2
    for name in ("dataset", "teacher", "pseudo"):
        assert len(list(storage.glob(f"s/shared/{name}-*"))) == 1, "made once for all"


def test_a_trial_whose_process_died_goes_on_from_its_checkpoint(swept):
    _, log, _, killed = swept
    assert killed, "the fault was not injected"
    after = log[log.index(f"pid={killed[0]}") :].split("resumed at step ")
    assert len(after) == 2, "exactly one trial was resumed"
    assert int(after[1].split(" ")[0]) in (3, 6, 9), "from a checkpoint, not from the beginning"


def test_mlflow_has_one_nested_run_a_trial_with_all_that_is_asked_of_it(swept):
    from mlflow import MlflowClient

    storage = swept[0]
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("dfssd").experiment_id
    parent = client.search_runs([experiment], "tags.kind = 'sweep' and tags.sweep = 's'")
    assert len(parent) == 1
    assert parent[0].info.status == "FINISHED"
    trials = client.search_runs([experiment], "tags.kind = 'trial' and tags.space = 'own' and tags.seed = '0'")
    assert {t.data.tags["row"] for t in trials} == {"labels alone", "mse"}
    assert len(trials) == 2, "a resumed trial goes on in its own run"
    for trial in trials:
        tags, params = trial.data.tags, trial.data.params
        assert trial.info.status == "FINISHED"
        assert tags["mlflow.parentRunId"] == parent[0].info.run_id
        assert tags["code"] and tags["data_digest"]
        assert params["train.steps"] == "12"
        if tags["row"] != "labels alone":
            assert params["distill.divergence"] == tags["row"]
        steps = {m.step for m in client.get_metric_history(trial.info.run_id, "val/map50")}
        assert steps == {3, 6, 9, 12}
        assert "result/test/map50" in trial.data.metrics
        assert {"weights", "curves.png"} <= {a.path for a in client.list_artifacts(trial.info.run_id)}
    assert {"table.md", "table.png", "own.py", "best"} <= {a.path for a in client.list_artifacts(parent[0].info.run_id)}
    assert client.get_registered_model("small").latest_versions[0].run_id == parent[0].info.run_id


def test_the_table_is_rebuilt_from_mlflow_alone(swept, tmp_path):
    storage = swept[0]
    wanted = (storage / "s" / "table.csv").read_bytes()
    env = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{storage}/mlflow.db"}
    # Another storage path: nothing of the sweep's is there.
    args = [sys.executable, str(ROOT / "jobs" / "sweep.py"), "--storage-path", str(tmp_path), "--table", "s"]
    done = subprocess.run(args, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "s" / "table.csv").read_bytes() == wanted
    assert "labels alone" in done.stdout


def test_a_sweep_of_other_settings_is_refused_under_its_name(swept, strip):
    storage = swept[0]
    log = storage / "log3"
    assert start(storage, strip, log, "--steps", "15").wait(timeout=120) == 2
    assert "config.train.steps: 12 -> 15" in log.read_text()
    assert start(storage, strip, log, "--cpus-per-worker", "4000").wait(timeout=120) == 2
    assert "need 4000 CPUs, the cluster has" in log.read_text()
