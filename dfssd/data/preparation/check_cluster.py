"""Check a large set on the cluster: a Ray task a shard, on all nodes; the driver holds a row an image and no pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import ray

from dfssd.config import Run
from dfssd.data.checks import Checked
from dfssd.data.preparation.check_shards import FOLDER, Seen, Shard, check_shard, cut, read_if_good, read_shard
from dfssd.data.preparation.grouping import hashes
from dfssd.data.preparation.neighbours import HashFile
from dfssd.errors import DfssdError
from dfssd.runtime.cluster import connect, free, nodes_now, wait_for_room
from dfssd.runtime.placement import Checks, place_checks
from dfssd.runtime.progress import Progress, Silence
from dfssd.runtime.storage import Storage, side_by_side
from dfssd.runtime.tasks import FETCH_S

READ_AT_A_TIME = 16  # shards of an earlier attempt
ASK_AGAIN_S = 20.0  # without a result, after which nodes may have come or gone


@dataclass
class OnStorage:
    """What was seen of every image, in order; thumbnails lie in the shards, hashes in a file of this machine."""

    store: Storage
    shards: list[Shard]
    hashes: HashFile
    seen: list[Seen | None] = field(default_factory=list)

    def add(self, shard: Shard, found: tuple[list[Seen], np.ndarray]) -> None:
        """Take over what is in a shard's file."""
        self.seen[shard.first : shard.first + len(shard.uris)] = found[0]
        self.hashes.put(shard.first, hashes(found[1]))

    def taken(self) -> Iterator[Seen]:
        """What was seen of every image, in order; handed over, so that it is not held twice."""
        for place, one in enumerate(self.seen):
            assert one is not None, f"image {place} was not looked at"
            self.seen[place] = None
            yield one

    def hashes_of(self, chosen: Sequence[Checked]) -> HashFile:
        """Of these images, in their order."""
        return self.hashes.seen_as(np.array([image.place for image in chosen], np.int64))

    def thumb_of(self, image: Checked) -> np.ndarray:
        """(48,48) uint8 of one image, from its shard."""
        shard = self.shards[image.place // len(self.shards[0].uris)]
        return np.asarray(read_shard(self.store, shard)[1][image.place - shard.first])

    def remove(self) -> None:
        """The manifest is written: the shards are not needed any more."""
        self.store.delete(FOLDER)


def check_on_cluster(uris: Sequence[str], max_side: int, store: Storage, run: Run) -> OnStorage:
    """Look at every image, on all nodes; what an earlier attempt has left is not looked at again.

    Raises:
        DfssdError: no room for a task, a node does not see data or storage, or tasks keep dying.
    """
    shards = cut(uris, max_side)
    result = OnStorage(store, shards, HashFile(len(uris)), [None] * len(uris))
    todo = _take_over(result)
    if todo:
        images = sum(len(s.uris) for s in todo)
        connect()
        room = wait_for_room(run, place_checks, {"CPU": 1.0}, 1)
        print(f"checking: {images} images in {len(todo)} shards, {room.describe()}", flush=True)
        progress, bad = Progress("checking", images, "img"), 0
        for shard, count, unusable in _run(todo, store, room):
            try:
                result.add(shard, read_shard(store, shard))
            except FileNotFoundError as error:
                raise DfssdError(
                    "a node has written a file that is not here",
                    where=store.path(shard.file),
                    todo="take a --storage-path that all nodes share: NFS, or s3://, gs://",
                ) from error
            bad += unusable
            progress.add(count, f"{bad} unusable" if bad else "")
    return result


def _take_over(result: OnStorage) -> list[Shard]:
    """Read what an earlier attempt has left; returns the shards that are missing."""
    store, names = result.store, set(result.store.files(FOLDER))
    there, todo = [s for s in result.shards if s.file in names], [s for s in result.shards if s.file not in names]
    parts = iter(there)
    while part := list(islice(parts, READ_AT_A_TIME)):
        read = side_by_side(lambda shard: read_if_good(store, shard), part, not store.is_local)
        for shard, found in zip(part, read, strict=True):
            if found is None:
                todo.append(shard)
            else:
                result.add(shard, found)
    if there:
        done = len(result.shards) - len(todo)
        print(f"checking: resumed, {done} of {len(result.shards)} shards are there", flush=True)
    return sorted(todo, key=lambda s: s.first)


def _run(todo: Sequence[Shard], store: Storage, room: Checks) -> Iterator[tuple[Shard, int, int]]:
    """(shard, images, unusable ones) as tasks end. Two rounds of tasks are submitted at a time, whatever there is to do:
    a driver with a million images would else hold 4,000 of them, and an autoscaler would see them all."""
    task = ray.remote(check_shard).options(num_cpus=room.cpus, memory=int(room.memory_gib * 2**30), max_retries=3)
    waiting, running = iter(todo), dict[ray.ObjectRef, Shard]()
    limit = 2 * room.count
    asks = f"{room.cpus:g} CPUs and {room.memory_gib:g} GiB"
    try:
        with Silence(
            lambda waited: f"checking: no shard for {waited}; a task asks for {asks}, {free()} free"
        ) as silence:
            while True:
                for shard in islice(waiting, limit - len(running)):
                    running[task.remote(shard, store.uri)] = shard
                if not running:
                    return
                done, _ = ray.wait(list(running), timeout=ASK_AGAIN_S)
                limit = max(2, 2 * room.fits(nodes_now())) if not done else limit
                for ref in done:
                    silence.heard()
                    yield _result(ref, running.pop(ref))
    finally:
        for ref in running:
            ray.cancel(ref)


def _result(ref: ray.ObjectRef, shard: Shard) -> tuple[Shard, int, int]:
    """
    Raises:
        DfssdError: the task's own, or its process was lost again and again.
    """
    try:
        return shard, *ray.get(ref, timeout=FETCH_S)
    except DfssdError:
        raise
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError) as error:
        raise DfssdError(
            f"tasks that check images were lost four times: {str(error).splitlines()[0]}",
            where=f"images {shard.first} to {shard.first + len(shard.uris) - 1}, from {shard.uris[0]!r}",
            todo="free memory on the nodes; the same command goes on",
        ) from error
