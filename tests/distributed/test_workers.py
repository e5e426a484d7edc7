"""A real Ray Train group of two workers (gloo), one of which is killed on the way."""

import json
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray
from nodes import BIN
from small import give_teacher_and_candidates, make_job, tiny_config

from dfssd.config import Run
from dfssd.data.manifest import read_manifest
from dfssd.errors import DfssdError
from dfssd.runtime.cluster import Resources, worker_resources
from dfssd.runtime.storage import Storage
from dfssd.train import worker
from dfssd.train.heartbeat import Store
from dfssd.train.worker import fit

ONE_CPU = Resources(cpus=1, threads=1, gpu=False)


def _kill_a_worker_after(checkpoint, killed):
    """SIGKILL one training worker of this test's own Ray while, or just after, its first checkpoint is written."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not killed:
        if checkpoint.exists():
            mine = psutil.Process().children(recursive=True)
            workers = [p for p in mine if p.is_running() and "RayTrainWorker" in " ".join(p.cmdline())]
            if workers:
                workers[-1].kill()
                killed.append(workers[-1].pid)
        time.sleep(0.05)


def test_two_workers_survive_the_death_of_one(prepared, local_ray):
    give_teacher_and_candidates(prepared)
    # Not balanced: the gradients of an untrained pair, on four images of 64 px, say nothing that could be compared.
    config = tiny_config(prepared, steps=30, val_every=5, num_workers=2, balance="none")
    job = make_job("student", str(prepared / "r"), config)
    killed: list[int] = []
    first = prepared / "r" / "student" / "train" / "step_0000005"
    killer = threading.Thread(target=_kill_a_worker_after, args=(first, killed), daemon=True)
    killer.start()
    result = fit(job, ONE_CPU)
    assert killed, "the run ended before a worker could be killed"
    assert result["steps"] == 30
    history = job.store.read_json("history.json")
    assert [h["step"] for h in history if "loss/total" in h] == list(range(1, 31))
    assert [h["step"] for h in history if "val/map50" in h] == [5, 10, 15, 20, 25, 30]
    assert len([f for f in job.store.at("train").folders() if f.startswith("step_")]) <= 3


@pytest.mark.slow  # a start of the group
def test_an_online_teacher_taps_and_a_pause_on_two_workers(prepared, local_ray):
    """Every parameter must get a gradient on every worker, or the group would wait for ever."""
    give_teacher_and_candidates(prepared)
    own = {"teacher_mode": "online", "divergence": "mgd", "taps": (4, 15), "feature_schedule": "off_last_epochs"}
    config = tiny_config(prepared, steps=4, val_every=4, num_workers=2, off_last=0.5, **own)
    job = make_job("student", str(prepared / "r"), config)
    assert fit(job, ONE_CPU)["steps"] == 4
    history = job.store.read_json("history.json")
    assert all(h["loss/teacher/cls"] > 0 for h in history if "loss/total" in h)
    assert [h["loss/feat/mgd"] > 0 for h in history if "loss/total" in h] == [True, True, False, False]


@pytest.mark.slow  # two starts of the group
def test_a_user_error_of_one_of_two_workers_ends_the_run_at_once(prepared, local_ray):
    """An image that was there when the data were prepared is gone: one rank meets it, the other waits for that rank."""
    give_teacher_and_candidates(prepared)
    job = make_job(
        "student", str(prepared / "r"), tiny_config(prepared, steps=200, val_every=200, num_workers=2, cache_gib=0)
    )
    manifest = read_manifest(Storage(str(prepared / "r")).at("dataset"))
    row = next(r for r in manifest.rows if r.split == "train" and r.labelled)
    kept, begun = Path(row.uri).read_bytes(), time.monotonic()
    Path(row.uri).unlink()
    try:
        with pytest.raises(DfssdError, match="image cannot be read"):
            fit(job, ONE_CPU)
    finally:
        Path(row.uri).write_bytes(kept)
    assert time.monotonic() - begun < 120  # two starts of the group: four attempts took 221 s


@pytest.mark.slow  # a minute of silence
def test_a_stopped_rank_is_named_within_a_minute(prepared, local_ray, capfd):
    give_teacher_and_candidates(prepared)
    job = make_job("student", str(prepared / "r"), tiny_config(prepared, steps=60, val_every=5, num_workers=2))
    said: list[float] = []

    def stop_one():
        first = prepared / "r" / "student" / "train" / "step_0000005" / "MANIFEST.json"
        while not first.exists():
            time.sleep(0.1)
        workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
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
@pytest.mark.parametrize("notice", ["stop", "drain"])
def test_a_notice_stores_a_checkpoint_before_the_next_validation(prepared, local_ray, monkeypatch, notice):
    """The driver was asked to end: a checkpoint and a user error that says how to go on. A node about to go: a checkpoint."""
    give_teacher_and_candidates(prepared)
    job = make_job("student", str(prepared / "r"), tiny_config(prepared, steps=4000, val_every=4000))
    train = prepared / "r" / "student" / "train"
    stores: list[Store] = []
    real = worker._trainer
    monkeypatch.setattr(worker, "_trainer", lambda *args: (stores.append(args[-1]), real(*args))[1])
    failed: list[DfssdError] = []

    def run():
        try:
            fit(job, ONE_CPU)
        except DfssdError as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 120
    while not (stores and stores[0].get("rank0") and json.loads(stores[0].get("rank0"))["steps"] > 3):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert not train.exists() or not list(train.glob("step_*/MANIFEST.json"))
    if notice == "drain":
        (node,) = ray.nodes()
        gcs = ray.get_runtime_context().gcs_address
        words = ["--node-id", node["NodeID"], "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        command = [str(BIN / "ray"), "drain-node", "--address", gcs, *words, "--deadline-remaining-seconds", "120"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    else:
        stores[0].put("stop", b"1")
    while not list(train.glob("step_*/MANIFEST.json")):
        assert time.monotonic() < deadline + 60
        time.sleep(0.2)
    if notice == "stop":
        thread.join(60)
        assert failed and "step" in str(failed[0])


@pytest.mark.slow  # each kill costs a start of the group
def test_failures_count_since_the_last_progress(prepared, local_ray, monkeypatch, capsys):
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
            mine = psutil.Process().children(recursive=True)
            for process in (p for p in mine if "RayTrainWorker" in " ".join(p.cmdline())):
                process.kill()
                kills.append(step)

    threading.Thread(target=kill, daemon=True).start()
    assert fit(job, ONE_CPU)["steps"] == 40 and kills == [5, 15, 25]
    assert capsys.readouterr().out.count("goes on from there") >= 2


def test_what_can_never_be_scheduled_says_so_at_once(local_ray):
    with pytest.raises(DfssdError, match="need 6 CPUs, the cluster has 2"):
        worker_resources(Run(num_workers=2, cpus_per_worker=3))
    resources = worker_resources(Run(num_workers=2))
    assert resources.cpus == 1 and resources.threads == 1
    assert worker_resources(Run(num_workers=4)).cpus < 0.5
