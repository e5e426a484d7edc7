"""Processes that load images beside the training: how many, how they start, and what goes through them.

They are forked from a server that was started for it and has no threads. A fork of the training process itself would copy
locks that threads of Ray, CUDA or MLflow may hold at that moment. (Python's `forkserver`; the server imports what loading
needs once, so that each process is there within a few hundredths of a second.)
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.utils.data import DataLoader

from dfssd.data.dataset import ManifestDataset, Streams, collate
from dfssd.data.sampling import Draw

AHEAD = 2  # batches that each process has ready
WORTH_STARTING = 8  # validation batches; fewer are loaded sooner than processes start
SHARED = "/dev/shm"  # where batches lie on their way; a container may have little of it
_main_lock = threading.Lock()


def start_server() -> None:
    """Start the server that loading processes are forked from, which takes it some seconds, and do not wait for it."""
    _context()
    with _without_main(), suppress(OSError):
        multiprocessing.forkserver.ensure_running()


def training_loader(
    streams: Streams, sampler: Iterable[Sequence[Draw]], asked: int, device: torch.device, batch_bytes: int
) -> Iterable[dict[str, Any]]:
    """Batches of training samples.

    Args:
        asked: loading processes; -1: as `processes` says; 0: none, samples are made in this process.
        batch_bytes: of the images of a batch, all of which pass through shared memory.
    """
    remote = any(stream.remote for stream in streams.streams.values())
    wanted = processes(device, remote) if asked < 0 else asked
    return Loader(streams, sampler, min(wanted, _that_fit(batch_bytes)), device)


def processes(device: torch.device, remote: bool) -> int:
    """How many loading processes keep a training process from waiting.

    Beside a GPU every core of this worker's share but the one that drives it: those that are not needed sleep, and cost
    little, as they share their code and the cache of pixels. On a CPU the cores are needed for the network.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu":
        return max(1, threads - 1)
    return 1 if threads > 1 or remote else 0  # who waits for a network needs no core


def _that_fit(batch_bytes: int) -> int:
    """Processes whose batches find room in shared memory; at least one."""
    try:
        free = shutil.disk_usage(SHARED).free
    except OSError:
        return sys.maxsize
    return max(1, int(0.8 * free / ((AHEAD + 1) * max(batch_bytes, 1))))


class Loader:
    """A PyTorch `DataLoader` whose processes come from the server. Each iteration starts them anew."""

    def __init__(self, dataset: Any, batches: Iterable[Sequence[Any]], workers: int, device: torch.device) -> None:
        self.num_workers = workers
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=collate,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            prefetch_factor=AHEAD if workers else None,
            multiprocessing_context=_context() if workers else None,
            worker_init_fn=_end_with_parent if workers else None,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with _without_main():
            batches = iter(self._loader)
        return _named(batches)


class LoaderLost(RuntimeError):
    """A loading process has ended by itself. No user error: a worker group goes on from its newest checkpoint, and may well
    find room then."""


def _named(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same batches; where a process that makes them is lost, it is said what that mostly means."""
    try:
        yield from batches
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise LoaderLost(
            f"a process that loads images was ended from outside ({str(error).splitlines()[0]}): mostly the machine has run "
            "out of memory; if it comes again, give fewer --loader-workers, a smaller --batch or more memory"
        ) from error


def validation_batches(
    dataset: ManifestDataset, rank: int = 0, world: int = 1, device: torch.device | None = None
) -> Iterator[dict[str, Any]]:
    """Batches of a validation set in its rectangular order; each rank takes every world-th one.

    Args:
        device: what they are for; beside a GPU they are loaded by processes.
    """
    batches = dataset.batches(rank, world)
    on = device or torch.device("cpu")
    largest = max((h * w for h, w in dataset.batch_shapes), default=1) * 3 * max(map(len, batches), default=1)
    workers = 0
    if on.type != "cpu" and len(batches) >= WORTH_STARTING:
        workers = min(processes(on, dataset.images.remote), len(batches) // 2, _that_fit(largest))
    yield from Loader(dataset, batches, workers, on)


def _end_with_parent(_: int) -> None:
    """A loading process ends when the process that asked for it is gone, however that ended.

    PyTorch's own watch sees the server die, and the server waits for its last child.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a loading process"

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dfssd.data.dataset"])
    return context


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes that start meanwhile do not run the program's main file again, which a user's may not be made for.

    They need nothing of it: Ray's would import Ray, and a script without `if __name__ == "__main__"` would train once more.
    """
    own: dict[str, Any] = vars(sys.modules["__main__"])
    with _main_lock:
        kept: dict[str, Any] = {name: own.pop(name) for name in ("__spec__", "__file__") if name in own}
        own["__spec__"] = None
        try:
            yield
        finally:
            own.update(kept)
