"""Ray: connect, or start a local one; wait for room with a limit, and say what is missing."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray

from dfssd.config import Config, Run
from dfssd.config.choices import Gpu
from dfssd.errors import DfssdError
from dfssd.runtime.environment import WORKER_ENV, set_driver_environment
from dfssd.runtime.local_ray import watch_local_ray
from dfssd.runtime.placement import (
    Actors,
    Ask,
    CannotPlace,
    Node,
    Resources,
    auto_workers,
    place_actors,
    place_workers,
)
from dfssd.runtime.ports import free_port
from dfssd.runtime.progress import clock

__all__ = ["Actors", "Ask", "Resources"]  # so that whoever asks for room needs one import

PATIENCE_S = 30.0  # for CPUs and GPUs that others have taken: a stage that has just ended gives its own back in seconds
SETTLE_S = 4.0  # of these seconds at most are spent on waiting for more than would do

T = TypeVar("T")
_started: threading.Event | None = None  # of a Ray that is being started in the background


def start_early() -> None:
    """Begin to start the local Ray in the background, for a job that will need it in a while; `connect` waits for it.

    Starting takes seconds in which this process does nothing. A cluster that is named is joined when it is needed: its
    autoscaler would see a driver that asks for nothing.
    """
    global _started
    if ray.is_initialized() or _started is not None or os.environ.get("RAY_ADDRESS"):
        return
    _started = threading.Event()
    threading.Thread(target=_init_in_background, args=(_started,), name="start Ray", daemon=True).start()


def _init_in_background(started: threading.Event) -> None:
    """Start Ray in this thread, and stay: its processes end with the thread that has started them.

    An error comes again, and is told, when `connect` tries.
    """
    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)  # it says that a thread can set no signal handler
    try:
        ray.init(**_settings())
    except (Exception, SystemExit):
        logging.getLogger(__name__).debug("Ray did not start in the background", exc_info=True)
    finally:
        started.set()
    threading.Event().wait()


def _take_back(handler: Any) -> None:
    """SIGTERM is the driver's own again. Ray's handler, which `ray.init` has put below it, writes a stack trace and aborts a
    process that has not ended three seconds later, whatever it is storing."""
    is_driver = ray._private.worker.global_worker.mode == ray.SCRIPT_MODE
    if is_driver and handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def is_half_started(wait_s: float) -> bool:
    """Is a Ray still being started in the background, after so many seconds?"""
    return _started is not None and not _started.wait(wait_s)


def connect() -> None:
    """Join the cluster this process belongs to (RAY_ADDRESS, `ray job submit`), or start a local Ray."""
    if _started is not None:
        _started.wait()
    if ray.is_initialized():
        watch_local_ray()
        _take_back(signal.getsignal(signal.SIGTERM))
        return
    set_driver_environment()
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        _init()
    except Exception as error:  # of Ray's own processes it raises no class of its own
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raw = type(error) is Exception  # the end of a log
        raise DfssdError(
            f"no connection to Ray: {lines[-1 if raw else 0]}",
            where=os.environ.get("RAY_ADDRESS", "local"),
            todo="type the same command again: another program may just have taken a port"
            if raw
            else "check RAY_ADDRESS and, with token authentication, RAY_AUTH_MODE=token; or unset both for a local Ray",
        ) from error
    watch_local_ray()
    _take_back(terminate)


def _init() -> None:
    """`ray.init`; a local Ray is tried once more, since another program may take the port that was just free."""
    try:
        ray.init(**_settings())
    except Exception:  # of several classes, by when the port was taken
        if os.environ.get("RAY_ADDRESS"):
            raise
        ray.shutdown()
        ray.init(**_settings())


def _settings() -> dict[str, Any]:
    """What `ray.init` is told."""
    env = {k: os.environ.get(k, v) for k, v in WORKER_ENV.items()}
    settings: dict[str, Any] = {"logging_level": logging.WARNING}
    if not os.environ.get("RAY_ADDRESS"):
        # The dashboard (on loopback) also serves the state API, which Ray Train's clean-up of a stopped run needs. It would
        # look for it among all Rays of the machine, and give up where there are several: so it is told which is its own.
        # "local": without it Ray looks for one that somebody has started on this machine with `ray start`, by a file that a
        # cluster which crashed leaves behind, and finds that our settings are none for a cluster that is there.
        port = free_port(8265)
        env["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
        settings |= {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
        settings |= {"address": "local", "object_store_memory": _object_store_bytes()}
    return settings | {"runtime_env": {"env_vars": env}}


def _object_store_bytes() -> int:
    """A tenth of the memory, between 128 MiB and 2 GiB: only batches of images pass through the object store."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(max(total // 10, 128 * 2**20), 2 * 2**30))


