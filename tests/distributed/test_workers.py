"""A real Ray Train group of two workers (gloo), one of which is killed on the way."""

import threading
import time

import psutil
import pytest
from small import give_teacher_and_candidates, make_job, tiny_config

from dfssd.config import Run
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


def test_a_user_error_in_a_worker_comes_back_as_one_without_retries(prepared, local_ray):
    config = tiny_config(prepared)
    job = make_job("student", str(prepared / "r"), config)  # no teacher was trained
    Storage(str(prepared / "r")).write("teacher/best.pt", b"not weights")
    begun = time.monotonic()
    with pytest.raises(DfssdError, match="cannot be loaded as a model"):
        fit(job, ONE_CPU)
    assert time.monotonic() - begun < 90


def test_what_can_never_be_scheduled_says_so_at_once(local_ray):
    with pytest.raises(DfssdError, match="need 6 CPUs, the cluster has 2"):
        worker_resources(Run(num_workers=2, cpus_per_worker=3))
    resources = worker_resources(Run(num_workers=2))
    assert resources.cpus == 1 and resources.threads == 1
    assert worker_resources(Run(num_workers=4)).cpus < 0.5
