"""Workers that come and go: as many as there is room for, uneven shares of a batch, and growth with the cluster."""

import os
import socket
import threading
import time

import pytest
import ray
from pydantic import ValidationError
from small import give_teacher_and_candidates, make_job, tiny_config

from dfssd.config import Config, Run
from dfssd.errors import DfssdError
from dfssd.runtime.cluster import Resources, with_workers, worker_resources
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train.worker import fit


@pytest.mark.parametrize(
    ("given", "range_"), [(2, (2, 2)), ("3", (3, 3)), ("1:4", (1, 4)), ("auto", (1, 1)), ("2:2", (2, 2))]
)
def test_numbers_of_workers(given, range_):
    assert Run(num_workers=given).workers == range_
    assert Run(num_workers=given).elastic == (range_[0] < range_[1])


@pytest.mark.parametrize(
    ("given", "said"),
    [("0", "give 2, 1:4 or auto"), ("4:1", "give 1:4"), ("many", "give 2"), ("1:99", "each worker needs")],
)
def test_what_cannot_be_is_refused(given, said):
    with pytest.raises(ValidationError, match=said):
        Config(run=Run(num_workers=given))


def test_shares_add_up_to_the_batch():
    for size in range(1, 8):
        shares = [WorkerGroup(rank, size).share_of(16) for rank in range(size)]
        assert sum(shares) == 16 and max(shares) - min(shares) <= 1


@pytest.fixture
def growing():
    """A head of one CPU, and a way to add a node of one CPU to it."""
    from ray.cluster_utils import Cluster

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {"num_cpus": 1, "object_store_memory": 120 * 2**20, "include_dashboard": True, "dashboard_port": port}
    cluster = Cluster(initialize_head=True, connect=True, head_node_args=own)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    os.environ.pop("RAY_AUTH_MODE", None)


def start_training(prepared, config):
    """The job, its thread once it has a checkpoint, and what will hold its result."""
    job, done = make_job("student", str(prepared / "r"), config), {}
    training = threading.Thread(target=lambda: done.update(fit(job, Resources(1, 1, False))), daemon=True)
    training.start()
    first = prepared / "r" / "student" / "train" / f"step_{config.train.val_every:07d}" / "MANIFEST.json"
    deadline = time.monotonic() + 120
    while not first.exists():
        assert training.is_alive() and time.monotonic() < deadline
        time.sleep(0.1)
    return job, training, done


@pytest.mark.slow  # a node has to start, and Ray to look twice
def test_a_run_starts_with_what_is_there_and_grows_with_the_cluster(prepared, growing, monkeypatch):
    monkeypatch.setattr("dfssd.train.worker.RESIZE_S", 3.0)
    give_teacher_and_candidates(prepared)
    steps = 200  # long enough for the node to start and for Ray to look twice, on a fast machine too
    own = {"steps": steps, "val_every": 20, "log_every": 1, "batch": 5}
    config = tiny_config(prepared, num_workers="1:3", **own)
    assert with_workers(tiny_config(prepared, num_workers="auto")).run.workers == (1, 1)
    assert worker_resources(config.run).cpus == 1
    begun = time.monotonic()
    with pytest.raises(DfssdError, match="need 2 CPUs, the cluster has 1"):
        worker_resources(Run(num_workers=2, cpus_per_worker=1, wait_min=0.05))
    assert 3 <= time.monotonic() - begun < 20
    job, training, done = start_training(prepared, config)
    growing.add_node(num_cpus=1, object_store_memory=80 * 2**20)  # only works in the main thread
    assert with_workers(tiny_config(prepared, num_workers="auto")).run.workers == (1, 1), "the other node is taken"
    training.join(240)
    assert not training.is_alive() and done["steps"] == steps
    history = [h for h in job.store.read_json("history.json") if "loss/total" in h]
    assert [h["step"] for h in history] == list(range(1, steps + 1))
    assert {h["workers"] for h in history} == {1, 2}  # 2 and 3 of the 5 labelled images each
    assert history[0]["workers"] == 1 and history[-1]["workers"] == 2


@pytest.mark.slow  # Ray waits a minute for the lost node before it goes on without
def test_a_run_goes_on_with_fewer_workers_when_a_node_is_lost(prepared, growing):
    give_teacher_and_candidates(prepared)
    second = growing.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    config = tiny_config(prepared, steps=60, val_every=4, log_every=1, num_workers="1:2", batch=5)
    job, training, done = start_training(prepared, config)
    growing.remove_node(second, allow_graceful=False)
    training.join(300)
    assert not training.is_alive() and done["steps"] == 60
    history = [h for h in job.store.read_json("history.json") if "loss/total" in h]
    assert [h["step"] for h in history] == list(range(1, 61))
    assert history[0]["workers"] == 2 and history[-1]["workers"] == 1
