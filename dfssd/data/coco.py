"""COCO JSON labels."""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from dfssd.data.checks import Label, Problem
from dfssd.data.source import Item, Source, closest, given_split, is_image
from dfssd.runtime.storage import Storage


def is_coco(store: Storage, name: str) -> bool:
    try:
        content = store.read_json(name)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys()


def read_coco(store: Storage, files: list[str]) -> Source:
    """COCO JSON, one or several files (one a split); images are matched by path, else by file name."""
    sheets = {f: store.read_json(f) for f in files if f.endswith(".json") and is_coco(store, f)}
    used = {a["category_id"] for sheet in sheets.values() for a in sheet["annotations"]}
    # Roboflow lists a super-category as class 0 that no box has; classes without a box in any sheet are left out.
    names = sorted({str(c["name"]) for s in sheets.values() for c in s["categories"] if c["id"] in used or not used})
    by_name: dict[str, list[str]] = {}
    for name in filter(is_image, files):
        by_name.setdefault(PurePosixPath(name).name, []).append(name)
    labels: dict[str, tuple[Label, str]] = {}
    orphans = []
    for sheet_name, sheet in sheets.items():
        split = given_split(sheet_name) or given_split(PurePosixPath(sheet_name).stem.split("_")[-1] + "/x")
        for file_name, label in _coco_labels(sheet, names).items():
            candidates = by_name.get(PurePosixPath(file_name).name, [])
            if candidates:
                labels[closest(f"{PurePosixPath(sheet_name).parent}/{file_name}", candidates)] = (label, split)
            else:
                orphans.append(f"{sheet_name}#{file_name}")
    items = []
    for name in filter(is_image, files):
        found, split = labels.get(name, (None, ""))
        items.append(Item(name, found, split or given_split(name)))
    return Source(store, "coco", names, items, orphans)


def _coco_labels(sheet: dict[str, Any], names: list[str]) -> dict[str, Label]:
    """Labels of one COCO file by image file name, in px; crowd regions are no boxes and are left out."""
    class_of = {c["id"]: names.index(str(c["name"])) for c in sheet["categories"] if str(c["name"]) in names}
    boxes: dict[Any, list[list[float]]] = {image["id"]: [] for image in sheet["images"]}
    problems: dict[Any, Problem] = {}
    for note in sheet["annotations"]:
        if note.get("iscrowd") or note.get("image_id") not in boxes:
            continue
        if len(note.get("bbox", ())) != 4:
            problems[note["image_id"]] = Problem(
                "label_columns", f"annotation {note.get('id')}: bbox has not 4 numbers"
            )
            continue
        x, y, w, h = (float("nan") if v is None else float(v) for v in note["bbox"])
        boxes[note["image_id"]].append([class_of.get(note["category_id"], -1), x + w / 2, y + h / 2, w, h])
    return {
        str(image["file_name"]): Label(
            np.array(boxes[image["id"]], np.float64).reshape(-1, 5),
            True,
            (int(image.get("width") or 0), int(image.get("height") or 0)),
            problems.get(image["id"]),
        )
        for image in sheet["images"]
    }
