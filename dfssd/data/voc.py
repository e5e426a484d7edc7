"""Pascal VOC XML labels."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import PurePosixPath

import numpy as np

from dfssd.data.checks import Label, Problem
from dfssd.data.source import Item, Source, closest, given_split, is_image, read_labels
from dfssd.runtime.storage import Storage


def read_voc(store: Storage, files: list[str]) -> Source:
    """Pascal VOC: one XML an image, anywhere below the folder; matched by file name, else by its <filename> tag."""
    by_stem: dict[str, list[str]] = {}
    for name in filter(is_image, files):
        by_stem.setdefault(PurePosixPath(name).stem, []).append(name)
    parsed: dict[str, tuple[list[str], Label]] = {}
    orphans = []
    sheets = [f for f in files if f.lower().endswith(".xml")]
    labels = read_labels(partial(_parse_voc, store), sheets, store)
    for name, (objects, label, tagged) in zip(sheets, labels, strict=True):
        stem = PurePosixPath(name).stem
        candidates = by_stem.get(stem) or by_stem.get(PurePosixPath(tagged).stem, [])
        if candidates:
            parsed[closest(name, candidates)] = (objects, label)
        else:
            orphans.append(name)
    names = sorted({o for objects, _ in parsed.values() for o in objects})
    ids = {n: i for i, n in enumerate(names)}
    for objects, label in parsed.values():
        if label.problem is None:
            label.boxes[:, 0] = [ids[o] for o in objects]
    items = [Item(f, parsed[f][1] if f in parsed else None, given_split(f)) for f in filter(is_image, files)]
    return Source(store, "voc", names, items, orphans)


def _parse_voc(store: Storage, name: str) -> tuple[list[str], Label, str]:
    """Return (class name of each box, label in px, text of <filename>)."""
    try:
        root = ElementTree.fromstring(store.read(name))
    except (ElementTree.ParseError, OSError) as error:
        return [], Label(np.zeros((0, 5)), problem=Problem("label_unreadable", str(error))), ""
    tagged = root.findtext("filename") or ""
    objects, rows = [], []
    try:
        size = tuple(int(float(root.findtext(f"size/{k}") or 0)) for k in ("width", "height"))
        for node in root.iter("object"):
            corners = [float(node.findtext(f"bndbox/{k}") or "nan") for k in ("xmin", "ymin", "xmax", "ymax")]
            objects.append((node.findtext("name") or "").strip())
            x1, y1, x2, y2 = corners
            rows.append([0, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])
    except ValueError as error:
        return [], Label(np.zeros((0, 5)), problem=Problem("label_unreadable", str(error))), tagged
    problem = Problem("label_columns", "an <object> has no <name>") if "" in objects else None
    return ([] if problem else objects), Label(np.array(rows).reshape(-1, 5), True, size, problem), tagged  # type: ignore[arg-type]
