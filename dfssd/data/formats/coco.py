"""COCO JSON labels, as COCO itself, CVAT, Roboflow, Label Studio and labelme2coco write them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from dfssd.data.checks import Label, Problem
from dfssd.data.formats.class_names import check_names
from dfssd.data.formats.listing import Tree
from dfssd.data.formats.matching import Reference, slashes
from dfssd.data.formats.source import Bad, Sheet, Source, assemble, given_split
from dfssd.errors import DfssdError


def is_coco(content: Any) -> bool:
    """Images and annotations, or images and categories (as of a set that nobody has labelled yet).

    COCO's captions and panoptic files speak of the same images, but hold no boxes.
    """
    if not isinstance(content, dict) or "images" not in content:
        return False
    notes = content.get("annotations")
    first = notes[0] if isinstance(notes, list) and notes else None
    if isinstance(first, dict) and ("caption" in first or "segments_info" in first):
        return False
    return "annotations" in content or "categories" in content


def read_coco(tree: Tree, contents: dict[str, Any], looked_at: bool = False) -> Source:
    """COCO JSON, one or several files (one a split).

    Args:
        contents: parsed files by path.
        looked_at: did somebody look at the images of a file without a single annotation? Else they are unlabelled.

    Raises:
        DfssdError: two images share an id, or an image may be either of two pictures.
    """
    sheets: list[Sheet] = []
    bad: list[Bad] = []
    counts: Counter[str] = Counter()
    used: set[str] = set()
    declared: list[str] = []
    unlabelled: list[tuple[str, int]] = []
    for path, content in contents.items():
        one = _Reader(path, content, tree.root)
        if not one.notes and not looked_at:
            unlabelled.append((path, len(one.images)))
            declared += one.names.values()
            continue
        sheets += one.sheets()
        bad += one.bad
        counts += one.counts
        used |= {c for s in one.found for c in s.classes}
        declared += one.names.values()
    # Roboflow lists a super-category as class 0 that no box has; classes without a box in any file are left out.
    names = sorted(used) or sorted(set(declared))
    source = assemble(tree, "coco", sheets, check_names(names, ", ".join(contents)), declared)
    source.bad += bad
    source.counts += counts
    source.notes += [
        f"{path!r} lists {n} images and holds no annotation: they are unlabelled" for path, n in unlabelled
    ]
    return source


class _Reader:
    """One COCO file."""

    def __init__(self, path: str, content: dict[str, Any], root: str) -> None:
        self.path, self.root = path, root
        self.images, self.notes = _rows(content.get("images")), _rows(content.get("annotations"))
        self.names: dict[str, str] = {}
        for one in _rows(content.get("categories")):
            key, name = _id(one.get("id")), str(one.get("name") or "").strip()
            if self.names.setdefault(key, name) != name:
                raise DfssdError(
                    f"category id {key} stands for two names: {self.names[key]!r} and {name!r}",
                    where=path,
                    todo="give each category an id of its own, and its annotations that id",
                )
        self.bad: list[Bad] = []
        self.counts: Counter[str] = Counter()
        self.found: list[Sheet] = []
        self._refuse_shared_ids()

    def _refuse_shared_ids(self) -> None:
        files: dict[str, str] = {}
        for image in self.images:
            key, name = _id(image.get("id")), _file(image)
            if files.setdefault(key, name) != name:
                raise DfssdError(
                    f"two pictures share the image id {key}: {files[key]!r} and {name!r}",
                    where=self.path,
                    todo="nobody can say whose boxes those of that id are: export the file again, with an id for each",
                )

    def sheets(self) -> list[Sheet]:
        """One sheet an image of the file."""
        boxes: dict[str, list[list[float]]] = {_id(i.get("id")): [] for i in self.images}
        classes: dict[str, list[str]] = {key: [] for key in boxes}
        problems: dict[str, Problem] = {}
        for note in self.notes:
            key = _id(note.get("image_id"))
            if key not in boxes:
                self.bad.append(
                    (f"{self.path}#annotation {note.get('id')}", Problem("annotation_without_image", f"image id {key}"))
                )
                continue
            box = self._box(note)
            if isinstance(box, Problem):
                problems.setdefault(key, box)
                continue
            category = _id(note.get("category_id"))
            name = self.names.get(category, "")
            if not name:
                problems.setdefault(
                    key,
                    Problem("class_out_of_range", f"annotation {note.get('id')}: category id {category} is not listed"),
                )
                continue
            x, y, w, h = box
            boxes[key].append([-1, x + w / 2, y + h / 2, w, h])
            classes[key].append(name)
        stem = PurePosixPath(self.path).stem
        hint = stem.replace(".coco", "").split("_")[-1]
        split = given_split(self.path, self.root) or _split_of(stem)
        for image in self.images:
            key, name = _id(image.get("id")), _file(image)
            label = Label(np.array(boxes[key], np.float64).reshape(-1, 5), True, _size(image), problems.get(key))
            if not name:
                self.bad.append((f"{self.path}#image {key}", Problem("label_columns", "it has no file_name")))
                continue
            if "://" in name:
                name = name.split("://", 1)[1].split("?")[0]
            known = [c if label.problem is None else "" for c in classes[key]]
            called = f"{self.path}#{name}"
            self.found.append(
                Sheet(Reference(self.path, name, hint), known if label.problem is None else [], label, split, called)
            )
        return self.found

    def _box(self, note: dict[str, Any]) -> tuple[float, ...] | Problem:
        """x, y, w, h in px: the bbox, else the box round the segmentation."""
        self.counts["crowds"] += bool(note.get("iscrowd"))
        box = note.get("bbox")
        values = [_float(v) for v in box] if isinstance(box, list | tuple) else []
        if len(values) == 4 and np.isfinite(values).all() and (values[2] > 0 and values[3] > 0):
            return tuple(values)
        around = _around(note.get("segmentation"))
        if around is not None:
            self.counts["polygons"] += 1
            return around
        if len(values) == 4:
            return tuple(values)  # `check_label` says what is wrong with it
        return Problem("label_columns", f"annotation {note.get('id')}: bbox is {str(box)[:60]}, not 4 numbers")


def _rows(value: Any) -> list[dict[str, Any]]:
    """Entries of a list, or of a mapping by id, as some programs write them."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [v for v in values if isinstance(v, dict)]


