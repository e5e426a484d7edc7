"""A training step under the clock: whole, in parts, its waits for the device, and Ultralytics' distill_model beside it."""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_report import environment
from made_up import MadeUp, StockStep  # first: it finds the package

from dfssd.train.feed import moved
from dfssd.train.loop import clip, update
from dfssd.train.session import Session
from dfssd.train.step import accumulate


class Bench:
    """The made-up run, the device, the clock and what was found so far."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.o, self.began = options, time.monotonic()
        self.device = torch.device(options.device)
        self.cuda = self.device.type == "cuda"
        quick = options.quick
        self.imgsz, self.batch = (64, 2) if quick else (640, 32)
        self.repeats = 2 if quick else 30
        images, size = (24, (80, 64)) if quick else (1024, (1024, 768))
        teacher = "yolov8n.yaml" if quick else "yolov8s.yaml"
        self.made = MadeUp(folder, self.device, images, size, teacher=teacher)
        self.made.write_teacher(self.imgsz)
        self.found: dict[str, Any] = {"environment": environment(self.device), "sections": {}, "skipped": {}}

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return float(self.o.minutes * 60 - (time.monotonic() - self.began))

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def milliseconds(self, run: Callable[[], Any], repeats: int = 0, seconds: float = 4.0) -> float:
        """Of one call, over many without a wait in between, after three to warm up; fewer where they are slow."""
        repeats = repeats or self.repeats
        for _ in range(1 if self.o.quick else 3):
            run()
        self.sync()
        begun, done = time.perf_counter(), 0
        while done < repeats and (done < 2 or time.perf_counter() - begun < seconds):
            run()
            done += 1
        self.sync()
        return (time.perf_counter() - begun) / done * 1e3


def one_step(s: Session, batch: dict[str, Any], mark: Callable[[str], None] = lambda _: None) -> None:
    """A step of `dfssd.train.loop.train`, without its log steps; `mark` is called at the end of each part."""
    s.clock.mark = mark  # type: ignore[method-assign]  # the step's own marks, into the caller's list
    micro = moved(0, batch, s.targets(batch, s.job.config.train.batch), s.device)
    mark("boxes and images to the device")
    accumulate(s, [micro], 0.0, False, None)
    update(s, clip(s)[1])
    mark("optimiser, averages")


def parts(bench: Bench, s: Session, batch: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of each part of a step: medians, by events on the device's stream."""
    runs: list[list[tuple[str, Any]]] = []

    def mark(name: str) -> None:
        at: Any = time.perf_counter() * 1e3
        if bench.cuda:
            at = torch.cuda.Event(enable_timing=True)
            at.record()
        runs[-1].append((name, at))

    for _ in range(min(bench.repeats, 15)):
        runs.append([])
        mark("begin")
        one_step(s, batch, mark)
    bench.sync()
    times: dict[str, list[float]] = {}
    for run in runs[1 if len(runs) > 2 else 0 :]:
        for (_, a), (name, b) in itertools.pairwise(run):
            times.setdefault(name, []).append(a.elapsed_time(b) if bench.cuda else b - a)
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def waits(bench: Bench, s: Session, batch: dict[str, Any]) -> dict[str, Any]:
    """Waits for the device in one step, and where; CUDA's sync debug mode sees them."""
    if not bench.cuda:
        return {}
    bench.sync()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            one_step(s, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(w.filename).parent.name}/{Path(w.filename).name}:{w.lineno}" for w in seen
                     if "synchronizing" in str(w.message))  # fmt: skip
    return {"waits a step": sum(places.values()), "where": dict(places.most_common(20))}


def step_of(bench: Bench, imgsz: int, batch: int, amp: str, stock: bool = False, **train: Any) -> dict[str, Any]:
    """Whole step, its parts, memory; with `stock` also waits and Ultralytics' distill_model on the same batch."""
    gc.collect()
    if bench.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    s = bench.made.session(imgsz, batch, amp, loader_workers=0, cache_gib=0.0, **train)
    loaded = next(iter(s.loader()))
    ready = {k: v.to(bench.device) if isinstance(v, torch.Tensor) else v for k, v in loaded.items()}
    loaded = {k: v.pin_memory() if bench.cuda and isinstance(v, torch.Tensor) else v for k, v in loaded.items()}
    whole = bench.milliseconds(lambda: one_step(s, loaded))
    found = {
        "imgsz": imgsz, "images": f"{batch}+{batch}", "precision": amp, "student": str(s.dtype or torch.float32),
        "teacher": str(s.teacher_dtype or torch.float32), "compiled": bool(train.get("compile")), "step (ms)": whole,
        "img/s": 2e3 * batch / whole, "parts (ms)": parts(bench, s, loaded),
    }  # fmt: skip
    if bench.cuda:
        found["peak memory (GiB)"] = torch.cuda.max_memory_allocated() / 2**30
    if stock:
        found |= waits(bench, s, loaded)
        for name, half in (("fp16", True), ("fp32", False)) if bench.cuda else (("fp32", False),):
            theirs = StockStep(bench.made, imgsz, half)
            found[f"distill_model {name} (ms)"] = bench.milliseconds(lambda theirs=theirs: theirs(ready))
        found["step over distill_model"] = whole / found[f"distill_model {'fp16' if bench.cuda else 'fp32'} (ms)"]
    return found
