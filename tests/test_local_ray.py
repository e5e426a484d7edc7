"""A Ray that a job starts for itself: in the background, with our settings, and reachable from this machine only."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, threading, time
from dfssd.runtime import cluster, tasks  # imports Ray, as every job does first of all
import psutil, ray
from ray._private import ray_constants

begun = time.monotonic()
cluster.start_early()
early = time.monotonic() - begun
cluster.connect()
print("RAN", ray.get(ray.remote(lambda: 7).remote(), timeout=60))

@ray.remote
def state_api():  # as Ray Train's clean-up asks it, on a machine with other Rays
    from ray.util.state import list_nodes
    return len(list_nodes())

print("NODES", ray.get(state_api.remote(), timeout=60))
pending = ray.remote(lambda: 0).options(num_cpus=999).remote()
time.sleep(1)
print("STATE", tasks.task_state(pending))
time.sleep(2)  # agents come up last
me, listening = psutil.Process(), []
for process in [me, *me.children(recursive=True)]:
    for one in process.net_connections(kind="inet"):
        if one.status == psutil.CONN_LISTEN:
            listening.append((one.laddr.ip, process.name()))
free = cluster.free()
ray.shutdown()
print("FOUND", json.dumps({
    "listening": listening, "early_s": early, "free": free,
    "uv": ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV, "dedup": ray_constants.env_bool("RAY_DEDUP_LOGS", True),
}))
"""


def test_a_local_ray():
    """Also where `ray start` was used on this machine, as the file says that it leaves: only RAY_ADDRESS makes a job join."""
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    file = Path(env["RAY_TMPDIR"]) / "ray" / "ray_current_cluster"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("127.0.0.1:1")
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=200)
    file.unlink(missing_ok=True)
    assert "RAN 7" in done.stdout, done.stdout + done.stderr[-3000:]
    assert "NODES 1" in done.stdout and "STATE waits for a node" in done.stdout, done.stdout
    found = json.loads(done.stdout.split("FOUND ")[1])
    # GCS, raylet (2), dashboard and its agents (5), driver, worker: each listens, none of them to the world.
    assert len(found["listening"]) >= 9
    outside = [(ip, name) for ip, name in found["listening"] if ip not in ("127.0.0.1", "::ffff:127.0.0.1", "::1")]
    assert not outside, outside
    assert found["uv"] is False and found["dedup"] is False, "Ray read its settings before they were set"
    assert found["early_s"] < 1, "a background start does not hold up the job"
    assert "CPUs" in found["free"]


def test_two_jobs_that_start_at_once_choose_two_ports():
    """Ray listens seconds after the port was chosen."""
    choose = "from dfssd.runtime import cluster; print(cluster._free_port(18265), flush=True); input()"
    jobs = [
        subprocess.Popen([sys.executable, "-c", choose], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ports = [job.stdout.readline().strip() for job in jobs]
    assert len(set(ports)) == 2 and all(ports)
    for job in jobs:
        job.communicate("\n")
    again = subprocess.run([sys.executable, "-c", choose], input="\n", capture_output=True, text=True)
    assert again.stdout.strip() == min(ports), "a job that has ended leaves nothing behind"
