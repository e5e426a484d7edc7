"""Whoever is about to be stopped asks for a checkpoint first: a flag that the loop looks at after each step.

Who asks: the clock (`--checkpoint-min`), SIGTERM, a preemption notice of the cluster (`ask` from any thread). Workers
agree on it by a number in the one reduction that every step makes anyway.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

NOTHING, CHECKPOINT, STOP = 0.0, 1.0, 1000.0  # added over workers: any STOP outweighs all CHECKPOINTs


class Interrupt:
    """What somebody wants from the loop.

    Args:
        every_s: seconds between checkpoints; 0: none by the clock.
        clock: seconds that never jump back.
    """

    def __init__(self, every_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.every_s, self._clock = every_s, clock
        self._asked, self._stored = NOTHING, clock()

    def ask(self, stop: bool = False) -> None:
        """Ask for a checkpoint after the present step, and with `stop` to end there. From any thread, or a handler."""
        self._asked = max(self._asked, STOP if stop else CHECKPOINT)

    def wanted(self) -> float:
        """What is wanted now: NOTHING, CHECKPOINT or STOP."""
        due = self.every_s > 0 and self._clock() - self._stored >= self.every_s
        return max(self._asked, CHECKPOINT if due else NOTHING)

    def stored(self) -> None:
        """A checkpoint was written: the clock starts anew, and nobody needs another. Who asked to end still does."""
        self._asked, self._stored = self._asked if self._asked >= STOP else NOTHING, self._clock()


@contextmanager
def on_sigterm(interrupt: Interrupt) -> Iterator[None]:
    """SIGTERM asks the loop to store and end; a second one ends the process at once. Outside the main thread: nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        interrupt.ask(stop=True)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
