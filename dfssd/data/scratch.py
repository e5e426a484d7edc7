"""Memory that a thread uses again for each sample: fresh pages cost more than what is written to them.

A sample of 640 px in colour is 1.2 MB, 300 pages. Getting them from the system for each sample took 0.5 ms on a virtual
machine, a quarter of the sample's time; filling them takes 0.02 ms.
"""

from __future__ import annotations

import sys
import threading
from math import prod

import numpy as np

MOST = 2**28  # bytes that a thread keeps for samples; those of a larger batch get memory of their own


class Scratch(threading.local):
    """Arrays of a thread, and the generator that it draws with."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.lent: dict[int, list[np.ndarray]] = {}  # by size
        self.turn = 0
        self.generator = np.random.RandomState(0)  # Ultralytics draws some numbers from NumPy's; a new one takes long

    def array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """uint8, with whatever was in it; the next one of this name lies in the same place."""
        count = prod(shape)
        if name not in self.arrays or self.arrays[name].size < count:
            self.arrays[name] = np.empty(count, np.uint8)
        return self.arrays[name][:count].reshape(shape)

    def lasting(self, shape: tuple[int, ...]) -> np.ndarray:
        """uint8, with whatever was in it; its place is used again once nobody holds it, a view or a tensor of it any more."""
        count = prod(shape)
        own = self.lent.setdefault(count, [])
        for k in range(len(own)):
            place = (self.turn + k) % len(own)  # the one that was given out longest ago
            if _holders(own, place) == _NOBODY:
                self.turn = place + 1
                return own[place].reshape(shape)
        fresh = np.empty(count, np.uint8)
        if sum(size * len(arrays) for size, arrays in self.lent.items()) + count <= MOST:
            own.append(fresh)
        return fresh.reshape(shape)


def _holders(arrays: list[np.ndarray], place: int) -> int:
    return sys.getrefcount(arrays[place])


_NOBODY = _holders([np.empty(0, np.uint8)], 0)
