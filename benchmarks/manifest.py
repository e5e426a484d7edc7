"""What a large data set costs beside its images: splits, labelled subset, manifest and order of samples.

    python benchmarks/manifest.py --rows 1000000

Rows are made up (no image is read): one to three boxes of seven classes, a tenth of the images in pairs of near-duplicates.
Prints seconds of each part, and the high-water mark of the process's memory after it.
"""

from __future__ import annotations

import hashlib
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro

from dfssd.data.manifest import Manifest, Row, read_manifest, write_manifest
from dfssd.data.preparation.splits import assign_splits, class_counts, labelling_order
from dfssd.data.sampling import StepSampler
from dfssd.report.tables import render
from dfssd.runtime.storage import Storage

CLASSES = 7
SPLITS = ("train", "val", "test")


@dataclass
class Settings:
    """What is measured."""

    rows: int = 1_000_000
    """Images of the manifest."""
    fraction: float = 0.01
    """Share of the train images that are labelled."""
    steps: int = 1000
    """Steps of the sampler, of 32 images each."""


class Table:
    """Rows of (part, seconds, GiB)."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = []

    def time(self, part: str, work: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = work()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.rows.append([part, f"{time.perf_counter() - begun:.1f}", f"{peak:.1f}"])
        print(f"{part}: {self.rows[-1][1]} s", flush=True)
        return result


def make_boxes(n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 4, n)
    flat = rng.uniform(0.1, 0.4, (int(counts.sum()), 5)).astype(np.float32)
    flat[:, 0] = rng.integers(0, CLASSES, len(flat))
    return np.split(flat, np.cumsum(counts)[:-1])


def main() -> None:
    s, table = tyro.cli(Settings, description=__doc__), Table()
    n = s.rows
    ids = [hashlib.sha1(b"%d" % k).hexdigest() for k in range(n)]
    groups = np.arange(n)
    groups[1 : n // 10 : 2] = groups[0 : n // 10 - 1 : 2]
    boxes = table.time("made-up boxes", lambda: make_boxes(n))
    counts = table.time("classes of each image", lambda: class_counts(boxes, CLASSES))
    split = table.time("split (groups kept whole)", lambda: assign_splits(ids, groups, counts, (0.8, 0.1, 0.1), 0))
    train = np.flatnonzero(split == 0)
    order = table.time(
        "order of labelling", lambda: labelling_order([ids[k] for k in train.tolist()], counts[train], 0)
    )
    chosen = set(train[order[: int(s.fraction * len(train))]].tolist())

    def rows() -> Manifest:
        made = [
            Row(ids[k], f"s3://bucket/images/{k:07d}.jpg", 640, 640, SPLITS[split[k]], k in chosen, int(groups[k]), one)
            for k, one in enumerate(boxes)
        ]
        return Manifest(made, [f"class{k}" for k in range(CLASSES)], {})

    manifest = table.time("rows", rows)
    with tempfile.TemporaryDirectory(prefix="dfssd-manifest-") as folder:
        store = Storage(folder)
        table.time("write the manifest", lambda: write_manifest(store, manifest))
        size = len(store.read("manifest.parquet"))
        del manifest
        manifest = table.time("read the manifest", lambda: read_manifest(store))
    streams = table.time(
        "labelled and unlabelled rows", lambda: (len(manifest.labelled_rows()), len(manifest.unlabelled_rows()))
    )
    repeats: dict[str, Any] = dict(zip(("labelled", "unlabelled"), streams, strict=True))
    sampler = StepSampler(repeats, {"labelled": 16, "unlabelled": 16}, 0, 0, s.steps, s.steps)
    table.time("first step of the sampler", lambda: sampler.at(0))
    table.time(f"{s.steps} steps of the sampler", lambda: [sampler.at(k) for k in range(s.steps)])
    print(render(f"{n} rows, manifest of {size / 2**20:.0f} MiB", ["part", "s", "peak GiB"], table.rows))


if __name__ == "__main__":
    main()
