"""Readers for the layouts in which defect data comes: YOLO (Ultralytics), Pascal VOC, COCO and CR7-DET.

Each reader turns a folder into a `Source`: image files, what their label says, and class names. Nothing is checked here;
`checks` does that on what comes out. Images without a label file carry `label=None`.
"""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import yaml

from dfssd.data.checks import Label, Problem
from dfssd.errors import DfssdError
from dfssd.storage import Storage

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
CR7_NAMES = ("inclusion", "dent", "oil_spot", "pit", "punching", "linear", "macular")


@dataclass
class Item:
    """One image file: name relative to the source, its label (None: nobody labelled it), its given split ('' none)."""

    name: str
    label: Label | None = None
    split: str = ""


@dataclass
class Source:
    """All that a reader found. `orphans` are label files without an image."""

    store: Storage
    format: str
    names: list[str]
    items: list[Item]
    orphans: list[str] = field(default_factory=list)


def read_source(data: str, fmt: str, names: tuple[str, ...]) -> Source:
    """Read images and labels below `data`, detecting the format where `fmt` is 'auto'.

    Raises:
        DfssdError: nothing there, unknown layout, or class names missing.
    """
    if not data:
        raise DfssdError("no data given", todo="add --data FOLDER (or a data.yaml)")
    is_yaml = data.endswith((".yaml", ".yml"))
    folder, _, yaml_name = data.rpartition("/") if is_yaml else (data, "", "")
    store = Storage(folder or ".")
    if not store.exists() or (is_yaml and not store.exists(yaml_name)):
        raise DfssdError("the data is not there", where=data, todo="check the path given to --data")
    files = [f for f in store.files() if not any(p.startswith((".", "__MACOSX")) for p in f.split("/"))]
    if not any(is_image(f) for f in files) and not is_yaml:
        raise DfssdError("no image files found", where=store.uri, todo=f"known endings: {sorted(IMAGE_SUFFIXES)}")
    if is_yaml or fmt == "auto":
        fmt, yaml_name = ("yolo", yaml_name) if is_yaml else detect(store, files)
    if fmt == "yolo":
        source = read_yolo(store, files, yaml_name)
    else:
        source = {"voc": read_voc, "coco": read_coco, "cr7-det": read_cr7}[fmt](store, files)
    source.names = list(names) or source.names
    if not source.names:
        raise DfssdError(
            "the data has no class names", where=data, todo="add --names NAME NAME ... in the order of the class ids"
        )
    return source


def is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def detect(store: Storage, files: list[str]) -> tuple[str, str]:
    """Return (format, name of the data.yaml or '')."""
    tops = {f.split("/")[0].lower() for f in files if "/" in f}
    for name in [f for f in files if f.endswith((".yaml", ".yml")) and f.count("/") <= 1]:
        content = yaml.safe_load(store.read(name))
        if isinstance(content, dict) and "names" in content:
            return "yolo", name
    if {"image", "label"} <= tops and any(f.startswith("label/") and f.endswith(".txt") for f in files):
        return "cr7-det", ""
    if any(f.endswith(".json") and _is_coco(store, f) for f in files):
        return "coco", ""
    if any(f.lower().endswith(".xml") for f in files):
        return "voc", ""
    if any("labels" in f.split("/")[:-1] and f.endswith(".txt") for f in files):
        return "yolo", ""
    raise DfssdError(
        "the layout of the data was not recognised",
        where=store.uri,
        todo="see README 'Your own data' for the layouts, or name one with --format",
    )


def parse_yolo_text(text: str) -> Label:
    """Parse `class cx cy w h` lines; a missing final newline and blank lines are fine."""
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) != 5:
            return Label(np.zeros((0, 5)), problem=Problem("label_columns", f"line {number}: {len(parts)} columns"))
        try:
            rows.append([float(p) for p in parts])
        except ValueError:
            return Label(np.zeros((0, 5)), problem=Problem("label_unreadable", f"line {number}: {line[:60]!r}"))
    return Label(np.array(rows, np.float64).reshape(-1, 5))


def _yolo_items(store: Storage, files: list[str], image_dir: str, label_dir: str) -> tuple[list[Item], list[str]]:
    """Pair images with text labels: the last folder `image_dir` of a path becomes `label_dir`, as Ultralytics does."""
    known = set(files)
    used, items = set(), []
    for name in filter(is_image, files):
        parts = name.split("/")
        places = [i for i, p in enumerate(parts[:-1]) if p == image_dir]
        if places:
            parts[places[-1]] = label_dir
        label_name = str(PurePosixPath("/".join(parts)).with_suffix(".txt"))
        label = None
        if label_name in known:
            used.add(label_name)
            label = _read_text(store, label_name)
        items.append(Item(name, label, _given_split(name)))
    orphans = [f for f in files if f.endswith(".txt") and label_dir in f.split("/")[:-1] and f not in used]
    return items, [f for f in orphans if PurePosixPath(f).name != "classes.txt"]


def _read_text(store: Storage, name: str) -> Label:
    try:
        return parse_yolo_text(store.read(name).decode("utf-8-sig"))
    except (UnicodeDecodeError, OSError) as error:
        return Label(np.zeros((0, 5)), problem=Problem("label_unreadable", str(error)))


def _given_split(name: str) -> str:
    """Split that a path's folders name, or ''."""
    words = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
    for part in name.lower().split("/")[:-1]:
        stem = part.rstrip("0123456789")  # train2017
        if stem in words:
            return words[stem]
    return ""


def read_cr7(store: Storage, files: list[str]) -> Source:
    """CR7-DET as published: image/*.jpg, label/*.txt, no class list, no split."""
    items, orphans = _yolo_items(store, files, "image", "label")
    return Source(store, "cr7-det", list(CR7_NAMES), items, orphans)


