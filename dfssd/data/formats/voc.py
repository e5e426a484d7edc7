"""Pascal VOC XML labels, as LabelImg, CVAT, Roboflow and roLabelImg write them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container
from functools import partial
from xml.etree.ElementTree import Element

import numpy as np

from dfssd.data.checks import Label, Problem
from dfssd.data.formats.listing import Tree, is_image
from dfssd.data.formats.matching import Pictures, Reference, slashes
from dfssd.data.formats.parsing import Unparsable, decode_text, parse_xml
from dfssd.data.formats.source import Item, Sheet, Source, assemble, given_split, read_labels, unusable
from dfssd.runtime.storage import read_uri

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_voc(tree: Tree, sheets: list[str]) -> Source:
    """Pascal VOC: one XML an image, anywhere below the folder; matched by file name, else by its <filename> tag."""
    pictures = Pictures(tree.root, tree.pictures())
    parsed = list(read_labels(partial(_parse_voc, pictures), sheets, tree.is_remote))
    source = assemble(tree, "voc", parsed, declared=_labelmap(tree))
    for sheet in parsed:
        source.counts += sheet.label.counts
    _take_splits(source, _image_sets(tree))
    return source


def _parse_voc(pictures: Pictures, path: str) -> Sheet:
    """What one XML says: the picture it is about, the class of each box, and the boxes in px."""
    stem = path.rpartition("/")[2].rpartition(".")[0]
    reference = Reference(path, f"{stem}.")
    try:
        root = parse_xml(read_uri(path))
    except (Unparsable, OSError) as error:
        return Sheet(reference, [], unusable("label_unreadable", str(error)))
    tagged = slashes((root.findtext("filename") or "").strip())
    suffix = "." + tagged.rpartition(".")[2] if is_image(tagged) else ""
    folders = (
        slashes(root.findtext("folder") or "").rpartition("/")[2],
        slashes(root.findtext("path") or "").split("/")[-2:-1],
    )
    hint = folders[0] if pictures.knows(folders[0]) else "".join(folders[1])
    reference = Reference(path, f"{stem}.", hint, suffix)
    if tagged and not pictures.candidates(reference.name):
        reference = Reference(path, tagged if is_image(tagged) else f"{tagged}.", reference.hint, suffix)
    if root.tag == "annotations":
        return Sheet(reference, [], unusable("label_unreadable", "a CVAT file among VOC files"))
    try:
        size = (_number(root, "size/width"), _number(root, "size/height"))
        classes, rows, counts = _objects(root)
    except (ValueError, OverflowError) as error:
        return Sheet(reference, [], unusable("label_unreadable", str(error)))
    if "" in classes:
        return Sheet(reference, [], unusable("label_columns", "an <object> has no <name>"))
    label = Label(np.array(rows, np.float64).reshape(-1, 5), True, size, counts=counts)
    if not np.isfinite(label.boxes).all():
        lacking = classes[int((~np.isfinite(label.boxes)).any(1).argmax())]
        label.problem = Problem("label_columns", f"object {lacking!r} lacks a corner")
    return Sheet(reference, classes, label)


def _number(node: Element, place: str) -> int:
    text = (node.findtext(place) or "").strip()
    return int(float(text)) if text else 0


def _objects(root: Element) -> tuple[list[str], list[list[float]], Counter[str]]:
    """Class and [0, cx, cy, w, h] (px) of every box; an object without a box counts as one without corners."""
    classes: list[str] = []
    rows: list[list[float]] = []
    counts: Counter[str] = Counter()
    for node in root.iter("object"):
        if (node.findtext("deleted") or "").strip() in ("1", "true"):  # LabelMe keeps what a person took away
            continue
        found = [_corners(box) for box in node.findall("bndbox")]
        if not found and (turned := _rotated(node)):
            found, counts["rotated"] = [turned], counts["rotated"] + 1
        if not found and (points := _polygon(node)):
            found, counts["polygons"] = [points], counts["polygons"] + 1
        counts["several"] += len(found) > 1
        for x1, y1, x2, y2 in found or [(np.nan,) * 4]:
            classes.append((node.findtext("name") or "").strip())
            rows.append([0, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])
    return classes, rows, counts


def _corners(box: Element) -> tuple[float, ...]:
    return tuple(_px((box.findtext(k) or "").strip()) for k in _CORNERS)


def _px(text: str) -> float:
    """A coordinate; some programs write the comma of their country (`10,5`). `1,234` may be either, and is refused."""
    return float(re.sub(r"^(-?\d+),(\d{1,2}|\d{4,})$", r"\1.\2", text) or "nan")


def _rotated(node: Element) -> tuple[float, ...] | None:
    """Corners round roLabelImg's <robndbox>: centre, sides and angle (rad)."""
    box = node.find("robndbox")
    if box is None:
        return None
    cx, cy, w, h, angle = (float((box.findtext(k) or "").strip() or "nan") for k in ("cx", "cy", "w", "h", "angle"))
    cos, sin = abs(np.cos(angle)), abs(np.sin(angle))
    half_w, half_h = (w * cos + h * sin) / 2, (w * sin + h * cos) / 2
    return cx - half_w, cy - half_h, cx + half_w, cy + half_h