def _file(image: dict[str, Any]) -> str:
    """The picture's name; LVIS has an address alone."""
    return slashes(str(image.get("file_name") or image.get("coco_url") or ""))


def _split_of(stem: str) -> str:
    """The split that the words of a file's name speak of, where it is one: instances_val2017, train_annotations."""
    found = {s for word in re.split(r"[^a-z0-9]+", stem.lower()) if (s := given_split(f"/{word}/x", ""))}
    return found.pop() if len(found) == 1 else ""


def _id(value: Any) -> str:
    """Ids compare as text: 7, 7.0 and "7" are one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def _size(image: dict[str, Any]) -> tuple[int, int]:
    width, height = _float(image.get("width")), _float(image.get("height"))
    return (int(width), int(height)) if np.isfinite([width, height]).all() else (0, 0)


def _around(segmentation: Any) -> tuple[float, ...] | None:
    """Box round polygons or a run-length encoded mask; None where there is neither, or no sense in it."""
    try:
        return _round_shape(segmentation)
    except (TypeError, ValueError, ArithmeticError, LookupError):
        return None


def _round_shape(segmentation: Any) -> tuple[float, ...] | None:
    if isinstance(segmentation, dict):
        return _around_mask(segmentation)
    if not isinstance(segmentation, list) or not segmentation:
        return None
    rings = segmentation if isinstance(segmentation[0], list) else [segmentation]
    values = np.array([_float(v) for ring in rings for v in ring])
    if len(values) < 6 or len(values) % 2 or not np.isfinite(values).all():
        return None
    points = values.reshape(-1, 2)
    (x1, y1), (x2, y2) = points.min(0), points.max(0)
    return float(x1), float(y1), float(x2 - x1), float(y2 - y1)


def _around_mask(mask: dict[str, Any]) -> tuple[float, ...] | None:
    """Box round a mask of runs, column by column, that begin with background (COCO's RLE, plain or packed as text)."""
    counts, size = mask.get("counts"), mask.get("size")
    if not counts or not isinstance(size, list | tuple) or len(size) != 2:
        return None
    runs = np.array(counts if isinstance(counts, list) else _unpack(str(counts)), np.int64)
    height, ends = int(size[0]), np.cumsum(runs)
    starts, stops = ends[0::2][: len(runs[1::2])], ends[1::2]
    full = stops > starts
    if not full.any() or height <= 0:
        return None
    first, last = starts[full], stops[full] - 1
    x1, x2 = first.min() // height, last.max() // height
    spans = first // height != last // height  # a run over the end of a column touches its top and bottom
    y1 = 0 if spans.any() else (first % height).min()
    y2 = height - 1 if spans.any() else (last % height).max()
    return float(x1), float(y1), float(x2 - x1 + 1), float(y2 - y1 + 1)


def _unpack(text: str) -> list[int]:
    """Runs of COCO's packed form: 5 bits a character from '0' on, later runs as differences (maskApi.c, rleFrString)."""
    runs: list[int] = []
    k = 0
    while k < len(text):
        value, shift, more = 0, 0, True
        while more and k < len(text):
            code = ord(text[k]) - 48
            value |= (code & 0x1F) << 5 * shift
            more, k, shift = bool(code & 0x20), k + 1, shift + 1
            if not more and code & 0x10:
                value |= -1 << 5 * shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs
