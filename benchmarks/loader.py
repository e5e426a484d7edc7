"""What a training sample costs a process that loads, against Ultralytics' own data set: image, boxes and all.

    python benchmarks/loader.py            # 640 px, colour and grey, cached and not
    python benchmarks/loader.py --json

Both make samples of the same images with the same settings in one process of one thread, in turns; a number is CPU time, a
ratio the median over the turns. *Cached*: all images were decoded before; theirs lie in memory, ours in the mapped files of
the decoded cache. *Not cached*: one epoch over images that neither has seen. Each decodes every image once: Ultralytics takes
the partners of a mosaic from those it loaded last; ours come from the whole set and, once decoded, from the decoded cache.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from made_up import make_image  # first: it finds the package
from stock_samples import StockSet

from dfssd.config import Train
from dfssd.data.dataset import TrainingSet
from dfssd.data.decoded import DecodedCache
from dfssd.data.manifest import Row
from dfssd.data.reading import ID_DIGITS

NAMES = ["pit", "scratch", "patch"]


def make_rows(folder: Path, count: int, size_wh: tuple[int, int], grey: bool, first: int = 0) -> list[Row]:
    """Made-up JPEGs of three channels, whatever they show, as cameras write them."""
    folder.mkdir(parents=True)
    rows = []
    for k in range(first, first + count):
        image, boxes = make_image(np.random.default_rng(k), *size_wh, grey)
        path = folder / f"{k}.jpg"
        cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, 90])
        image_id = hashlib.sha256(path.read_bytes()).hexdigest()[:ID_DIGITS]
        rows.append(Row(image_id, str(path), *size_wh, "train", True, k, boxes))
    return rows


def cpu_ms(work: Callable[[], Any]) -> float:
    begun = time.process_time()
    work()
    return 1e3 * (time.process_time() - begun)


def cached(rows: Sequence[Row], imgsz: int, turns: int, batch: int, folder: Path) -> dict[str, float]:
    """Milliseconds a sample, and how many times faster ours is."""
    train, boxes = Train(imgsz=imgsz), [r.boxes for r in rows]
    ours = TrainingSet(rows, boxes, train, decoded=DecodedCache(str(folder), 8))
    stock = StockSet(rows, boxes, NAMES, imgsz, train)
    for k in range(len(rows)):
        ours.images.load(k)
        stock.load_image(k)
    own, theirs = [], []
    for turn in range(-2, turns):
        seeds = range(turn * batch, (turn + 1) * batch)
        a = cpu_ms(lambda seeds=seeds: [ours.augmented(s % len(rows), abs(s), True) for s in seeds])
        b = cpu_ms(lambda seeds=seeds: [stock.seeded(s % len(rows), abs(s)) for s in seeds])
        if turn >= 0:
            own.append(a / batch)
            theirs.append(b / batch)
    return _result(own, theirs)


def uncached(rows: Sequence[Row], imgsz: int, batch: int, folder: Path, gib: float) -> dict[str, float]:
    """One epoch over images that were never decoded; a turn is a batch."""
    train, boxes = Train(imgsz=imgsz), [r.boxes for r in rows]
    ours = TrainingSet(rows, boxes, train, decoded=DecodedCache(str(folder), gib) if gib else None)
    stock = StockSet(rows, boxes, NAMES, imgsz, train, everywhere=False)
    stock.max_buffer_length = len(rows)  # as long as it is for a set of this size
    own, theirs = [], []
    for first in range(0, len(rows), batch):
        seeds = range(first, min(first + batch, len(rows)))
        own.append(cpu_ms(lambda seeds=seeds: [ours.augmented(s, s, True) for s in seeds]) / len(seeds))
        theirs.append(cpu_ms(lambda seeds=seeds: [stock.seeded(s, s) for s in seeds]) / len(seeds))
    whole = {"ours (ms)": statistics.mean(own), "Ultralytics (ms)": statistics.mean(theirs)}
    return {**whole, "times faster": whole["Ultralytics (ms)"] / whole["ours (ms)"]}


def _result(own: list[float], theirs: list[float]) -> dict[str, float]:
    ratio = statistics.median(b / a for a, b in zip(own, theirs, strict=True))
    return {"ours (ms)": statistics.median(own), "Ultralytics (ms)": statistics.median(theirs), "times faster": ratio}


def measure(imgsz: int, turns: int, batch: int, images: int, epoch: int, folder: Path) -> dict[str, dict[str, float]]:
    small, large = (imgsz * 5 // 8, imgsz * 5 // 8), (imgsz * 5 // 2, imgsz * 15 // 8)
    found = {}
    for name, grey in (("colour", False), ("grey", True)):
        for size in (small, large):
            rows = make_rows(folder / f"{name}{size[0]}", images, size, grey)
            title = f"{name} {size[0]}x{size[1]}, cached"
            found[title] = cached(rows, imgsz, turns, batch, folder / "decoded")
        rows = make_rows(folder / f"{name}new", epoch, large, grey, first=1000)
        found[f"{name} {large[0]}x{large[1]}, not cached"] = uncached(rows, imgsz, batch, folder / "decoded", 8)
        if not grey:
            found[f"{name} {large[0]}x{large[1]}, without a cache"] = uncached(rows, imgsz, batch, folder, 0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--batch", type=int, default=4, help="samples in a turn")
    parser.add_argument("--images", type=int, default=24, help="of the cached rows")
    parser.add_argument("--epoch", type=int, default=120, help="images of the epoch that is not cached")
    parser.add_argument("--json", action="store_true")
    o = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("ultralytics").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="dfssd-loader-") as folder:
        found = measure(o.imgsz, o.turns, o.batch, o.images, o.epoch, Path(folder))
    if o.json:
        json.dump(found, sys.stdout, indent=2)
        return
    print(f"{o.imgsz} px, ms of CPU time a sample, medians\n")
    for name, row in found.items():
        print(f"{name:38s}" + "  ".join(f"{k} {v:6.2f}" for k, v in row.items()))


if __name__ == "__main__":
    main()
