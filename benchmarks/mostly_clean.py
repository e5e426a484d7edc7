"""A line as lines are: most pictures show no defect, and people have labelled defective ones alone.

    python benchmarks/mostly_clean.py --data ../shared/data/deep-pcb --tile 80 --imgsz 96 --out runs/line
    python benchmarks/semi_supervised.py --data runs/line --label-fraction 0.1 --imgsz 96 --steps 300 ...

Cuts a fully labelled set into tiles. Train: 600 with defects, of which `--label-fraction` draws the labelled ones, and up to
3400 clean ones that nobody has looked at; val and test: half and half, all labelled. Equal tiles count once, and one that
holds less than 60 % of a defect is left out. The split is that of the pictures. Leaves what `semi_supervised.py --export`
would.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from semi_data import all_labels

from dfssd.data.dataset import decode
from dfssd.data.manifest import Manifest, Row, write_manifest
from dfssd.runtime.storage import Storage

WANTED = {"train": (600, 3400), "val": (100, 100), "test": (400, 400)}  # tiles with a defect, and without
WHOLE = 0.6  # of a defect's area, from which on a tile shows it


def tiles(row: Row, side: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(side,side,3) uint8 BGR and (n,5) float32 boxes [class, cx, cy, w, h (shares of the tile)] of each usable tile."""
    image = decode(row.uri)
    height, width = image.shape[:2]
    assert row.boxes is not None
    boxes = np.asarray(row.boxes, np.float64)
    low, high = boxes[:, 1:3] - boxes[:, 3:5] / 2, boxes[:, 1:3] + boxes[:, 3:5] / 2
    corners = np.concatenate([low, high], 1) * [width, height, width, height]
    area = np.prod(corners[:, 2:] - corners[:, :2], axis=1)
    for y in range(0, height - side + 1, side):
        for x in range(0, width - side + 1, side):
            edges = np.array([x, y])
            cut = np.concatenate(
                [corners[:, :2].clip(edges, edges + side), corners[:, 2:].clip(edges, edges + side)], 1
            )
            share = np.prod(cut[:, 2:] - cut[:, :2], axis=1) / area
            if ((share > 0) & (share < WHOLE)).any():
                continue
            own, cut = boxes[share >= WHOLE], cut[share >= WHOLE]
            centre, size = (cut[:, :2] + cut[:, 2:]) / 2 - edges, cut[:, 2:] - cut[:, :2]
            found = np.concatenate([own[:, :1], centre / side, size / side], 1).astype(np.float32)
            yield image[y : y + side, x : x + side], found


def main() -> None:
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--data", required=True)
    a.add_argument("--tile", type=int, default=80, help="side of a tile (px)")
    a.add_argument("--imgsz", type=int, default=96, help="side it is written with (px)")
    a.add_argument("--out", required=True)
    args = a.parse_args()
    out = Path(args.out)
    source = all_labels(args.data, out.with_name(out.name + "-split"))
    pools: dict[tuple[str, bool], list[tuple[Row, np.ndarray, np.ndarray]]] = {}
    for row in sorted((r for r in source.rows if r.boxes is not None), key=lambda r: r.image_id):
        for image, boxes in tiles(row, args.tile):
            pools.setdefault((row.split, bool(len(boxes))), []).append((row, image, boxes))
    rng, rows = np.random.default_rng(0), dict[str, Row]()
    (out / "images").mkdir(parents=True, exist_ok=True)
    for split, counts in WANTED.items():
        for defective, count in zip((True, False), counts, strict=True):
            pool = pools.get((split, defective), [])
            for k in rng.permutation(len(pool))[:count]:
                row, image, boxes = pool[k]
                image = cv2.resize(image, (args.imgsz, args.imgsz), interpolation=cv2.INTER_LINEAR)
                data = cv2.imencode(".png", image)[1].tobytes()
                own = hashlib.sha256(data).hexdigest()[: len(row.image_id)]
                (out / "images" / f"{own}.png").write_bytes(data)
                known = split != "train" or defective
                new = replace(row, image_id=own, uri=f"images/{own}.png", width=args.imgsz, height=args.imgsz)
                rows.setdefault(own, replace(new, boxes=boxes if known else None, labelled=known))
    write_manifest(Storage(str(out)), Manifest(list(rows.values()), source.names, source.meta))
    print(f"{out}: {len(rows)} tiles, of {', '.join(f'{len(p)} {s}' for (s, _), p in pools.items())}", flush=True)


if __name__ == "__main__":
    main()
