"""A Ray that a job starts for itself: in the background, with our settings, and reachable from this machine only."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, threading, time
from dfssd.runtime import cluster, tasks  # imports Ray, as every job does first of all
import psutil, ray
from ray._private import ray_constants

def until(look, enough, limit_s=100):  # what `look` gives once it is enough, or when the time is over
    deadline = time.monotonic() + limit_s
    while not enough(found := look()) and time.monotonic() < deadline:
        time.sleep(0.3)
    return found

begun = time.monotonic()
cluster.start_early()
early, there = time.monotonic() - begun, cluster._started.is_set()
cluster.connect()
print("RAN", ray.get(ray.remote(lambda: 7).remote(), timeout=100), flush=True)

@ray.remote
def state_api():  # as Ray Train's clean-up asks it, on a machine with other Rays
    from ray.util.state import list_nodes
    return len(list_nodes())

print("NODES", ray.get(state_api.remote(), timeout=100), flush=True)
pending = ray.remote(lambda: 0).options(num_cpus=999).remote()
print("STATE", until(lambda: tasks.task_state(pending), lambda state: "node" in state), flush=True)

def ears():
    listening = []
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            own = process.net_connections(kind="inet")
            listening += [(one.laddr.ip, process.name()) for one in own if one.status == psutil.CONN_LISTEN]
        except psutil.NoSuchProcess:
            continue
    return listening

until(ears, lambda found: len(found) >= 9)  # agents come up last
time.sleep(1)
listening = ears()
free = cluster.free()
ray.shutdown()
print("FOUND", json.dumps({
    "listening": listening, "early_s": early, "there": there, "free": free,
    "uv": ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV, "dedup": ray_constants.env_bool("RAY_DEDUP_LOGS", True),
}))
"""


@pytest.mark.timeout(500)
def test_a_local_ray():
    """Also where `ray start` was used on this machine, as the file says that it leaves: only RAY_ADDRESS makes a job join."""
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    file = Path(env["RAY_TMPDIR"]) / "ray" / "ray_current_cluster"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("127.0.0.1:1")
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=400)
    file.unlink(missing_ok=True)
    assert "RAN 7" in done.stdout, done.stdout + done.stderr[-3000:]
    assert "NODES 1" in done.stdout and "STATE waits for a node" in done.stdout, done.stdout
    found = json.loads(done.stdout.split("FOUND ")[1])
    # GCS, raylet (2), dashboard and its agents (5), driver, worker: each listens, none of them to the world.
    assert len(found["listening"]) >= 9, found["listening"]
    outside = [(ip, name) for ip, name in found["listening"] if ip not in ("127.0.0.1", "::ffff:127.0.0.1", "::1")]
    assert not outside, outside
    assert found["uv"] is False and found["dedup"] is False, "Ray read its settings before they were set"
    assert found["early_s"] < 1 or not found["there"], "a background start does not hold up the job"
    assert "CPUs" in found["free"]


def test_two_jobs_that_start_at_once_choose_two_ports():
    """Ray listens seconds after the port was chosen."""
    first = random.randrange(12_000, 30_000)  # another run of this test may look for ports, too
    choose = f"from dfssd.runtime.ports import free_port; print(free_port({first}), flush=True); input()"
    jobs = [
        subprocess.Popen([sys.executable, "-c", choose], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        ports = [job.stdout.readline().strip() for job in jobs]
        assert len(set(ports)) == 2 and all(ports)
        for job in jobs:
            job.communicate("\n", timeout=120)
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    again = subprocess.run([sys.executable, "-c", choose], input="\n", capture_output=True, text=True, timeout=300)
    assert again.stdout.strip() == min(ports), "a job that has ended leaves nothing behind"
