"""What `prepare` costs for large sets: images a second by cores, memory of the driver, and the search for near-duplicates.

    python benchmarks/prepare.py --json prepare.json

Images and hashes are made up. Each preparation runs in a process and a Ray of its own; images a second are those of the
checking alone, from the first shard on (the start of Ray is said apart). The memory is the driver's high-water mark, as the
system counts it. The search is compared with all pairs where that takes seconds (recall), and with the time that all pairs
would take, estimated from there as n^2, where it does not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import tyro

from dfssd.data.preparation import grouping, neighbours
from dfssd.data.synthetic import NAMES, make_image
from dfssd.report.tables import render

CHILD = """
import json, os, resource, sys, time
import ray
from dfssd.config import Data
from dfssd.data.preparation import check_cluster
from dfssd.data.preparation.prepare import prepare
from dfssd.runtime.environment import set_driver_environment
from dfssd.runtime.storage import Storage

data, out, cores, cluster = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "ray"
times = []
class Timed(check_cluster.Progress):
    def add(self, count=1, note=""):
        times.append((time.perf_counter(), count))
        super().add(count, note)
check_cluster.Progress = Timed
if cluster:
    set_driver_environment()
    ray.init(num_cpus=cores, include_dashboard=False, object_store_memory=128 * 2**20, logging_level="WARNING")
begun = time.perf_counter()
prepare(Data(data=data, split_shares=(0.5, 0.25, 0.25)), 0, Storage(out), cluster=cluster)
total = time.perf_counter() - begun
found = {"s": total, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
if times:
    images = sum(n for _, n in times[cores:])  # as many tasks begin at once
    found |= {"img_s": images / (times[-1][0] - times[cores - 1][0]), "first_shard_s": times[0][0] - begun}
print("FOUND " + json.dumps(found))
"""


@dataclass
class Settings:
    """What is measured."""

    images: int = 4000
    """Pictures of the throughput, of `side` px."""
    side: int = 640
    cores: tuple[int, ...] = (1, 2)
    tiny: tuple[int, ...] = (5000, 20_000)
    """Numbers of tiny pictures at which the driver's memory is taken."""
    hashes: tuple[int, ...] = (50_000, 200_000)
    """Numbers of hashes that are searched; made up in about 0.5 ms each."""
    exact: int = 20_000
    """Hashes of which all pairs are compared, for recall and the estimate of n^2."""
    only: Literal["all", "search", "prepare"] = "all"
    json: str = ""
    """File that takes the numbers."""


def write_set(folder: Path, images: int, side: int, labelled: int = 200) -> None:
    """Pictures (JPEG), the first of them with a label: shifted, mirrored and shaded variants of a hundred."""
    base = [make_image(np.random.default_rng(k), side)[0] for k in range(100)]
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for k in range(images):
        rng = np.random.default_rng([1, k])
        image = np.roll(base[k % 100], rng.integers(0, side, 2).tolist(), (0, 1))[:: rng.choice([-1, 1])]
        cv2.imwrite(str(folder / "images" / f"{k:06d}.jpg"), image)
        if k < labelled:
            (folder / "labels" / f"{k:06d}.txt").write_text(f"{k % 3} 0.5 0.5 0.2 0.2")
    (folder / "data.yaml").write_text(f"path: .\nnames: {list(NAMES)}\n")


def prepare_once(data: Path, out: Path, cores: int, where: str) -> dict[str, float]:
    """Numbers of one preparation in a process of its own."""
    command = [sys.executable, "-c", CHILD, str(data), str(out), str(cores), where]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if "FOUND " not in done.stdout:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return dict(json.loads(done.stdout.split("FOUND ")[1]))


def make_hashes(n: int) -> neighbours.HashFile:
    """Hashes of made-up pictures, a tenth of them mirrored, noisy or darker copies of others."""
    file, own = neighbours.HashFile(n), n - n // 10
    for k in range(0, n, 1000):
        thumbs = np.stack([_thumb(j, own) for j in range(k, min(n, k + 1000))])
        file.put(k, grouping.hashes(thumbs))
    return file


def _thumb(k: int, own: int) -> np.ndarray:
    rng = np.random.default_rng([3, k])
    if k < own:
        return make_image(np.random.default_rng([2, k]), 48)[0]
    copied = make_image(np.random.default_rng([2, int(rng.integers(own))]), 48)[0].astype(np.float32)
    flipped = copied[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])] * rng.uniform(0.8, 1.1)
    return np.asarray((flipped + rng.normal(0, rng.uniform(0, 3), (48, 48))).clip(0, 255), np.uint8)


