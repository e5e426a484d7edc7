"""Ray nodes on one machine that share nothing but loopback: an S3 endpoint, an MLflow server, and no files.

Every process of a node lives in a mount namespace of its own, in which the folders of the other nodes and of the driver are
empty. The only things all see are the interpreter and this repository.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-secret", "AWS_DEFAULT_REGION": "us-east-1"}


def can_isolate() -> bool:
    """May this user make mount namespaces?"""
    if not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_cluster(connect: bool = False, **own: object) -> Any:
    """A `ray.cluster_utils.Cluster` with a head of these resources. Once more where another program took the dashboard's port
    that was just free, or the machine was too busy for Ray's patience."""
    import ray
    from ray.cluster_utils import Cluster

    for attempt in range(3):
        head = {**own, "include_dashboard": True, "dashboard_port": free_port()}
        try:
            return Cluster(initialize_head=True, connect=connect, head_node_args=head)
        except Exception as error:
            if attempt == 2:
                raise
            ray.shutdown()
            print(f"Ray did not start, once more: {error}")


class Place:
    """Processes started by a test, each in its own session, and their end."""

    def __init__(self, root: Path) -> None:
        self.root, self.processes = root, []

    def start(
        self, name: str, command: list[str], env: dict[str, str], hidden: tuple[Path, ...] = ()
    ) -> subprocess.Popen:
        """Start a process in `root/name`, with `hidden` folders empty for it and for all that it starts."""
        own = self.root / name
        own.mkdir(exist_ok=True)
        if hidden:
            mounts = " && ".join(f"mount -t tmpfs none '{h}'" for h in hidden)
            command = [
                "unshare",
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                f'{mounts} && exec "$@"',
                "sh",
                *command,
            ]
        with (self.root / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                command, cwd=own, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.processes.append(process)
        return process

    def wait_for(self, url: str, name: str) -> None:
        deadline = time.monotonic() + 90
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(url, timeout=2).close()
                return
            assert time.monotonic() < deadline, (self.root / f"{name}.log").read_text()[-3000:]
            time.sleep(0.2)

    def stop(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def clean_environment() -> dict[str, str]:
    """The environment without what leads to other clusters and servers."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_", "MLFLOW_"))}


def token_environment() -> dict[str, str]:
    """A clean environment, and a token of its own for Ray."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.urandom(16).hex(), "RAY_USAGE_STATS_ENABLED": "0"}
    return {**clean_environment(), **token}


@contextlib.contextmanager
def services(root: Path) -> Iterator[tuple[Place, dict[str, str]]]:
    """An S3 endpoint and an MLflow server; yields what starts more, and the environment that leads to them."""
    place, s3, tracking = Place(root), free_port(), free_port()
    env = {
        **token_environment(),
        **KEYS,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        place.start("s3", [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(s3)], env)
        backend = [
            "--backend-store-uri",
            f"sqlite:///{root}/mlflow.db",
            "--artifacts-destination",
            str(root / "artefacts"),
        ]
        own = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(tracking),
            "--workers",
            "1",
        ]
        place.start("mlflow", [*own, *backend], clean_environment())
        place.wait_for(env["AWS_ENDPOINT_URL"], "s3")
        place.wait_for(f"http://127.0.0.1:{tracking}/health", "mlflow")
        yield place, {**env, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{tracking}"}
    finally:
        place.stop()


def start_nodes(
    place: Place,
    env: dict[str, str],
    cpus: tuple[int, ...] = (2, 2),
    gpus: tuple[int, ...] = (0, 0),
    isolated: bool = True,
) -> str:
    """A head on 127.0.0.2 and more nodes on 127.0.0.3 and above, named a, b, c ...; returns the address of the cluster.

    Args:
        cpus, gpus: of each node; GPUs are made up.
        isolated: none sees the others' folders, or the driver's.
    """
    port, dashboard, ray = free_port(), free_port(), place.root / "ray"
    ray.mkdir()
    common = ["--object-store-memory", str(150 * 2**20), "--disable-usage-stats", "--block"]
    own = [["--num-cpus", str(c), "--num-gpus", str(g), *common] for c, g in zip(cpus, gpus, strict=True)]
    names = [chr(ord("a") + k) for k in range(len(own))]
    folders = {name: place.root / name for name in (*names, "driver")}
    for folder in folders.values():
        folder.mkdir()
    for k, name in enumerate(names):
        hidden = tuple(folder for other, folder in folders.items() if other != name) if isolated else ()
        words = ["--node-ip-address", f"127.0.0.{2 + k}"]
        if k == 0:
            hidden = tuple(h for h in hidden if h.name != "driver")
            words += ["--head", "--port", str(port), "--temp-dir", str(ray)]
            words += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
        else:
            hidden = (*hidden, ray) if isolated else ()
            words += ["--address", f"127.0.0.2:{port}"]
        place.start(name, [str(BIN / "ray"), "start", *words, *own[k]], env, hidden=hidden)
        if k == 0:
            _until_listening(place, port)
        if not isolated:
            _until_there(place, ray / "session_latest/sockets", k + 1)
    return f"127.0.0.2:{port}"


def _until_there(place: Place, sockets: Path, nodes: int) -> None:
    """Nodes of one folder take the first free name for their sockets: two that start at once take the same, and one dies."""
    deadline = time.monotonic() + 90
    while len(list(sockets.glob("raylet*"))) < nodes:
        assert time.monotonic() < deadline, "".join(log.read_text()[-1000:] for log in sorted(place.root.glob("?.log")))
        time.sleep(0.2)


def _until_listening(place: Place, port: int) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.2", port), 1):
            return
        time.sleep(0.2)
    raise AssertionError((place.root / "a.log").read_text()[-3000:])
