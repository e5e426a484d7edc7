"""A real Ray Train group of two workers (gloo), one of which is killed on the way."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
from held import held
from nodes import start_cluster
from small import give_teacher_and_candidates, make_job, tiny_config

from dfssd.config import Run
from dfssd.data.manifest import read_manifest
from dfssd.data.synthetic import make_dataset
from dfssd.errors import DfssdError
from dfssd.runtime.cluster import Resources, worker_resources
from dfssd.runtime.storage import Storage
from dfssd.train import worker
from dfssd.train.worker import fit

ROOT = Path(__file__).parents[2]
ONE_CPU = Resources(cpus=1, threads=1, gpu=False)
pytestmark = pytest.mark.timeout(1200)  # each start of a group takes a busy machine a minute and more


@pytest.fixture(scope="module")
def two_nodes():
    """A Ray of two nodes with a CPU each, on loopback: what asks for two CPUs on one of them waits for ever."""
    own = {"num_cpus": 1, "object_store_memory": 120 * 2**20}
    cluster = start_cluster(**own)
    cluster.add_node(wait=False, **own)
    cluster.wait_for_nodes(timeout=240)
    ray.init(address=cluster.address, log_to_driver=False)
    yield
    ray.shutdown()
    cluster.shutdown()
    os.environ.pop("RAY_AUTH_MODE", None)


def _training_workers():
    """Of this test's own Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            found += [process] if "RayTrainWorker" in " ".join(process.cmdline()) else []
    return found


