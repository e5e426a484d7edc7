"""What tests do to work that others start: let it wait at a place, until its fault or enough of it has come, and see all of
it end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PATIENCE_S = 120.0  # for threads that should come at a time
MARK = "DFSSD_TEST_MARK"  # in the environment of a run and of all that it starts


@contextmanager
def held(*files: Path) -> Iterator[None]:
    """Whoever writes one of these files of a local storage meanwhile waits, so that no run is too fast for what is done to
    it: a pipe that nobody reads stands where they begin to write. Who waits there must have ended when this ends."""
    pipes = [file.with_name(f"{file.name}.part") for file in files]
    for pipe in pipes:
        pipe.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(pipe)
    try:
        yield
    finally:
        for pipe in pipes:
            pipe.unlink(missing_ok=True)


class Crowd:
    """A place where threads wait until `size` of them were there at a time: a proof that they work side by side, on however
    slow a machine. Where they come one by one it is waited for once; `most` says how many there were."""

    def __init__(self, size: int) -> None:
        self.most, self._size, self._there, self._patience_s = 0, size, 0, PATIENCE_S
        self._changed = threading.Condition()

    def join(self) -> None:
        with self._changed:
            self._there += 1
            self.most = max(self.most, self._there)
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self.most >= self._size, timeout=self._patience_s):
                self._patience_s = 0.0
            self._there -= 1


def end_all(mark: str, limit_s: float = 240) -> None:
    """Kill what is left of all that was started with this mark. Ray's workers outlive a killed driver for a moment, may start
    others, and write; some are no longer its children, so all are known by what they inherited."""
    deadline = time.monotonic() + limit_s
    while left := [p for p in psutil.process_iter() if _inherited(p) == mark]:
        assert time.monotonic() < deadline, left
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.1)


def _inherited(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except (psutil.Error, OSError):  # it has ended, or is not ours
        return None
