"""Ray: connect, or start a local one; say what is missing instead of waiting for ever."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from typing import Any

import ray

from dfssd.config import Run
from dfssd.environment import WORKER_ENV, set_driver_environment
from dfssd.errors import DfssdError


@dataclass(frozen=True)
class Resources:
    """What one training worker gets."""

    cpus: float
    threads: int
    gpu: bool

    @classmethod
    def of_share(cls, cpus: float, gpu: bool) -> Resources:
        """Whole CPUs of a share, or a little less than a share below one, so that all shares always fit."""
        cpus = float(int(cpus)) if cpus >= 1 else round(cpus * 0.95, 2)
        return cls(cpus=cpus, threads=max(1, int(cpus)), gpu=gpu)

    def describe(self, workers: int) -> str:
        """What each of so many workers has, in words."""
        return f"{workers} worker(s) with {self.cpus:g} CPUs{' and a GPU' if self.gpu else ''}"


def connect() -> None:
    """Join the cluster this process belongs to (RAY_ADDRESS, `ray job submit`), or start a local Ray."""
    if ray.is_initialized():
        return
    set_driver_environment()
    settings: dict[str, Any] = {
        "runtime_env": {"env_vars": {k: os.environ.get(k, v) for k, v in WORKER_ENV.items()}},
        "logging_level": logging.WARNING,
    }
    if not os.environ.get("RAY_ADDRESS"):
        # The dashboard (on loopback) also serves the state API, which Ray Train's clean-up of a stopped run needs.
        settings |= {"include_dashboard": True, "dashboard_host": "127.0.0.1"}
        settings |= {"object_store_memory": _object_store_bytes()}
    try:
        ray.init(**settings)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise DfssdError(
            f"no connection to Ray: {str(error).splitlines()[0]}",
            where=os.environ.get("RAY_ADDRESS", "local"),
            todo="check RAY_ADDRESS and, with token authentication, RAY_AUTH_MODE=token; or unset both for a local Ray",
        ) from error


def _object_store_bytes() -> int:
    """A tenth of the memory, between 128 MiB and 2 GiB: only batches of images pass through the object store."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(max(total // 10, 128 * 2**20), 2 * 2**30))


def free_cpus(patience_s: float = 4.0) -> float:
    """CPUs that are free now; waits a little for those that a finished stage is just giving back."""
    most, deadline = 0.0, time.monotonic() + patience_s
    while time.monotonic() < deadline:
        most = max(most, float(ray.available_resources().get("CPU", 0)))
        if most >= float(ray.cluster_resources().get("CPU", 0)):
            break
        time.sleep(0.25)
    return most


def worker_resources(run: Run) -> Resources:
    """Share the cluster among the training workers.

    Raises:
        DfssdError: the cluster can never run them; says what is asked for and what there is.
    """
    total = ray.cluster_resources()
    cpus, gpus = float(total.get("CPU", 0)), float(total.get("GPU", 0))
    use_gpu = run.gpu == "auto" and gpus >= run.num_workers
    if cpus <= 0:
        raise DfssdError(
            "the cluster has no CPU for tasks", where=str(dict(total)), todo="add worker nodes, or give the head CPUs"
        )
    asked = float(run.cpus_per_worker)
    if asked * run.num_workers > cpus:
        raise DfssdError(
            f"{run.num_workers} workers with {run.cpus_per_worker} CPUs each need {asked * run.num_workers:g} CPUs, "
            f"the cluster has {cpus:g}",
            todo="lower --num-workers or --cpus-per-worker, or add nodes",
        )
    share = asked or (free_cpus() or cpus) / run.num_workers
    return Resources.of_share(share, use_gpu)


def describe() -> str:
    """Nodes, CPUs, GPUs and memory of the cluster in one line."""
    total = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    memory = float(total.get("memory", 0)) / 2**30
    return f"{nodes} node(s), {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs, {memory:.1f} GiB memory"
