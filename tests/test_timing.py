"""The dry run's times: measured where the step would run, each kind once, or said to be unknown and why."""

from types import SimpleNamespace

import pytest
from small import tiny_config

from dfssd.errors import DfssdError
from dfssd.pipeline import timing
from dfssd.pipeline.timing import Networks, StepTimer, step_timer, time_step
from dfssd.runtime.placement import Resources

ONE = Resources(1, 1, False)


def test_each_kind_is_timed_once_and_the_place_is_said(tmp_path, monkeypatch):
    calls = []

    def timed(config, networks, resources, unlabelled):
        calls.append((networks.student, networks.teacher, unlabelled))
        return "gpu-node (H100)", 0.5

    monkeypatch.setattr(timing, "time_step", timed)
    timer = StepTimer(tiny_config(tmp_path), ONE, False)
    for _ in range(2):
        assert timer("yolov8n.yaml", False, False) == timer("yolov8n.yaml", True, True) == 0.5
    assert calls == [("yolov8n.yaml", "", False), ("yolov8n.yaml", "yolov8n.yaml", True)]
    assert timer.title == "time from steps measured on gpu-node (H100)"


def test_where_no_node_is_there_yet_no_time_is_made_up(tmp_path):
    timer = StepTimer(tiny_config(tmp_path), None, True, why="there is no node to measure on yet")
    assert timer("yolov8n.yaml", False, False) is None and timer.title.startswith("no times: there is no node")


def test_what_fails_on_the_cluster_is_said_and_not_timed_elsewhere(tmp_path, monkeypatch):
    def fails(self, networks, unlabelled):
        raise DfssdError("a step could not be timed on the cluster: CUDA out of memory")

    monkeypatch.setattr(StepTimer, "_on_cluster", fails)
    timer = StepTimer(tiny_config(tmp_path), ONE, True)
    assert timer("yolov8n.yaml", False, False) is None and "CUDA out of memory" in timer.title


def test_a_real_step(tmp_path):
    place, seconds = time_step(tiny_config(tmp_path), Networks("yolov8n.yaml", None, "yolov8n.yaml"), ONE, True)
    assert "1 thread(s)" in place and 0 < seconds < 60


def test_this_machine_cannot_hold_more_than_it_has(tmp_path, capsys):
    assert step_timer(tiny_config(tmp_path)).resources.cpus >= 1 and "a local Ray" in capsys.readouterr().out
    with pytest.raises(DfssdError, match="9999 CPUs are asked for"):
        step_timer(tiny_config(tmp_path, cpus_per_worker=9999))


def test_a_long_step_is_made_once(tmp_path, monkeypatch):
    """The dry run of a laptop: a step of a large detector takes half a minute there."""
    now = iter(range(0, 1000, 20))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(now)))  # not that of other threads
    _, seconds = time_step(tiny_config(tmp_path), Networks("yolov8n.yaml", None), ONE, False)
    assert seconds == 20 * timing.OVERHEAD and next(now) == 40
