"""Small data sets in the layouts that programs write: eight pictures of 64 x 48 px, one box each, four of each class."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from dfssd.config import Data
from dfssd.data.checks import Checked
from dfssd.data.formats.read import read_source
from dfssd.data.formats.source import Source
from dfssd.data.preparation.checking import check_one

NAMES = ("scratch", "pit")
N, WIDTH, HEIGHT = 8, 64, 48
BOX = (20.0, 10.0, 16.0, 12.0)  # x, y, w, h in px
BOTH = {"scratch": 4, "pit": 4}


@lru_cache(64)
def picture(k: int, suffix: str = ".png") -> bytes:
    """Encoded picture number k; no two are alike."""
    image = np.random.default_rng(k).integers(0, 255, (HEIGHT, WIDTH), np.uint8)
    return bytes(cv2.imencode(suffix.lower(), image)[1])


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def pictures(folder: Path, numbers=range(N), pattern: str = "{:03d}.png") -> list[Path]:
    return [put(folder / pattern.format(k), picture(k, Path(pattern).suffix)) for k in numbers]


def yolo_line(k: int) -> str:
    x, y, w, h = BOX
    return f"{k % 2} {(x + w / 2) / WIDTH:.6f} {(y + h / 2) / HEIGHT:.6f} {w / WIDTH:.6f} {h / HEIGHT:.6f}"


def texts(folder: Path, numbers=range(N), pattern: str = "{:03d}.txt") -> None:
    for k in numbers:
        put(folder / pattern.format(k), yolo_line(k) + "\n")


def yolo(root: Path, yaml: str | None = "path: .\ntrain: images\nval: images\nnames: [scratch, pit]\n") -> Path:
    pictures(root / "images")
    texts(root / "labels")
    if yaml is not None:
        put(root / "data.yaml", yaml)
    return root


def voc_xml(k: int, inner: str = "", head: str = "", name: str = "") -> str:
    x, y, w, h = BOX
    box = f"<bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox>"
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>1</depth></size>"
    body = f"<object><name>{name or NAMES[k % 2]}</name>{inner or box}</object>"
    return f"{head}<annotation><filename>{k:03d}.png</filename>{size}{body}</annotation>"


def voc(root: Path) -> Path:
    pictures(root / "JPEGImages")
    for k in range(N):
        put(root / "Annotations" / f"{k:03d}.xml", voc_xml(k))
    return root


def coco_sheet(numbers=range(N), pattern: str = "{:03d}.png", **changes: object) -> dict:
    """A COCO file; `changes` are put into every annotation, and None takes a key away."""
    images = [{"id": k + 1, "file_name": pattern.format(k), "width": WIDTH, "height": HEIGHT} for k in numbers]
    notes = []
    for k in numbers:
        note = {"id": k + 1, "image_id": k + 1, "category_id": k % 2 + 1, "bbox": list(BOX), "iscrowd": 0, **changes}
        notes.append({key: value for key, value in note.items() if value is not None})
    categories = [{"id": 1, "name": "scratch"}, {"id": 2, "name": "pit"}]
    return {"images": images, "annotations": notes, "categories": categories}


def coco(root: Path, sheet: dict | None = None, place: str = "annotations.json") -> Path:
    pictures(root / "images")
    put(root / place, json.dumps(sheet or coco_sheet(), ensure_ascii=False))
    return root


def read(path: Path, names: Sequence[str] = (), fmt: str = "auto") -> Source:
    return read_source(str(path), fmt, names)


def tally(source: Source) -> tuple[dict[str, int], Counter[str], int]:
    """Usable boxes by class, bad files by reason, and pictures that count as free of defects."""
    boxes: Counter[str] = Counter()
    bad = Counter(problem.reason for _, problem in source.bad)
    clean = 0
    for item in source.items:
        result = check_one(item, len(source.names), Data())
        if not isinstance(result, Checked):
            bad[result[1].reason] += 1
        elif result.boxes is not None:
            clean += not len(result.boxes)
            boxes.update(source.names[int(c)] for c in result.boxes[:, 0])
    return dict(boxes), bad, clean
