"""Latency: what the machine does meanwhile falls on all networks alike, and a busy machine is called busy."""

import time

import numpy as np
import pytest
import torch

from dfssd.evaluate.latency import measure_latency
from dfssd.models.yolo.detector import build_detector
from dfssd.models.yolo.predict import predict

IMAGE = torch.zeros(1, 3, 64, 64)


class Machine:
    """A clock, and networks that take `cost` seconds of it, more or less as the machine is slow at that moment."""

    def __init__(self, slowness):
        self.now, self.slowness = 0.0, slowness

    def clock(self):
        return self.now

    def network(self, cost_s):
        def call(_):
            self.now += cost_s * self.slowness(self.now)

        return call


def _timed(machine, costs, repeats=60):
    networks = {f"n{k}": machine.network(cost) for k, cost in enumerate(costs)}
    return measure_latency(networks, IMAGE, repeats=repeats, clock=machine.clock)


def test_equal_networks_agree_while_the_machine_slows_down():
    """Timed one after another, the first of three would seem twice as fast as the last."""
    machine = Machine(lambda now: 1 + now / 2)  # three times slower in the end
    found = _timed(machine, [0.01, 0.01, 0.005])
    p50 = [t.p50_ms for t in found.timings.values()]
    assert p50[0] == pytest.approx(p50[1], rel=0.05) and p50[2] == pytest.approx(p50[0] / 2, rel=0.05)
    assert not found.busy and "BUSY" not in found.note and found.warmup == 12 and machine.now > 1.5


def test_a_busy_machine_is_called_busy():
    rng = np.random.default_rng(0)
    machine = Machine(lambda now: 10 ** rng.uniform(-1, 1))
    found = _timed(machine, [0.01, 0.01], repeats=20)
    assert found.busy and "THE MACHINE WAS BUSY" in found.note and found.as_dict()["busy"]


def test_the_quietest_measurement_counts():
    """A neighbour who leaves after a while spoils only what was measured until then."""
    rng = np.random.default_rng(1)
    machine = Machine(lambda now: 10 ** rng.uniform(0, 2) if now < 2 else 1)
    found = _timed(machine, [0.01, 0.02], repeats=20)
    assert [t.p50_ms for t in found.timings.values()] == pytest.approx([10, 20]) and not found.busy


def test_percentiles():
    calls = iter(range(10_000))
    machine = Machine(lambda now: 10 if next(calls) % 10 == 0 else 1)
    found = _timed(machine, [0.01], repeats=100)
    assert found.timings["n0"].p50_ms == pytest.approx(10) and found.timings["n0"].p95_ms == pytest.approx(100)


def test_real_networks():
    torch.manual_seed(0)
    one, two = (build_detector("yolov8n.yaml", ["a"], 64).eval() for _ in range(2))
    networks = {n: lambda x, m=m: predict(m, x, 0.25, 0.7, 300) for n, m in (("one", one), ("two", two))}
    # By the time that this thread computes, whatever the machine does beside it.
    found = measure_latency(networks, torch.rand(1, 3, 64, 64), repeats=15, threads=1, clock=time.thread_time)
    times = [t.p50_ms for t in found.timings.values()]
    assert found.busy or times[0] == pytest.approx(times[1], rel=0.5), found
    assert found.device == "cpu" and found.imgsz == 64 and torch.get_num_threads() == 1
    assert all(0 < t.p50_ms <= t.p95_ms for t in found.timings.values())
