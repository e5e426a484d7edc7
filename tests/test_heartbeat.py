"""Signs of life: what the driver says of ranks that are silent, stuck, or not there yet. The store is a dict here."""

import json
import threading
import time

import pytest
import torch

from dfssd.errors import DfssdError
from dfssd.train import heartbeat
from dfssd.train.heartbeat import Heart, Store, Watch, where


@pytest.fixture
def store(monkeypatch):
    values = {}
    own = Store("k")
    monkeypatch.setattr(own, "put", values.__setitem__)
    monkeypatch.setattr(own, "get", values.get)
    return own


class Driver:
    """A watch whose time is moved by hand."""

    def __init__(self, store, size=2):
        self.store, self.size, self.now, self.lines = store, size, 0.0, []
        self.watch = Watch(store, "student", "2 workers", lambda: "1 CPU", lambda: self.now, self.lines.append)
        self.counts = {}

    def beat(self, rank, steps, pid=0, place="train/loop.py:9 train", ended=False):
        self.counts[rank] = self.counts.get(rank, 0) + 1
        beat = {"size": self.size, "node": f"n{rank}", "ip": f"10.0.0.{rank}", "pid": pid or 100 + rank, "steps": steps}
        self.store.put(
            f"rank{rank}", json.dumps({**beat, "count": self.counts[rank], "where": place, "ended": ended}).encode()
        )

    def pass_time(self, seconds, beating=(), steps=0):
        for _ in range(seconds):
            self.now += 1
            for rank in beating:
                self.beat(rank, steps)
            self.watch.look()


def test_a_group_that_does_not_start(store):
    driver = Driver(store)
    driver.pass_time(59)
    assert driver.lines == ["student: no worker has started in 0:46; 2 workers are asked for, 1 CPU free"]
    driver.pass_time(60)
    assert len(driver.lines) == 2  # once a minute


def test_a_silent_rank_is_named_with_its_place(store):
    driver = Driver(store)
    driver.pass_time(5, beating=(0, 1), steps=7)
    driver.pass_time(40, beating=(0,), steps=7)
    (line,) = driver.lines
    assert "waits for rank 1 (pid 101 on n1, 10.0.0.1): no sign of life for 0:31" in line
    assert "had made 7 steps and was at train/loop.py:9 train" in line


def test_a_rank_that_never_began(store):
    driver = Driver(store)
    driver.pass_time(3, beating=(0,))
    assert driver.lines == ["student: waits for rank 1, which has not begun; 2 workers are asked for, 1 CPU free"]


def test_ranks_that_live_and_do_not_step(store):
    driver = Driver(store)
    driver.pass_time(45, beating=(0, 1), steps=3)
    assert driver.lines == []
    driver.pass_time(10, beating=(0, 1), steps=3)
    assert driver.lines == [
        "student: no step for 0:51: rank 0 is at train/loop.py:9 train; rank 1 is at train/loop.py:9 train"
    ]


def test_a_group_that_works_or_starts_again_is_left_in_peace(store):
    driver = Driver(store)
    for step in range(200):
        driver.pass_time(1, beating=(0, 1), steps=step)
    driver.size = 1  # one of the two is gone for good: the group shrank
    for step in range(100):
        driver.now += 1
        driver.beat(0, step, pid=900)
        driver.watch.look()
    assert driver.lines == []


def test_a_rank_that_has_ended_is_not_waited_for(store):
    driver = Driver(store)
    driver.beat(1, 9, ended=True)
    driver.pass_time(40, beating=(0,), steps=9)
    assert driver.lines == []


def test_a_heart_counts_steps_and_knows_where_its_worker_is(store, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.02)
    parameter = torch.nn.Parameter(torch.ones(1))
    optimiser = torch.optim.SGD([parameter], lr=0.1)
    with Heart(store, 0, 1) as heart:
        for _ in range(3):
            parameter.sum().backward()
            optimiser.step()
        before, deadline = heart.count, time.monotonic() + 120
        # The beat under way may have begun before the last step, and the first ones before this thread left the heart's code.
        while (beat := json.loads(store.get("rank0") or '{"count": 0}'))["count"] < max(before + 2, 4):
            assert time.monotonic() < deadline, beat
            time.sleep(0.02)
    assert beat["steps"] == 3 and beat["count"] > 2 and beat["where"] == "outside"
    last = json.loads(store.get("rank0"))
    assert last["ended"] and not beat["ended"]
    time.sleep(0.2)
    assert json.loads(store.get("rank0")) == last
    optimiser.step()
    assert json.loads(store.get("rank0"))["steps"] == 3


def test_where_a_thread_is(store):
    reached, looked = threading.Event(), threading.Event()

    class Slow(Store):
        def get(self, name):
            reached.set()
            looked.wait(120)

    thread = threading.Thread(target=lambda: Slow("k").error())
    thread.start()
    assert reached.wait(120)
    there = where(thread.ident)
    looked.set()
    thread.join()
    assert there.startswith("train/heartbeat.py:") and there.endswith(" error")


def test_an_error_travels(store):
    assert store.error() is None
    store.leave_error(DfssdError("what", where="here", todo="that"))
    assert isinstance(store.error(), DfssdError) and store.error().todo == "that"
