"""Workers that come and go: as many as there is room for, uneven shares of a batch, and growth with the cluster."""

import os
import subprocess
import threading
import time

import pytest
import ray
from nodes import BIN, start_cluster
from pydantic import ValidationError
from small import give_teacher_and_candidates, make_job, tiny_config

from dfssd.config import Config, Run
from dfssd.errors import DfssdError
from dfssd.runtime.cluster import Resources, with_workers, worker_resources
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train import worker
from dfssd.train.interrupt import CHECKPOINT, NOTHING, Interrupt
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


def test_a_notice_brings_a_checkpoint_at_once_and_one_more_at_the_end(monkeypatch, capsys):
    now, found = [1000.0], {"other": 1_001_000}
    monkeypatch.setattr(worker, "draining", lambda: found)
    monkeypatch.setattr(worker.time, "time", lambda: now[0])
    interrupt = Interrupt()
    notices, asked = worker.Notices(0, "mine", interrupt), []
    for seconds, deadline in (
        (0, None),
        (3, 1_120_000),
        (3, 1_120_000),
        (90, 1_120_000),
        (15, 1_120_000),
        (3, 1_120_000),
    ):
        now[0] += seconds
        found |= {"mine": deadline} if deadline else {}
        notices()
        asked.append(interrupt.wanted())
        interrupt.stored()
    assert asked == [NOTHING, CHECKPOINT, NOTHING, NOTHING, CHECKPOINT, NOTHING]
    assert "in 1:57; a checkpoint is stored" in capsys.readouterr().out


def test_the_loop_listens_to_whom_the_notices_ask(prepared, monkeypatch):
    from dfssd.train import loop

    heard = []
    monkeypatch.setattr(loop, "train", lambda job, workers, device, log, save, interrupt: heard.append(interrupt))
    monkeypatch.setattr(worker, "get_device", lambda: None)
    interrupt = Interrupt()
    worker._train(make_job("label_only", "/nowhere", tiny_config(prepared)), WorkerGroup(1, 2), 1, interrupt)
    assert heard[0] is interrupt


@pytest.fixture
def growing(request):
    """A head of one CPU (or as a test says), and a way to add a node of one CPU to it."""
    cluster = start_cluster(connect=True, num_cpus=getattr(request, "param", 1), object_store_memory=120 * 2**20)
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


@pytest.mark.slow  # a notice of a quarter of a minute, and another start of the group
@pytest.mark.parametrize("growing", [0], indirect=True)
def test_a_node_that_is_taken_away_gives_notice_and_loses_nothing(prepared, growing, capfd, monkeypatch):
    """A spot machine: no validation and no clock is near, so the notice alone brings the checkpoint the run goes on from."""
    monkeypatch.delenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", raising=False)  # as on a cluster: Ray watches, too
    nodes = [growing.add_node(num_cpus=1, object_store_memory=80 * 2**20) for _ in range(2)]
    steps = 800
    config = tiny_config(prepared, steps=steps, val_every=steps)
    job = make_job("label_only", str(prepared / "r"), config)
    done: dict = {}
    training = threading.Thread(target=lambda: done.update(fit(job, Resources(1, 1, False))), daemon=True)
    training.start()
    deadline, said = time.monotonic() + 120, ""
    while f"step 20/{steps}" not in said:
        assert time.monotonic() < deadline and training.is_alive(), said[-3000:]
        time.sleep(0.2)
        said += capfd.readouterr().out
    (node,) = (n["NodeID"] for n in ray.nodes() if n["Resources"].get("CPU") and not _free(n["NodeID"]))
    gcs, begun = ray.get_runtime_context().gcs_address, time.monotonic()
    words = ["--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    command = [str(BIN / "ray"), "drain-node", "--address", gcs, *words, "--deadline-remaining-seconds", "15"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    while not list((prepared / "r/label_only/train").glob("step_*/MANIFEST.json")):
        assert time.monotonic() - begun < 15, "the node was gone before"
        time.sleep(0.2)
    growing.remove_node(next(n for n in nodes if n.node_id == node), allow_graceful=False)  # as who gave notice does
    training.join(400)
    said += capfd.readouterr().out
    assert not training.is_alive() and done["steps"] == steps
    assert "its node is about to go, in 0:1" in said and "resumed at step" in said, [
        line for line in said.splitlines() if "ms/step" not in line
    ]
    history = [h["step"] for h in job.store.read_json("history.json") if "loss/total" in h]
    assert history == list(range(1, steps + 1)), "no step is missing, and none comes twice"


def _free(node):
    """CPUs of a node that nobody holds."""
    from ray._private.state import available_resources_per_node

    return available_resources_per_node().get(node, {}).get("CPU", 0)
