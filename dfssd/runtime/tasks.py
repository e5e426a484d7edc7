"""Wait for the result of a task, with a limit and never in silence."""

from __future__ import annotations

import time
from typing import Any

import ray

from dfssd.config import Run
from dfssd.errors import DfssdError
from dfssd.runtime.cluster import describe, free
from dfssd.runtime.placement import LEAST_CPUS
from dfssd.runtime.progress import clock

SILENT_S = 30.0  # without a result, after which it is said what is waited for
UNPLACED_S = 300.0  # that a task may wait for a node although there was room for it (and --wait-min, if that is more)
FETCH_S = 300.0  # for a result that is there to come from its node


def result(task: ray.ObjectRef, what: str, run: Run, asks: str) -> Any:
    """`ray.get` that does not wait in silence: every half minute it says what is waited for, and where the task is.

    Args:
        what: the stage, in words; asks: what the task asks for.

    Raises:
        DfssdError: no node took the task although there was room for it, or what the task raised as a user error.
    """
    begun, limit = time.monotonic(), max(UNPLACED_S, run.wait_min * 60)
    unplaced: float | None = None  # since when no node has it: a task whose node was lost waits anew
    while not ray.wait([task], timeout=SILENT_S)[0]:
        state = task_state(task)
        print(f"{what}: {state or 'at work'}, {clock(time.monotonic() - begun)}", flush=True)
        if not state.startswith("waits for a node"):
            unplaced = None
        else:
            now = time.monotonic()
            unplaced = now - SILENT_S if unplaced is None else unplaced
            waited = now - unplaced
            print(f"{what}: it asks for {asks}; {describe()}, {free()} free", flush=True)
            if waited > limit:
                ray.cancel(task, force=True)
                raise DfssdError(
                    f"no node took the task of {what} in {clock(waited)}; it asks for {asks}",
                    where=f"{describe()}, {free()} free",
                    todo="free what others have taken, add nodes, or lower --cpus-per-worker; the same command goes on",
                )
    return ray.get(task, timeout=FETCH_S)


def check_gpu(run: Run) -> str:
    """Name of a GPU of the cluster, as PyTorch sees it in a task that has reserved one.

    Raises:
        DfssdError: it sees none: Ray counts GPUs by itself, and a node may lack the driver or have another CUDA version.
    """
    task = ray.remote(_gpu_name).options(num_cpus=LEAST_CPUS, num_gpus=1, max_retries=0)
    name = str(result(task.remote(), "GPU", run, "a GPU"))
    if not name:
        raise DfssdError(
            "Ray hands out a GPU that PyTorch does not see",
            where=describe(),
            todo="check driver and CUDA version of the node (nvidia-smi, python -m torch.utils.collect_env), "
            "or take --gpu never",
        )
    return name


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def task_state(task: ray.ObjectRef) -> str:
    """Where a task is, in words; '' where that cannot be told (Ray's state API runs with its dashboard)."""
    from ray.util.state import get_task

    words = {
        "PENDING_NODE_ASSIGNMENT": "waits for a node",
        "PENDING_ARGS_AVAIL": "waits for its input",
        "SUBMITTED_TO_WORKER": "starts",
        "RUNNING": "at work",
    }
    try:
        found = get_task(task.task_id().hex(), address=ray.get_runtime_context().gcs_address, timeout=10)
    except Exception:  # the API is there for people; whatever it fails with, the task is none the worse
        return ""
    last = found[-1] if isinstance(found, list) and found else found
    return words.get(str(getattr(last, "state", "")), "")