def read_yolo(store: Storage, files: list[str], yaml_name: str = "") -> Source:
    """Ultralytics layout: images/ and labels/, with or without a data.yaml (names, path, train, val, test)."""
    names: list[str] = []
    splits: dict[str, list[str]] = {}
    if yaml_name:
        content = yaml.safe_load(store.read(yaml_name)) or {}
        raw = content.get("names", [])
        names = [str(raw[k]) for k in sorted(raw)] if isinstance(raw, dict) else [str(n) for n in raw]
        base = str(content.get("path") or "")
        candidate = base if base.startswith("/") or "://" in base else f"{store.uri}/{base}".rstrip("/.")
        if base and Storage(candidate).exists():
            store = Storage(candidate)
            files = store.files()
        for split in ("train", "val", "test"):
            entry = content.get(split) or []
            splits[split] = [_relative(store, str(e)) for e in (entry if isinstance(entry, list) else [entry])]
    items, orphans = _yolo_items(store, files, "images", "labels")
    if any(splits.values()):
        members = {split: _listed_images(store, places) for split, places in splits.items()}
        for item in items:
            item.split = next((s for s, (dirs, listed) in members.items() if _inside(item.name, dirs, listed)), "")
        items = [item for item in items if item.split]
        if not items:
            raise DfssdError(
                "data.yaml names no image that exists",
                where=f"{store.uri}: {splits}",
                todo="check 'path', 'train', 'val' and 'test' in the data.yaml",
            )
    return Source(store, "yolo", names, items, orphans)


def _relative(store: Storage, place: str) -> str:
    """A data.yaml entry as a path relative to the store ('..' as Roboflow writes it is taken as '.')."""
    place = place[len(store.uri) :] if place.startswith(store.uri) else place
    return os.path.normpath(place.strip("/")).replace("../", "")


def _listed_images(store: Storage, places: list[str]) -> tuple[list[str], set[str]]:
    """Split entries into folders and image names listed in .txt files."""
    folders, listed = [], set()
    for place in places:
        if place.endswith(".txt"):
            lines = store.read(place).decode().split("\n")
            listed |= {_relative(store, line.strip()) for line in lines if line.strip()}
        else:
            folders.append(place)
    return folders, listed


def _inside(name: str, folders: list[str], listed: set[str]) -> bool:
    return name in listed or any(f == "." or name.startswith(f"{f}/") for f in folders)


def _closest(name: str, candidates: list[str]) -> str:
    """The candidate that shares most folders with `name` (data sets reuse file names in train/ and test/)."""
    folders = name.lower().split("/")[:-1]

    def shared(candidate: str) -> int:
        pairs = zip(folders, candidate.lower().split("/")[:-1], strict=False)
        return sum(1 for _ in takewhile(lambda p: p[0] == p[1], pairs))

    return max(candidates, key=lambda c: (shared(c), c))


def read_voc(store: Storage, files: list[str]) -> Source:
    """Pascal VOC: one XML an image, anywhere below the folder; matched by file name, else by its <filename> tag."""
    by_stem: dict[str, list[str]] = {}
    for name in filter(is_image, files):
        by_stem.setdefault(PurePosixPath(name).stem, []).append(name)
    parsed: dict[str, tuple[list[str], Label]] = {}
    orphans = []
    for name in (f for f in files if f.lower().endswith(".xml")):
        objects, label, tagged = _parse_voc(store, name)
        stem = PurePosixPath(name).stem
        candidates = by_stem.get(stem) or by_stem.get(PurePosixPath(tagged).stem, [])
        if candidates:
            parsed[_closest(name, candidates)] = (objects, label)
        else:
            orphans.append(name)
    names = sorted({o for objects, _ in parsed.values() for o in objects})
    ids = {n: i for i, n in enumerate(names)}
    for objects, label in parsed.values():
        if label.problem is None:
            label.boxes[:, 0] = [ids[o] for o in objects]
    items = [Item(f, parsed[f][1] if f in parsed else None, _given_split(f)) for f in filter(is_image, files)]
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


def _is_coco(store: Storage, name: str) -> bool:
    try:
        content = store.read_json(name)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys()


def read_coco(store: Storage, files: list[str]) -> Source:
    """COCO JSON, one or several files (one a split); images are matched by path, else by file name."""
    sheets = {f: store.read_json(f) for f in files if f.endswith(".json") and _is_coco(store, f)}
    used = {a["category_id"] for sheet in sheets.values() for a in sheet["annotations"]}
    # Roboflow lists a super-category as class 0 that no box has; classes without a box in any sheet are left out.
    names = sorted({str(c["name"]) for s in sheets.values() for c in s["categories"] if c["id"] in used or not used})
    by_name: dict[str, list[str]] = {}
    for name in filter(is_image, files):
        by_name.setdefault(PurePosixPath(name).name, []).append(name)
    labels: dict[str, tuple[Label, str]] = {}
    orphans = []
    for sheet_name, sheet in sheets.items():
        split = _given_split(sheet_name) or _given_split(PurePosixPath(sheet_name).stem.split("_")[-1] + "/x")
        for file_name, label in _coco_labels(sheet, names).items():
            candidates = by_name.get(PurePosixPath(file_name).name, [])
            if candidates:
                labels[_closest(f"{PurePosixPath(sheet_name).parent}/{file_name}", candidates)] = (label, split)
            else:
                orphans.append(f"{sheet_name}#{file_name}")
    items = []
    for name in filter(is_image, files):
        found, split = labels.get(name, (None, ""))
        items.append(Item(name, found, split or _given_split(name)))
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
