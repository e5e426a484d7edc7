"""YOLO text labels: the Ultralytics layout, with or without data.yaml, and CR7-DET as published."""

from __future__ import annotations

import os
from functools import partial
from pathlib import PurePosixPath

import numpy as np
import yaml

from dfssd.data.checks import Label, Problem
from dfssd.data.source import Item, Source, given_split, is_image, read_labels
from dfssd.errors import DfssdError
from dfssd.runtime.storage import Storage

CR7_NAMES = ("inclusion", "dent", "oil_spot", "pit", "punching", "linear", "macular")


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
    images, label_names = [f for f in files if is_image(f)], []
    for name in images:
        parts = name.split("/")
        places = [i for i, p in enumerate(parts[:-1]) if p == image_dir]
        if places:
            parts[places[-1]] = label_dir
        label_names.append(str(PurePosixPath("/".join(parts)).with_suffix(".txt")))
    used = list(known.intersection(label_names))
    labels = dict(zip(used, read_labels(partial(_read_text, store), used, store), strict=True))
    items = [Item(i, labels.get(n), given_split(i)) for i, n in zip(images, label_names, strict=True)]
    orphans = [f for f in files if f.endswith(".txt") and label_dir in f.split("/")[:-1] and f not in labels]
    return items, [f for f in orphans if PurePosixPath(f).name != "classes.txt"]


def _read_text(store: Storage, name: str) -> Label:
    try:
        return parse_yolo_text(store.read(name).decode("utf-8-sig"))
    except (UnicodeDecodeError, OSError) as error:
        return Label(np.zeros((0, 5)), problem=Problem("label_unreadable", str(error)))


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