def _polygon(node: Element) -> tuple[float, ...] | None:
    """Corners round a <polygon>: <x1><y1><x2><y2>... (Roboflow) or <pt><x><y></pt>... (LabelMe)."""
    shape = node.find("polygon")
    if shape is None:
        return None
    values: dict[str, list[float]] = {"x": [], "y": []}
    for part in shape.iter():
        if part.tag[:1] in "xy" and part.tag[1:].isdecimal() | (len(part.tag) == 1) and (part.text or "").strip():
            values[part.tag[0]].append(float(part.text or ""))
    if not values["x"] or len(values["x"]) != len(values["y"]):
        return None
    return min(values["x"]), min(values["y"]), max(values["x"]), max(values["y"])


def _labelmap(tree: Tree) -> list[str]:
    """Classes of CVAT's labelmap.txt: `name:color:parts:actions`, 'background' among them."""
    for path in tree.below():
        if path.rpartition("/")[2] == "labelmap.txt":
            try:
                lines = decode_text(read_uri(path)).splitlines()
            except Unparsable:
                return []  # the classes of the objects are what counts
            names = [line.split(":")[0].strip() for line in lines if line.strip() and not line.startswith("#")]
            return [n for n in names if n]
    return []


def _image_sets(tree: Tree) -> dict[str, str]:
    """Lists of the splits, by split: those of ImageSets/Main where there are any, whatever other tasks list."""
    found: dict[str, str] = {}
    for path in tree.below():
        folders, _, name = path.lower().rpartition("/")
        split = given_split(f"/{name.removesuffix('.txt')}/x", "") if name.endswith(".txt") else ""
        if split and "imagesets" in folders.split("/") and (split not in found or folders.endswith("/main")):
            found[split] = path
    return found


def _first_known(line: str, known: Container[str]) -> str:
    """The picture that a line names: all of it, what is in quotes, or its first word (`0001 -1`)."""
    forms = (slashes(line), slashes(line.partition('"')[2].partition('"')[0] or line), slashes(line.split()[0]))
    return next((form for form in forms if form in known), forms[0])


def _take_splits(source: Source, lists: dict[str, str]) -> None:
    """Give pictures the splits that lists name; one that two lists name, and lines that lead nowhere, are said."""
    by_end: dict[str, list[Item]] = {}
    for item in source.items:
        parts = item.uri.split("/")
        for k in (1, 2, 3):
            name = "/".join(parts[-k:])
            for end in (name, name.rpartition(".")[0]):
                by_end.setdefault(end, []).append(item)
    listed: dict[str, set[str]] = {}
    for split, path in lists.items():
        try:
            lines = decode_text(read_uri(path)).splitlines()
        except Unparsable:
            continue  # a list of splits that nobody can read is no list; --split given then says what it found
        stems = [_first_known(line, by_end) for line in lines if line.strip()]
        lost = [stem for stem in stems if stem not in by_end]
        for item in (item for stem in stems for item in by_end.get(stem, ())):
            listed.setdefault(item.uri, set()).add(split)
            item.split = item.split or split
        if lost:
            source.notes.append(f"{len(lost)} lines of {path!r} name pictures that do not exist, such as {lost[0]!r}")
    source.twice += [(uri, " and ".join(sorted(splits))) for uri, splits in listed.items() if len(splits) > 1]
