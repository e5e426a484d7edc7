"""Processes that load images beside the training: how many, how they start, and what goes through them.

They are forked from a server that was started for it and has no threads. A fork of the training process itself would copy
locks that threads of Ray, CUDA or MLflow may hold at that moment. (Python's `forkserver`; the server imports what loading
needs once, so that each process is there within a few hundredths of a second.)
"""

from __future__ import annotations

import ctypes
import math
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
MARGIN = 1.5  # processes over those that the mean step needs: some batches take longer than others
STARVED = 0.05  # share of a step that waits for data, above which more processes are started
WARM = 10  # steps that a look at the loader takes in at least
WORTH_STARTING = 8  # validation batches; fewer are loaded sooner than processes start
SHARED = "/dev/shm"  # where batches lie on their way; a container may have little of it
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_main_lock = threading.Lock()


def start_server() -> None:
    """Start the server that loading processes are forked from, which takes it some seconds, and do not wait for it."""
    _context()
    with _without_main(), suppress(OSError):
        multiprocessing.forkserver.ensure_running()


def training_loader(
    streams: Streams, sampler: Iterable[Sequence[Draw]], asked: int, device: torch.device, batch_bytes: int
) -> Supply:
    """Batches of training samples.

    Args:
        asked: loading processes; -1: begin with as many as `processes` says, and follow the step (`Supply.follow`); 0: none,
            samples are made in this process.
        batch_bytes: of the images of a batch, all of which pass through shared memory.
    """
    remote = any(stream.remote for stream in streams.streams.values())
    wanted = processes(device, remote) if asked < 0 else asked
    most = max(wanted, torch.get_num_threads() - 1) if asked < 0 else 0
    return Supply(streams, sampler, wanted, most, device, batch_bytes)


class Supply:
    """Batches from processes whose number may change while they are taken; what is in them does not depend on it.

    Args:
        most: processes there may be; 0: their number stays as it is.
    """

    def __init__(
        self, dataset: Any, batches: Iterable[Sequence[Any]], workers: int, most: int, device: torch.device, bytes_: int
    ) -> None:
        self.num_workers, self.most = min(workers, _that_fit(bytes_)), most
        self._dataset, self._device, self._bytes = dataset, device, bytes_
        self._names = iter(batches)  # each loader takes from it what the one before has left
        self._load_s, self._taken = 0.0, 0
        self._iterators: list[Iterator[dict[str, Any]]] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Start the processes."""
        self._go_on()
        return self._batches()

    def _go_on(self) -> None:
        self._part = _Part(self._names)
        self._iterators.append(iter(Loader(self._dataset, self._part, self.num_workers, self._device)))

    def _batches(self) -> Iterator[dict[str, Any]]:
        while self._iterators:
            for batch in self._iterators[0]:
                self._load_s += batch.pop("load_s")
                self._taken += 1
                yield batch
            del self._iterators[0]

    def follow(self, step_s: float, waited_s: float, batches: int) -> str:
        """Change the number of processes where the step needs more of them, or less than half.

        Args:
            step_s, waited_s: mean time of a step since the last call, and what of it went by waiting for data.
            batches: that this worker takes a step.

        Returns:
            what was done, in words; '' where nothing was.
        """
        steps = self._taken / batches
        if not self.num_workers or self.most <= 1 or steps < WARM or len(self._iterators) > 1:
            return ""
        load_s, self._load_s, self._taken = self._load_s / steps, 0.0, 0
        needed = enough(load_s, step_s - waited_s)
        fit = min(needed, self.most, max(self.num_workers, _that_fit(self._bytes)))
        starved = waited_s > STARVED * step_s and fit > self.num_workers
        if not starved and 2 * needed > self.num_workers:
            return ""
        self._part.over, self.num_workers = True, fit
        self._go_on()  # they load while the last batches of the others are taken
        return f"{fit} loading process(es) from now on: a step of {step_s * 1e3:.0f} ms shows images that take one of them " \
               f"{load_s * 1e3:.0f} ms"  # fmt: skip


class _Part:
    """The rest of an iterator, until somebody else takes it over."""

    def __init__(self, names: Iterator[Sequence[Any]]) -> None:
        self.names, self.over = names, False

    def __iter__(self) -> Iterator[Sequence[Any]]:
        while not self.over:
            try:
                yield next(self.names)
            except StopIteration:
                return


def enough(load_s: float, step_s: float) -> int:
    """Processes that never keep a step waiting whose images take one of them `load_s`."""
    return max(1, math.ceil(MARGIN * load_s / max(step_s, 1e-3) - 1e-6))


def processes(device: torch.device, remote: bool) -> int:
    """How many loading processes to begin with, before any step was measured.

    Beside a GPU every core of this worker's share but the one that drives it. On a CPU the cores are needed for the network.
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
            worker_init_fn=_begin if workers else None,
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
    dataset: ManifestDataset, rank: int = 0, world_size: int = 1, device: torch.device | None = None
) -> Iterator[dict[str, Any]]:
    """Batches of a validation set in its rectangular order; each rank takes every `world_size`-th one.

    Args:
        device: what they are for; beside a GPU they are loaded by processes.
    """
    batches = dataset.batches(rank, world_size)
    on = device or torch.device("cpu")
    largest = max((h * w for h, w in dataset.batch_shapes), default=1) * 3 * max(map(len, batches), default=1)
    workers = 0
    if on.type != "cpu" and len(batches) >= WORTH_STARTING:
        workers = min(processes(on, dataset.images.remote), len(batches) // 2, _that_fit(largest))
    yield from Loader(dataset, batches, workers, on)


def _begin(_: int) -> None:
    """What a loading process does first."""
    _keep_freed_memory()
    _end_with_parent()


def _keep_freed_memory() -> None:
    """Let the C library (glibc) keep what is freed, instead of getting fresh pages from the system for each image."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, 2**29)
        mallopt(_MMAP_THRESHOLD, 2**25)  # bytes; the most that it takes


def _end_with_parent() -> None:
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
