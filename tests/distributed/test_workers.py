"""A real Ray Train group of two workers (gloo), one of which is killed on the way."""

import threading
import time
from pathlib import Path

import psutil
import pytest
import ray
from small import give_teacher_and_candidates, make_job, tiny_config

from dfssd.config import Run
from dfssd.data.manifest import read_manifest
from dfssd.errors import DfssdError
from dfssd.runtime.cluster import Resources, worker_resources
from dfssd.runtime.storage import Storage
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
    assert time.monotonic() - begun < 90  # one start of the group; a restart would take as long again
    log = "".join(p.read_text(errors="replace") for p in _logs(begun))
    assert log.count("Error in training function") == 0, "it was returned, not raised"


def _logs(begun):
    """What the workers of this test's Ray have written."""
    folder = Path(ray._private.worker._global_node.get_logs_dir_path())
    since = time.time() - (time.monotonic() - begun)
    return [p for p in folder.glob("worker-*.err") if p.stat().st_mtime > since]


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
            for worker in (p for p in mine if "RayTrainWorker" in " ".join(p.cmdline())):
                worker.kill()
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
