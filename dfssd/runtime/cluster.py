"""Ray: connect, or start a local one; say what is missing instead of waiting for ever."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from typing import Any

import ray

from dfssd.config import Config, Run
from dfssd.errors import DfssdError
from dfssd.runtime.environment import WORKER_ENV, set_driver_environment
from dfssd.runtime.progress import clock


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

    def describe(self, workers: str | int) -> str:
        """What each of so many workers (2, or 1:4) has, in words."""
        return (
            f"{str(workers).replace(':', ' to ')} worker(s) with {self.cpus:g} CPUs{' and a GPU' if self.gpu else ''}"
        )


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
    _wait_for_room(run)
    total = ray.cluster_resources()
    cpus, gpus = float(total.get("CPU", 0)), float(total.get("GPU", 0))
    low, high = run.workers
    use_gpu = run.gpu != "never" and gpus >= low
    asked = float(run.cpus_per_worker)
    share = asked or (free_cpus() or cpus) / low
    if high > low and not asked:
        share = min(share, _cpus_of_a_place(use_gpu))
    return Resources.of_share(share, use_gpu)


def _wait_for_room(run: Run) -> None:
    """Return once the fewest workers fit; ask an autoscaler for them where `--wait-min` allows it the time.

    Raises:
        DfssdError: they do not fit in time. Ray itself would wait for ever.
    """
    lacks = lacking(run, alive_nodes())
    if lacks and run.wait_min:
        from ray.autoscaler.sdk import request_resources

        each = {"CPU": max(1, run.cpus_per_worker), **({"GPU": 1} if run.gpu == "require" else {})}
        request_resources(bundles=[each] * run.workers[0])
    begun, said = time.monotonic(), 0.0
    while lacks and time.monotonic() - begun < run.wait_min * 60:
        if time.monotonic() - said > 10:
            said = time.monotonic()
            waited = clock(said - begun)
            print(f"cluster: {lacks}; waiting for nodes, {waited} of {clock(run.wait_min * 60)}", flush=True)
        time.sleep(1)
        lacks = lacking(run, alive_nodes())
    if lacks:
        raise DfssdError(
            lacks,
            where=describe(),
            todo="lower --num-workers or --cpus-per-worker, add nodes, or with an autoscaler raise --wait-min",
        )


def alive_nodes() -> list[dict[str, float]]:
    """Resources of each node that takes tasks."""
    return [n["Resources"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) > 0]


def lacking(run: Run, nodes: list[dict[str, float]]) -> str:
    """What is missing for the fewest workers of a run, in words; '' where they fit.

    Args:
        nodes: resources of each node. A worker lies on one node: CPUs of two do not make one worker.
    """
    low, each = run.workers[0], run.cpus_per_worker
    cpus = sum(n["CPU"] for n in nodes)
    if not nodes:
        return "the cluster has no CPU for tasks"
    if each * low > cpus:
        return f"{low} workers with {each} CPUs each need {each * low} CPUs, the cluster has {cpus:g}"
    if each and (places := sum(int(n["CPU"] // each) for n in nodes)) < low:
        largest = max(n["CPU"] for n in nodes)
        room = f"there is room for {places}, the largest node has {largest:g} CPUs"
        return f"{low} workers with {each} CPUs each do not fit: {room}"
    if run.gpu == "require" and (gpus := sum(n.get("GPU", 0) for n in nodes)) < low:
        return f"{low} workers with a GPU each need {low} GPUs, the cluster has {gpus:g}"
    return ""


def _cpus_of_a_place(gpu: bool) -> float:
    """CPUs of an elastic worker: those of the smallest node, shared by its GPUs, so that it fits whatever node comes."""
    nodes = [n for n in alive_nodes() if not gpu or n.get("GPU", 0) > 0]
    return float(min(n["CPU"] / (n["GPU"] if gpu else 1) for n in nodes))


def with_workers(config: Config) -> Config:
    """The config with `--num-workers auto` replaced by what the cluster has: its GPUs, or its nodes with CPUs."""
    if config.run.num_workers != "auto":
        return config
    total = ray.cluster_resources()
    gpus = int(total.get("GPU", 0)) if config.run.gpu != "never" else 0
    count = str(max(1, min(gpus or len(alive_nodes()), config.most_workers())))
    return config.model_copy(update={"run": config.run.model_copy(update={"num_workers": count})})


def describe() -> str:
    """Nodes, CPUs, GPUs and memory of the cluster in one line."""
    total = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    memory = float(total.get("memory", 0)) / 2**30
    return f"{nodes} node(s), {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs, {memory:.1f} GiB memory"
