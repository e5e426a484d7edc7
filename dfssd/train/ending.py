"""A training that is asked to end (Ctrl-C, SIGTERM of a scheduler or a spot machine) leaves a checkpoint first.

The driver writes a request beside the checkpoints; rank 0 sees it, acknowledges, stores a checkpoint after the step it is at
and removes the request. It goes through the storage, which is all that driver and worker surely share.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from dfssd.runtime.storage import Storage

REQUEST = "stop.json"
LOOK_S = 1.0  # between looks for a request
SEEN_S = 6.0  # in which a worker must have seen it; before the first step there is nothing to keep
LIMIT_S = 25.0  # for the checkpoint; schedulers kill after 30 s


class Watch:
    """Looks for a request from a thread of rank 0.

    Args:
        store: of the training's artefact.
        ask: asks the loop for a checkpoint.
    """

    def __init__(self, store: Storage, ask: Callable[[], None]) -> None:
        self.store, self.asked, self._ask, self._done = store, threading.Event(), ask, threading.Event()
        store.delete(REQUEST)  # of a driver that was killed after it had asked
        threading.Thread(target=self._look, daemon=True, name="ending").start()

    def _look(self) -> None:
        while not self._done.wait(LOOK_S):
            try:
                if not self.asked.is_set() and self.store.exists(REQUEST):
                    self.store.write_json(REQUEST, {"seen": True})
                    self._ask()
                    self.asked.set()
            except OSError:  # it is only a courtesy: what storage lacks, the training itself says
                continue

    def stored(self, step: int) -> None:
        """Tell who asked that a checkpoint is stored; call it after each."""
        if self.asked.is_set():
            print(f"asked to end: the checkpoint of step {step} is stored", flush=True)
            self.store.delete(REQUEST)
            self.asked.clear()  # last: who looks meanwhile would take the request for another one

    def close(self) -> None:
        self._done.set()


def ask_for_checkpoint(store: Storage) -> None:
    """Ask the workers for a checkpoint, and wait until it is stored: LIMIT_S at most, SEEN_S where nobody answers."""
    begun = time.monotonic()
    store.write_json(REQUEST, {"seen": False})
    while store.exists(REQUEST):
        waited = time.monotonic() - begun
        try:
            if waited > LIMIT_S or (waited > SEEN_S and not store.read_json(REQUEST).get("seen")):
                store.delete(REQUEST)
                return
        except FileNotFoundError:  # stored since it was looked for
            return
        time.sleep(0.2)


class Signals:
    """Lets the first Ctrl-C or SIGTERM ask for a checkpoint, and only then do what the present handler of Ctrl-C does.

    A second one ends at once. Make it in the main thread.
    """

    def __init__(self, store: Storage) -> None:
        self.store = store
        self._abort: Any = signal.getsignal(signal.SIGINT)
        self._heard: list[int] = []
        self._ready, self._lock, self._over = threading.Event(), threading.Lock(), False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def over(self) -> bool:
        """Tell that the training has ended; was it asked to? It may have made its last step meanwhile, so that nothing was
        left to abort, and who has asked wants no next stage."""
        with self._lock:
            self._over = True
            return bool(self._heard)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._over:
            raise KeyboardInterrupt
        self._heard.append(number)
        if self._ready.is_set() or len(self._heard) > 1:
            self._abort(signal.SIGINT, frame)
            return
        print("\nending: a checkpoint is stored first (once more: at once)", flush=True)
        threading.Thread(target=self._wait_and_abort, daemon=True).start()

    def _wait_and_abort(self) -> None:
        try:
            ask_for_checkpoint(self.store)
        except OSError as error:
            print(f"WARNING: no checkpoint at the end: {error}", flush=True)
        self._ready.set()
        with self._lock:
            if not self._over:
                os.kill(os.getpid(), signal.SIGINT)