def nodes_now() -> list[Node]:
    """The nodes that are alive, and what of each is free."""
    from ray._private.state import available_resources_per_node  # ray.nodes() knows totals only

    free, found = available_resources_per_node(), []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        own, left = node["Resources"], free.get(node["NodeID"], {})
        found.append(
            Node(
                cpus=float(own.get("CPU", 0)),
                gpus=float(own.get("GPU", 0)),
                memory_gib=float(own.get("memory", 0)) / 2**30,
                free_cpus=float(left.get("CPU", 0)),
                free_gpus=float(left.get("GPU", 0)),
                free_memory_gib=float(left.get("memory", 0)) / 2**30,
            )
        )
    return found


def _settled() -> list[Node]:
    """The nodes once all is free that is about to be, or after a few seconds, at the moment when most was free."""
    deadline, best = time.monotonic() + SETTLE_S, nodes_now()
    while time.monotonic() < deadline and any(n.free_cpus < n.cpus or n.free_gpus < n.gpus for n in best):
        time.sleep(0.25)
        seen = nodes_now()
        if sum(n.free_cpus + n.free_gpus for n in seen) >= sum(n.free_cpus + n.free_gpus for n in best):
            best = seen
    return best


def wait_for_room(run: Run, place: Callable[[Sequence[Node]], T], bundle: dict[str, float], count: int = 1) -> T:
    """What `place` finds room for; waits for an autoscaler as long as `--wait-min` allows, else for others a moment only.

    Args:
        place: from `runtime.placement`; raises CannotPlace.
        bundle, count: what an autoscaler is asked for.

    Raises:
        DfssdError: no room in time. Ray itself would wait for ever.
    """
    begun, said, asked = time.monotonic(), 0.0, False
    try:
        while True:
            try:
                return place(_settled())
            except CannotPlace as error:
                lacks = error
            patience = max(run.wait_min * 60, PATIENCE_S if lacks.taken else 0.0)
            now = time.monotonic()
            if now - begun >= patience:
                raise DfssdError(
                    lacks.lacks,
                    where=describe(),
                    todo="lower --num-workers or --cpus-per-worker, add nodes, or with an autoscaler raise --wait-min",
                )
            if run.wait_min and not asked:
                asked = True
                _ask_autoscaler([bundle] * count)
            if now - said > 10:
                said = now
                print(f"cluster: {lacks.lacks}; waiting, {clock(now - begun)} of {clock(patience)}", flush=True)
            time.sleep(1)
    finally:
        if asked:
            _ask_autoscaler([])  # else it would keep these nodes for ever


def _ask_autoscaler(bundles: list[dict[str, float]]) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles)


def ask_of(run: Run) -> Ask:
    """What the settings say of the training workers."""
    low, high = run.workers
    return Ask(low, high, run.cpus_per_worker, run.gpu)


def worker_resources(run: Run) -> Resources:
    """Share the cluster among the training workers, each of which lies on one node.

    Raises:
        DfssdError: the cluster cannot hold them; says what is asked for and what there is.
    """
    ask = ask_of(run)
    return wait_for_room(run, lambda nodes: place_workers(nodes, ask), _bundle(run), ask.low)


def task_resources(run: Run, gpu: Gpu = "never") -> Resources:
    """What the one task of a stage gets: all CPUs of the node that has most of them free, as `--cpus-per-worker` allows.

    Args:
        gpu: as the setting of that name, for a task that computes on one.
    """
    ask = Ask(1, 1, run.cpus_per_worker, gpu, "task")
    bundle = {"CPU": max(1.0, ask.cpus), **({"GPU": 1.0} if gpu == "require" else {})}
    return wait_for_room(run, lambda nodes: place_workers(nodes, ask), bundle)


def actor_resources(run: Run, asked: int) -> Actors:
    """What the labelling actors get."""
    return wait_for_room(run, lambda nodes: place_actors(nodes, asked, run.gpu), _bundle(run), max(1, asked))


def _bundle(run: Run) -> dict[str, float]:
    return {"CPU": float(max(1, run.cpus_per_worker)), **({"GPU": 1.0} if run.gpu == "require" else {})}


def with_workers(config: Config) -> Config:
    """The config with `--num-workers auto` replaced by what the cluster has: its GPUs, or its nodes with CPUs.

    Waits like `worker_resources` where it has neither.
    """
    run = config.run
    if run.num_workers != "auto":
        return config
    ask = Ask(1, 1, run.cpus_per_worker, run.gpu)

    def place(nodes: Sequence[Node]) -> int:
        place_workers(nodes, ask)
        return auto_workers(nodes, run.gpu, config.most_workers())

    count = wait_for_room(run, place, _bundle(run))
    return config.model_copy(update={"run": run.model_copy(update={"num_workers": str(count)})})


def free() -> str:
    """What is free now, node by node, in words."""
    return ", ".join(
        f"{n.free_cpus:g} of {n.cpus:g} CPUs" + (f" and {n.free_gpus:g} of {n.gpus:g} GPUs" if n.gpus else "")
        for n in nodes_now()
    )


def describe() -> str:
    """Nodes, CPUs, GPUs and memory of the cluster in one line."""
    total = ray.cluster_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    memory = float(total.get("memory", 0)) / 2**30
    return f"{nodes} node(s), {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs, {memory:.1f} GiB memory"
