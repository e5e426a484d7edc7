"""Where the time of a step goes: data wait, the parts of a step, and a trace of some of them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dfssd.runtime.storage import Storage

TRACED_AFTER = 5  # steps, which warm up


class Meter:
    """Seconds of data wait and of the whole step, since the last reading and over all."""

    def __init__(self) -> None:
        self.steps, self.data_s, self.step_s = 0, 0.0, 0.0
        self.total_steps, self.total_data_s, self.total_step_s = 0, 0.0, 0.0
        self._begun = 0.0

    def start(self) -> None:
        self._begun = time.perf_counter()

    def stop(self, waited_s: float) -> None:
        """The step is over; `waited_s` of it went by until the loader had the data."""
        self.steps += 1
        self.data_s += waited_s
        self.step_s += time.perf_counter() - self._begun

    def read(self) -> tuple[float, float]:
        """(seconds a step, seconds of data wait a step) since the last call."""
        result = self.step_s / max(self.steps, 1), self.data_s / max(self.steps, 1)
        self.total_steps += self.steps
        self.total_data_s += self.data_s
        self.total_step_s += self.step_s
        self.steps, self.data_s, self.step_s = 0, 0.0, 0.0
        return result


class StepClock:
    """Seconds of the parts of a step, by events on the device's stream; only of the steps that are logged."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._on = False

    def start(self, on: bool) -> None:
        self._on, self._marks = on, []
        self.mark("")

    def mark(self, name: str) -> None:
        """The part `name` ends here."""
        if self._on:
            at: Any = torch.cuda.Event(enable_timing=True) if self._cuda else time.perf_counter()
            if self._cuda:
                at.record()
            self._marks.append((name, at))

    def read(self) -> dict[str, float]:
        """Seconds by part of the step; waits for the device."""
        if self._cuda and self._marks:
            self._marks[-1][1].synchronize()
        parts: dict[str, float] = {}
        for (_, a), (name, b) in zip(self._marks, self._marks[1:], strict=False):
            parts[name] = parts.get(name, 0.0) + (a.elapsed_time(b) / 1e3 if self._cuda else b - a)
        return parts


@contextmanager
def traced(store: Storage, steps: int) -> Iterator[Callable[[], None]]:
    """Trace some steps with torch.profiler into `profile.json` (for chrome://tracing or Perfetto) of the stage's folder.

    Args:
        steps: how many; 0: none.

    Yields:
        what is to be called after each step.
    """
    if not steps:
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    def keep(found: profile) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "profile.json"
            found.export_chrome_trace(str(path))
            store.write("profile.json", path.read_bytes())
        print(f"profile of {steps} steps: {store.path('profile.json')}", flush=True)

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    plan = schedule(wait=TRACED_AFTER, warmup=1, active=steps, repeat=1)
    with profile(activities=kinds, schedule=plan, on_trace_ready=keep, record_shapes=True) as found:
        yield found.step