def search(hashes: neighbours.Hashes, how: Callable[..., Any]) -> tuple[set[tuple[int, int]], float]:
    """Pairs at 0.93, and CPU seconds."""
    begun = time.process_time()
    parts = [np.concatenate(p) for p in zip(*how(hashes, 0.93), strict=True)]
    spent = time.process_time() - begun
    return set(zip(parts[0].tolist(), parts[1].tolist(), strict=True)), spent


def measure_search(s: Settings) -> list[dict[str, float]]:
    """Recall and time of the search by cells, beside all pairs."""
    rows, all_s = list[dict[str, float]](), 0.0
    for n in (s.exact, *s.hashes):
        hashes = make_hashes(n)
        found, spent = search(hashes, neighbours.pairs_by_cells)
        row = {"hashes": n, "pairs": len(found), "cells_s": spent}
        if n == s.exact:
            want, all_s = search(hashes[np.arange(n)], grouping.near_pairs)
            row |= {"recall": len(found & want) / len(want), "all_pairs": len(want)}
        row["all_pairs_s"] = all_s * (n / s.exact) ** 2
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def measure_prepare(s: Settings) -> dict[str, Any]:
    """Images a second by cores, and the driver's memory by images."""
    found: dict[str, Any] = {"cores": {}, "tiny": {}}
    with tempfile.TemporaryDirectory(prefix="dfssd-prepare-") as scratch:
        folder = Path(scratch)
        write_set(folder / "large", s.images, s.side)
        for cores in s.cores:
            found["cores"][cores] = prepare_once(folder / "large", folder / f"out{cores}", cores, "ray")
            print(f"{cores} core(s): {json.dumps(found['cores'][cores])}", flush=True)
        for n in s.tiny:
            write_set(folder / f"tiny{n}", n, 48)
            found["tiny"][n] = prepare_once(folder / f"tiny{n}", folder / f"out-tiny{n}", 2, "ray")
            print(f"{n} tiny images: {json.dumps(found['tiny'][n])}", flush=True)
    return found


def show(s: Settings, found: dict[str, Any]) -> None:
    """As tables."""
    if "cores" in found:
        heads = ["img/s", "first shard after s", "all s", "peak MiB of the driver"]
        for title, part in ((f"images of {s.side} px by cores", "cores"), ("tiny images by their number", "tiny")):
            keys = ("img_s", "first_shard_s", "s", "peak_mib")
            rows = [[str(c), *(f"{r[k]:.1f}" for k in keys)] for c, r in found[part].items()]
            print(render(title, ["", *heads], rows))
    if "search" in found:
        rows = []
        for r in found["search"]:
            recall = f"{r['recall']:.4f}" if "recall" in r else "-"
            rows.append([str(r["hashes"]), str(r["pairs"]), f"{r['cells_s']:.1f}", f"{r['all_pairs_s']:.1f}", recall])
        heads = ["hashes", "pairs", "by cells", "all pairs (as n^2 of the first row)", "recall"]
        print(render("near-duplicates (CPU s)", heads, rows))


def main() -> None:
    s = tyro.cli(Settings, description=__doc__)
    found: dict[str, Any] = {"settings": s.__dict__}
    if s.only != "prepare":
        found["search"] = measure_search(s)
    if s.only != "search":
        found |= measure_prepare(s)
    show(s, found)
    if s.json:
        Path(s.json).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
