"""The machine's own Ray process dies: the job says so and how to go on, instead of ending without a word."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dfssd.errors import DfssdError

ROOT = Path(__file__).parents[2]
CODE = """
import os, signal, sys, time
from dfssd.cli import main
from dfssd.runtime.cluster import connect

def job():
    import ray
    connect()
    if sys.argv[1] == "shutdown":
        ray.shutdown()
        time.sleep(1.5)
        print("ended in order", flush=True)
        return
    node = ray._private.worker._global_node
    (info,) = node.all_processes[sys.argv[1]]
    os.kill(info.process.pid, signal.SIGKILL)
    if sys.argv[1] == "raylet":
        print(ray.get(ray.remote(lambda: 1).remote()), flush=True)
    time.sleep(60)

main(job)
"""


def test_a_ray_that_does_not_start_ends_in_a_sentence(monkeypatch):
    """Another Ray took the port of the dashboard between the look and the start: Ray raises the end of a log."""
    import ray

    from dfssd.runtime import cluster

    def init(**settings):
        raise Exception(
            "\nThe last 20 lines of dashboard.log:\nTraceback\n  File x\nException: address already in use\n\n"
        )

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "set_driver_environment", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(DfssdError, match="no connection to Ray: Exception: address already in use") as caught:
        cluster.connect()
    assert "same command again" in caught.value.todo

    tried = []

    def only_once(**settings):
        tried.append(settings)
        if len(tried) == 1:
            init()

    monkeypatch.setattr(ray, "init", only_once)
    monkeypatch.setattr(cluster, "watch_local_ray", lambda: None)
    monkeypatch.setattr(cluster, "_take_back", lambda handler: None)
    cluster.connect()
    assert len(tried) == 2, "it starts where the port was taken once"


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(("what", "code"), [("raylet", 2), ("gcs_server", 2), ("shutdown", 0)])
def test_it_is_said_what_was_lost(what, code):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CODE, what], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    if code:
        assert f"the local Ray has lost its {what} (signal 9)" in done.stderr
        assert "the same command goes on" in done.stderr
    else:
        assert "ended in order" in done.stdout and "error:" not in done.stderr