def _kill_a_worker_after(checkpoints, killed, listening):
    """SIGKILL one training worker while, or just after, its first checkpoint is written; before, look where they listen."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and not killed:
        if list(checkpoints.glob("step_*")) and len(workers := _training_workers()) == 2:
            with suppress(psutil.Error):
                each = [c for p in workers for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
                workers[-1].kill()
                listening.extend(c.laddr.ip for c in each)
                killed.append(workers[-1].pid)
        time.sleep(0.05)


def test_two_workers_survive_the_death_of_one(prepared, two_nodes):
    """With default flags, on two nodes of one CPU each; nothing of them can be reached from outside this machine."""
    give_teacher_and_candidates(prepared)
    # Not balanced: the gradients of an untrained pair, on four images of 64 px, say nothing that could be compared.
    config = tiny_config(prepared, steps=30, val_every=5, num_workers=2, balance="none")
    job = make_job("student", str(prepared / "r"), config)
    killed: list[int] = []
    listening: list[str] = []
    student = prepared / "r" / "student"

    def kill():
        with held(student / "best.pt"):  # which is written at the end: it is not reached before a worker was killed
            _kill_a_worker_after(student / "train", killed, listening)

    threading.Thread(target=kill, daemon=True).start()
    result = fit(job, worker_resources(config.run))
    assert killed, "the run ended before a worker could be killed"
    assert len(listening) >= 4 and set(listening) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, listening
    assert result["steps"] == 30
    history = job.store.read_json("history.json")
    assert [h["step"] for h in history if "loss/total" in h] == list(range(1, 31))
    assert [h["step"] for h in history if "val/map50" in h] == [5, 10, 15, 20, 25, 30]
    assert len([f for f in job.store.at("train").folders() if f.startswith("step_")]) <= 3


@pytest.mark.slow  # a start of the group
def test_an_online_teacher_taps_and_a_pause_on_two_workers(prepared, two_nodes):
    """Every parameter must get a gradient on every worker, or the group would wait for ever."""
    give_teacher_and_candidates(prepared)
    own = {"teacher_mode": "online", "divergence": "mgd", "taps": (4, 15), "feature_schedule": "off_last_epochs"}
    config = tiny_config(prepared, steps=4, val_every=4, num_workers=2, off_last=0.5, **own)
    job = make_job("student", str(prepared / "r"), config)
    assert fit(job, ONE_CPU)["steps"] == 4
    history = job.store.read_json("history.json")
    assert all(h["loss/teacher/cls"] > 0 for h in history if "loss/total" in h)
    assert [h["loss/feat/mgd"] > 0 for h in history if "loss/total" in h] == [True, True, False, False]


@pytest.mark.slow  # a start of the group
def test_a_user_error_of_one_of_two_workers_ends_the_run_at_once(prepared, two_nodes, monkeypatch):
    """An image that was there when the data were prepared is gone: one rank meets it, the other waits for that rank."""
    give_teacher_and_candidates(prepared)
    job = make_job(
        "student", str(prepared / "r"), tiny_config(prepared, steps=200, val_every=200, num_workers=2, cache_gib=0)
    )
    manifest = read_manifest(Storage(str(prepared / "r")).at("dataset"))
    row = next(r for r in manifest.rows if r.split == "train" and r.labelled)
    kept, real, stores, met = Path(row.uri).read_bytes(), worker._trainer, [], []
    monkeypatch.setattr(worker, "_trainer", lambda *args: (stores.append(args[-1]), real(*args))[1])

    def watch():
        while not (stores and stores[0].error()):
            time.sleep(0.1)
        met.append(time.monotonic())

    threading.Thread(target=watch, daemon=True).start()
    Path(row.uri).unlink()
    try:
        with pytest.raises(DfssdError, match="image cannot be read"):
            fit(job, ONE_CPU)
    finally:
        Path(row.uri).write_bytes(kept)
    assert len(stores) == 1 and time.monotonic() - met[0] < 10  # to start the group once more takes 20 s and more
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < 2:  # nothing of the group is left
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.2)


@pytest.mark.slow  # a minute of silence
def test_a_stopped_rank_is_named_within_a_minute(prepared, two_nodes, capfd):
    give_teacher_and_candidates(prepared)
    job = make_job("student", str(prepared / "r"), tiny_config(prepared, steps=60, val_every=5, num_workers=2))
    said: list[float] = []

    def stop_one():
        first = prepared / "r" / "student" / "train" / "step_0000005" / "MANIFEST.json"
        while not first.exists():
            time.sleep(0.1)
        workers = _training_workers()
        workers[0].suspend()
        begun, text = time.monotonic(), ""
        while time.monotonic() - begun < 90 and not said:
            text += capfd.readouterr().out
            if f"(pid {workers[0].pid} on" in text:
                said.append(time.monotonic() - begun)
            time.sleep(0.5)
        workers[0].resume()

    thread = threading.Thread(target=stop_one, daemon=True)
    thread.start()
    assert fit(job, ONE_CPU)["steps"] == 60
    thread.join(10)
    assert said and said[0] < 60


@pytest.mark.slow  # half a minute
def test_sigterm_leaves_a_checkpoint_and_the_same_command_goes_on(prepared):
    """A job as a user starts it, with two workers and default flags for all that decides when a checkpoint is due."""
    small = ["--imgsz", "64", "--batch", "4", "--amp", "fp32", "--teacher", "yolov8n.yaml", "--log-every", "1"]
    small += ["--num-workers", "2"]
    place = ["--storage-path", str(prepared), "--run-name", "sigterm"]
    data = ["--data", str(prepared / "images"), "--label-fraction", "0.4"]
    make_dataset(prepared / "images", images=60, side=64, seed=3)

    def job(name, *flags):
        command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *place, *flags]
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)

    assert job("prepare", *data).wait(200) == 0
    first = job("teacher", *small, "--teacher-steps", "4000", "--val-every", "4000")
    seen = _until(first, "step 5/4000")
    begun = time.monotonic()
    first.send_signal(signal.SIGTERM)
    said = seen + first.communicate(timeout=60)[0]
    assert time.monotonic() - begun < 30 and first.returncode == 130, said[-3000:]
    stored = int(re.search(r"the checkpoint of step (\d+) is stored", said)[1])
    assert stored >= 5 and "interrupted: the same command goes on from here" in said and "Traceback" not in said
    second = job("teacher", *small, "--teacher-steps", "4000", "--val-every", "4000")
    assert f"resumed at step {stored} of 4000" in _until(second, f"step {stored + 2}/4000")
    second.send_signal(signal.SIGTERM)
    second.communicate(timeout=60)


def _until(process, text):
    """What a process says up to a line that holds `text`."""
    said = ""
    for line in process.stdout:
        said += line
        if text in line:
            return said
    raise AssertionError(said[-3000:])


@pytest.mark.slow  # each kill costs a start of the group
def test_failures_count_since_the_last_progress(prepared, two_nodes, monkeypatch, capsys):
    """Three kills with progress between them, where no restart is allowed: the run ends well."""
    monkeypatch.setattr("dfssd.train.worker.MAX_FAILURES", 0)
    give_teacher_and_candidates(prepared)
    job = make_job("student", str(prepared / "r"), tiny_config(prepared, steps=40, val_every=5))
    kills: list[int] = []

    def kill():
        for step in (5, 15, 25):
            at = prepared / "r" / "student" / "train" / f"step_{step:07d}" / "MANIFEST.json"
            while not at.exists():
                time.sleep(0.02)
            for process in _training_workers():
                process.kill()
                kills.append(step)

    threading.Thread(target=kill, daemon=True).start()
    assert fit(job, ONE_CPU)["steps"] == 40 and kills == [5, 15, 25]
    assert capsys.readouterr().out.count("goes on from there") >= 2


def test_what_can_never_be_scheduled_says_so_at_once(two_nodes):
    deadline = time.monotonic() + 200
    while ray.available_resources().get("CPU", 0) < 2:  # the group of the test before gives its own back
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.2)
    with pytest.raises(DfssdError, match="need 6 CPUs, the cluster has 2"):
        worker_resources(Run(num_workers=2, cpus_per_worker=3))
    resources = worker_resources(Run(num_workers=2))
    assert resources.cpus == 1 and resources.threads == 1
    assert worker_resources(Run(num_workers=4)).cpus < 0.5
