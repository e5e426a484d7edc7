"""Signs of life of the training workers, so that nobody waits in silence: which rank is waited for, and where it is.

Each worker has a thread that leaves a beat every few seconds: how many steps it has made, and at which line of this package
it is. A stopped or lost process leaves none; one that hangs says where. The driver watches them and prints a line within a
minute. What a worker has to say to all others (a user error) travels the same way.

Beats lie in the key-value store of Ray's control service, which every process is connected to anyway: no further actor.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from dfssd.errors import DfssdError
from dfssd.runtime.progress import clock

BEAT_S = 3.0
START_S = 45.0  # without a worker's first sign of life, after which it is said what the group asks for
SILENT_S = 30.0  # without a beat, after which a rank is named
STUCK_S = 50.0  # without a step of any rank, after which it is said where each of them is
AGAIN_S = 60.0  # between two lines that say the same
NAMESPACE = b"dfssd"


class Store:
    """Small values under a key, seen by driver and workers of one training."""

    def __init__(self, key: str) -> None:
        self.key = key

    def put(self, name: str, value: bytes) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(f"{self.key}/{name}", value, overwrite=True, namespace=NAMESPACE)

    def get(self, name: str) -> bytes | None:
        from ray.experimental.internal_kv import _internal_kv_get

        found: bytes | None = _internal_kv_get(f"{self.key}/{name}", namespace=NAMESPACE)
        return found

    def clear(self) -> None:
        from ray.experimental.internal_kv import _internal_kv_del

        _internal_kv_del(self.key, del_by_prefix=True, namespace=NAMESPACE)

    def leave_error(self, error: DfssdError) -> None:
        self.put("error", pickle.dumps(error))

    def error(self) -> DfssdError | None:
        """The user error that a worker has met."""
        found = self.get("error")
        error: DfssdError | None = pickle.loads(found) if found else None
        return error


class Heart:
    """Beats of one worker, from its own thread; a context.

    Args:
        on_beat: called after each, in that thread.
    """

    def __init__(self, store: Store, rank: int, size: int, on_beat: Callable[[], None] | None = None) -> None:
        self.store, self.rank, self.size, self.on_beat = store, rank, size, on_beat
        self.steps, self.count = 0, 0
        self._works = threading.get_ident()  # the thread that trains
        self._end = threading.Event()

    def __enter__(self) -> Heart:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self._hook = register_optimizer_step_post_hook(self._stepped)
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()  # the thread leaves a last beat, which says that this rank has ended
        self._hook.remove()
        self._thread.join(10)

    def _stepped(self, *_: Any) -> None:
        self.steps += 1

    def _beat(self) -> None:
        who = {"size": self.size, "node": socket.gethostname(), "ip": _address(), "pid": os.getpid()}
        ended = False
        while not ended:
            ended = self.count > 0 and self._end.wait(BEAT_S)
            self.count += 1
            now = {"count": self.count, "steps": self.steps, "ended": ended, "where": where(self._works)}
            try:
                self.store.put(f"rank{self.rank}", json.dumps({**who, **now}).encode())
                if self.on_beat:
                    self.on_beat()
            except Exception as error:  # the control service is away: training goes on, and may outlive that
                print(f"rank {self.rank}: no heartbeat: {error}", file=sys.stderr, flush=True)


def _address() -> str:
    import ray

    return ray.util.get_node_ip_address() if ray.is_initialized() else "127.0.0.1"


def where(thread: int) -> str:
    """The innermost line of this package at which a thread is: 'train/loop.py:86 train'."""
    root = str(Path(__file__).parents[1]) + os.sep
    frame: FrameType | None = sys._current_frames().get(thread)
    while frame is not None and not frame.f_code.co_filename.startswith(root):
        frame = frame.f_back
    if frame is None:
        return "outside"
    return f"{frame.f_code.co_filename[len(root) :]}:{frame.f_lineno} {frame.f_code.co_name}"


@dataclass
class Seen:
    """What the driver knows of a rank: its last beat, and when (by the driver's clock) it came and the last step was made."""

    beat: dict[str, Any]
    beat_at: float
    step_at: float


class Watch:
    """Watches the beats from the driver, in a thread of its own, and prints what is waited for; a context.

    Args:
        stage: begins each line.
        asked: what the group asks for, in words.
        free: what of the cluster is free, in words.
        clock_s: seconds; say: where lines go.
    """

    def __init__(
        self,
        store: Store,
        stage: str,
        asked: str,
        free: Callable[[], str],
        clock_s: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        self.store, self.stage, self.asked, self.free, self.clock_s, self.say = store, stage, asked, free, clock_s, say
        self.ranks: dict[int, Seen] = {}
        self.begun = clock_s()
        self._said: dict[str, float] = {}
        self._end = threading.Event()

    def __enter__(self) -> Watch:
        threading.Thread(target=self._run, name="watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def _run(self) -> None:
        while not self._end.wait(BEAT_S):
            try:
                self.look()
            except Exception as error:  # of the control service; the training itself says when it is lost
                self._tell("watch", f"no signs of life can be read: {error}")

    def look(self) -> None:
        """Read the beats once, and say what there is to say."""
        now = self.clock_s()
        size = self._read(now)
        if not self.ranks:
            if now - self.begun > START_S:
                waited = clock(now - self.begun)
                self._tell(
                    "start", f"no worker has started in {waited}; {self.asked} are asked for, {self.free()} free"
                )
            return
        ended = {r for r, seen in self.ranks.items() if seen.beat.get("ended")}
        silent = [r for r in range(size) if r not in self.ranks or now - self.ranks[r].beat_at > SILENT_S]
        silent = [r for r in silent if r not in ended]
        for rank in silent:
            self._tell(f"rank{rank}", self._silence(rank, now))
        since = max(seen.step_at for seen in self.ranks.values())
        if not silent and now - since > STUCK_S and not all(r in ended for r in range(size)):
            places = "; ".join(f"rank {r} is at {self.ranks[r].beat['where']}" for r in sorted(self.ranks) if r < size)
            self._tell("stuck", f"no step for {clock(now - since)}: {places}")

    def _read(self, now: float) -> int:
        """Take in the beats; return the size of the group."""
        size = max((seen.beat["size"] for seen in self.ranks.values()), default=1)
        rank = 0
        while rank < size:
            found = self.store.get(f"rank{rank}")
            if found is not None:
                self._take(rank, json.loads(found), now)
                size = self.ranks[0].beat["size"] if 0 in self.ranks else size
            rank += 1
        return size

    def _take(self, rank: int, beat: dict[str, Any], now: float) -> None:
        before = self.ranks.get(rank)
        if before is None or before.beat["pid"] != beat["pid"]:
            self.ranks[rank] = Seen(beat, now, now)
        elif before.beat["count"] != beat["count"]:
            step_at = now if beat["steps"] != before.beat["steps"] else before.step_at
            self.ranks[rank] = Seen(beat, now, step_at)

    def _silence(self, rank: int, now: float) -> str:
        seen = self.ranks.get(rank)
        if seen is None:
            return f"waits for rank {rank}, which has not begun; {self.asked} are asked for, {self.free()} free"
        beat = seen.beat
        return (
            f"waits for rank {rank} (pid {beat['pid']} on {beat['node']}, {beat['ip']}): no sign of life for "
            f"{clock(now - seen.beat_at)}; it had made {beat['steps']} steps and was at {beat['where']}"
        )

    def _tell(self, what: str, text: str) -> None:
        now = self.clock_s()
        if now - self._said.get(what, float("-inf")) >= AGAIN_S:
            self._said[what] = now
            self.say(f"{self.stage}: {text}")
