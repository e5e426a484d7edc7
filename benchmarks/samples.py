"""What a training sample costs a process that loads: read, decode, mosaic of four, augment.

    python benchmarks/samples.py --imgsz 224 640

Made-up images of the size of the network's input, from local files, in one process of one thread.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import torch
import tyro
from step import Bench
from step import Settings as StepSettings

from dfssd.data.sampling import Draw
from dfssd.report.tables import render


@dataclass
class Settings:
    """What is measured."""

    imgsz: tuple[int, ...] = (224, 640)
    batch: int = 8
    repeats: int = 15


def milliseconds(bench: Bench, s: Settings, cache_gib: float) -> float:
    """Median time of a mosaic sample, after every image was seen."""
    streams = bench.session("student", "fp32", s.batch, train={"cache_gib": cache_gib}).streams
    images, times = len(streams.streams["unlabelled"]), []
    warm = -(-images // s.batch)
    for k in range(-warm, s.repeats):
        draws = [Draw("unlabelled", (k * s.batch + j) % images, (k + warm) * s.batch + j, True) for j in range(s.batch)]
        begun = time.perf_counter()
        streams.__getitems__(draws)
        if k >= 0:
            times.append((time.perf_counter() - begun) / s.batch)
    return 1e3 * statistics.median(times)


def main() -> None:
    s, rows = tyro.cli(Settings, description=__doc__), []
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    for side in s.imgsz:
        with tempfile.TemporaryDirectory(prefix="dfssd-samples-") as folder:
            bench = Bench(StepSettings(imgsz=side), Path(folder), torch.device("cpu"))
            rows += [
                [str(side), name, f"{milliseconds(bench, s, gib):.1f}"]
                for name, gib in (("memory", 1.0), ("disk", 0.0))
            ]
    print(render("a mosaic sample", ["px", "images from", "ms"], rows))


if __name__ == "__main__":
    main()
