"""Latency of several networks beside each other, on a CPU or a GPU, in numbers that can be compared.

Networks timed one after another meet different machines: clocks change, neighbours come and go, and two equal networks show
26 and 18 ms. Here every round times each network once, in an order drawn anew, so that whatever the machine does in the
meantime falls on all of them alike; and one network is timed twice under two names. Where its two medians part by more than
5 %, the machine was too busy for a difference of that size to mean anything, and the result says so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 0.05  # difference of one network from itself above which the machine counts as busy
BLOCKS = 3  # measurements at most; the quietest one counts
MIN_WARMUP = 5  # calls of each network before the first that counts: memory is allocated, kernels are chosen

Network = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Timing:
    """Time of one call of a network (ms): half of the calls took at most `p50_ms`, 19 of 20 at most `p95_ms`."""

    p50_ms: float
    p95_ms: float


@dataclass(frozen=True)
class Latencies:
    """Timings by network, and what they were measured with.

    Args:
        twin_difference: share by which the two medians of one and the same network part (0.02 is 2 %).
        rounds: calls of each network that count; warmup: calls before them.
        load: running processes a core during the measurement (the system's average over a minute); nan: unknown.
    """

    timings: dict[str, Timing]
    twin_difference: float
    device: str
    threads: int
    imgsz: int
    rounds: int
    warmup: int
    load: float

    @property
    def busy(self) -> bool:
        """Was the machine so busy that a network differed from itself by more than 5 %?"""
        return self.twin_difference > TOLERANCE

    @property
    def note(self) -> str:
        """What a table says below these numbers."""
        on = f"{self.threads} thread(s)" if self.device == "cpu" else self.device
        said = f"one image of {self.imgsz} px, {on}, {self.rounds} interleaved rounds after {self.warmup} to warm up"
        if not self.busy:
            return said
        return (
            f"{said}; THE MACHINE WAS BUSY: one network timed twice differed from itself by {self.twin_difference:.0%}, "
            "so smaller differences mean nothing"
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "busy": self.busy, "note": self.note}


def measure_latency(
    networks: Mapping[str, Network],
    image: Tensor,
    *,
    repeats: int = 50,
    threads: int = 1,
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Latencies:
    """Time several networks on one image, interleaved.

    Args:
        networks: by name, what takes the image and does all that is to be timed (network and NMS, an ONNX session, ...).
        image: (1,3,H,W) input, moved to the device once.
        repeats: calls of each network in a measurement; the first network's count twice.
        threads: torch threads; a network that has threads of its own (ONNX Runtime) must be given as many.
        device: default the CPU. On a GPU each call is timed until the device has finished.
        clock: seconds.

    Returns:
        the quietest of at most three measurements: it is repeated only where the machine was busy.
    """
    device = device or torch.device("cpu")
    place = image.to(device)
    first = next(iter(networks))
    entries = [*networks.items(), (first, networks[first])]
    warmup = max(MIN_WARMUP, repeats // 5)
    best: Latencies | None = None
    with torch.no_grad(), using_threads(threads):
        for _ in range(warmup):
            for _, network in entries:
                _call(network, place, clock)
        rng = np.random.default_rng(0)
        for _ in range(BLOCKS):
            times_ms = np.empty((repeats, len(entries)))
            for row in times_ms:
                for k in rng.permutation(len(entries)):
                    row[k] = _call(entries[k][1], place, clock) * 1e3
            found = _summary(times_ms, list(networks), device, threads, place, warmup)
            if best is None or found.twin_difference < best.twin_difference:
                best = found
            if not best.busy:
                break
    assert best is not None
    return best


def _call(network: Network, image: Tensor, clock: Callable[[], float]) -> float:
    """Seconds of one call."""
    if image.is_cuda:
        torch.cuda.synchronize(image.device)
    begun = clock()
    network(image)
    if image.is_cuda:
        torch.cuda.synchronize(image.device)
    return clock() - begun


def _summary(
    times_ms: np.ndarray, names: list[str], device: torch.device, threads: int, image: Tensor, warmup: int
) -> Latencies:
    """Numbers of one measurement; the last column is the first network's second one, and belongs to it."""
    own, again = float(np.median(times_ms[:, 0])), float(np.median(times_ms[:, -1]))
    timings = {}
    for k, name in enumerate(names):
        mine = times_ms[:, [0, -1]] if k == 0 else times_ms[:, k]
        timings[name] = Timing(*(round(float(q), 3) for q in np.percentile(mine, (50, 95))))
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Latencies(
        timings=timings,
        twin_difference=round(abs(own - again) / max(min(own, again), 1e-9), 4),
        device=card,
        threads=threads,
        imgsz=int(max(image.shape[-2:])),
        rounds=len(times_ms),
        warmup=warmup,
        load=_load(),
    )


def _load() -> float:
    try:
        return round(os.getloadavg()[0] / (os.cpu_count() or 1), 2)
    except OSError:
        return float("nan")


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Run with `count` torch threads; two spinning threads on one busy core are many times slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)
