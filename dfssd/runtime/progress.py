"""One honest line of progress every few seconds: done, rate, time left. Plain text, so that it survives a job's log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Progress:
    """Counts items and prints a line at most every `every_s` seconds.

    Args:
        what: label of the line.
        total: number of items.
        unit: what an item is, e.g. "img".
        every_s: least time between two lines (s).
    """

    def __init__(self, what: str, total: int, unit: str, every_s: float = 5.0) -> None:
        self.what, self.total, self.unit, self.every_s = what, total, unit, every_s
        self.done, self.begun = 0, time.monotonic()
        self._last = self.begun

    def add(self, count: int = 1, note: str = "") -> None:
        self.done += count
        now = time.monotonic()
        if now - self._last >= self.every_s or self.done >= self.total:
            self._last = now
            print(self.line(note), flush=True)

    @property
    def rate(self) -> float:
        """Items a second since the start."""
        return self.done / max(time.monotonic() - self.begun, 1e-9)

    def line(self, note: str = "") -> str:
        left = (self.total - self.done) / max(self.rate, 1e-9)
        share = 100 * self.done / max(self.total, 1)
        text = f"{self.what}: {self.done}/{self.total} ({share:.0f} %)  {self.rate:.1f} {self.unit}/s  "
        return text + f"left {clock(left)}" + (f"  {note}" if note else "")


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    whole = int(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class Silence:
    """Says what is waited for while nothing comes; a context.

    Args:
        text: what to say, made when it is said: (how long nothing came, as m:ss) -> line.
        after_s: silence after which a line is printed, and between two (s).
    """

    def __init__(self, text: Callable[[str], str], after_s: float = 45.0) -> None:
        self.text, self.after_s, self.since = text, after_s, time.monotonic()
        self._end = threading.Event()

    def heard(self) -> None:
        """Something came."""
        self.since = time.monotonic()

    def __enter__(self) -> Silence:
        threading.Thread(target=self._watch, name="silence", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def _watch(self) -> None:
        said = 0.0
        while not self._end.wait(min(1.0, self.after_s / 4)):
            now = time.monotonic()
            if now - max(self.since, said) >= self.after_s:
                said = now
                print(self.text(clock(now - self.since)), flush=True)
