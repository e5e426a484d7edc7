"""What tests do to a run that others start: let it wait at a place until its fault has come, and see all of it end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

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
