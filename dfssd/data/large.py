"""Large pictures wait for their turn: one of 20,000 x 20,000 px takes 2.4 GB, and all cores may want to open one at once."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dfssd.runtime.free_memory import free_memory

LARGE = 50_000_000  # px from which a picture is large; smaller ones are opened without a look at the memory
PATIENCE_S = 300.0  # for the one before, which may have been stopped


@contextmanager
def turn(pixels: int, need: int) -> Iterator[None]:
    """Wait until a picture may be opened, and keep others waiting, of all threads and processes of this user on the machine.

    Where memory holds as many such pictures as there are cores, nobody waits.

    Args:
        pixels: of the picture.
        need: bytes that opening it takes.
    """
    if pixels < LARGE or free_memory() >= (os.cpu_count() or 1) * need:
        yield
        return
    lock = None
    with suppress(OSError):  # a folder for temporary files that cannot be written: better no lock than no picture
        lock = os.open(Path(tempfile.gettempdir()) / f"dfssd-large-{os.getuid()}", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if lock is not None:
            _wait_for(lock)
        yield
    finally:
        if lock is not None:
            os.close(lock)  # and so another one's turn


def _wait_for(lock: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:  # somebody has it, or this file system knows no locks
            time.sleep(0.02)
