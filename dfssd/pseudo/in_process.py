"""Labelling in one process, without Ray: the same stages on the same shards, side by side in threads.

For experiments and benchmarks on one machine (no cluster, no tracking), and for data so small that starting actors would take
longer than the work. What is written is the same, so a labelling may begin here and go on in the job, or the other way round.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch

from dfssd.config import Config
from dfssd.data.manifest import Manifest
from dfssd.pseudo.shards import Log, Shard, Tally, decode_shard, fuse_and_write, summarise, unfinished
from dfssd.pseudo.teachers import load_teachers
from dfssd.runtime.storage import Storage

PROCESSES_FROM = 4  # cores from which fusing views, which is Python, gets processes of its own


def label_in_process(
    config: Config,
    run: Storage,
    folder: str,
    manifest: Manifest,
    weights: Sequence[str],
    device: torch.device | None = None,
    log: Log = lambda metrics, images: None,
    cores: int = 0,
) -> dict[str, Any]:
    """As `pseudo.labeller.label`, in this process.

    Args:
        device: default the first GPU, or the CPU where there is none or `--gpu never`.
        cores: that it may use; default those of the machine.
    """
    store = run.at(folder)
    todo = unfinished(config, store, manifest, folder)
    if todo:
        usable = torch.cuda.is_available() and config.run.gpu != "never"
        device = device or torch.device("cuda" if usable else "cpu")
        teachers = load_teachers(config, run, weights, manifest.names, device)
        tally = Tally(config, folder, todo, len(manifest.rows), log)
        finish = partial(
            fuse_and_write, run_uri=run.uri, folder=folder, settings=config.pseudo, side=config.train.imgsz
        )
        for row in stream(todo, partial(_decode, config=config), teachers, finish, cores):
            tally.add(row)
    return summarise(config, store, manifest)


def _decode(row: Shard, config: Config) -> Shard:
    return decode_shard(row, config.train.imgsz, config.train)


def stream(
    todo: Sequence[Shard],
    decode: Callable[[Shard], Shard],
    networks: Callable[[Shard], Shard],
    finish: Callable[[Shard], Shard],
    cores: int = 0,
) -> Iterator[Shard]:
    """Shards through three stages side by side: decoding ahead in threads, networks in this thread, the rest behind.

    Args:
        cores: default those of the machine; half of them decode.
    """
    cores = cores or os.cpu_count() or 1
    ahead = max(1, cores // 2)
    own: Executor = ThreadPoolExecutor(1)
    if cores >= PROCESSES_FROM:
        own = ProcessPoolExecutor(max(1, cores // 4), mp_context=get_context("spawn"))
    with ThreadPoolExecutor(ahead) as readers, own as finishers:
        try:
            decoded: deque[Future[Shard]] = deque(readers.submit(decode, s) for s in todo[: ahead + 1])
            behind: deque[Future[Shard]] = deque()
            for k in range(len(todo)):
                row = decoded.popleft().result()
                if k + ahead + 1 < len(todo):
                    decoded.append(readers.submit(decode, todo[k + ahead + 1]))
                behind.append(finishers.submit(finish, networks(row)))
                while behind and (behind[0].done() or len(behind) > 2 * ahead):
                    yield behind.popleft().result()
            while behind:
                yield behind.popleft().result()
        finally:
            readers.shutdown(wait=False, cancel_futures=True)
            finishers.shutdown(wait=False, cancel_futures=True)
