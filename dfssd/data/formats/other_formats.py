"""labelme (one JSON a picture), CreateML (JSON), and TensorFlow's CSV, as these programs and Roboflow write them."""

from __future__ import annotations

import csv
import io
from collections import Counter
from functools import partial
from typing import Any

import numpy as np

from dfssd.data.checks import Label
from dfssd.data.formats.listing import Tree
from dfssd.data.formats.matching import Reference, slashes
from dfssd.data.formats.parsing import Unparsable, decode_text
from dfssd.data.formats.shapes import Shape, around, collect, guarded, label_of
from dfssd.data.formats.source import Source


def is_labelme(content: Any) -> bool:
    return isinstance(content, dict) and "shapes" in content and ("imagePath" in content or "imageData" in content)


def read_labelme(tree: Tree, contents: dict[str, Any]) -> Source:
    """labelme: one JSON beside each picture, matched by its own name, else by `imagePath`."""
    sheets = []
    known = {f.rpartition("/")[2].rpartition(".")[0] for f in tree.below() if not f.endswith(".json")}
    for path, content in contents.items():
        stem = path.rpartition("/")[2].rpartition(".")[0]
        tagged = slashes(str(content.get("imagePath") or ""))
        suffix = "." + tagged.rpartition(".")[2] if "." in tagged else ""
        reference = Reference(path, f"{stem}." if stem in known or not tagged else tagged, "", suffix)
        sheets.append(guarded(reference, path, partial(_labelme_shapes, content)))
    return collect(tree, "labelme", sheets)


def _labelme_shapes(content: dict[str, Any]) -> tuple[list[str], Label]:
    shapes: list[Shape] = []
    counts: Counter[str] = Counter()
    for shape in content.get("shapes") or []:
        name, points = str(shape.get("label") or "").strip(), shape.get("points") or []
        kind = str(shape.get("shape_type") or "polygon")
        if kind in ("point", "line", "linestrip", "points"):
            counts["other_shapes"] += 1
        elif kind == "circle":
            (cx, cy), (px, py) = points[:2]
            r = float(np.hypot(px - cx, py - cy))
            shapes.append((name, cx - r, cy - r, cx + r, cy + r))
            counts["polygons"] += 1
        else:
            counts["polygons"] += kind != "rectangle"
            shapes.append((name, *around(points)))
    size = (int(content.get("imageWidth") or 0), int(content.get("imageHeight") or 0))
    return label_of(shapes, size, counts)


def is_createml(content: Any) -> bool:
    first = content[0] if isinstance(content, list) and content else None
    return isinstance(first, dict) and {"image", "annotations"} <= first.keys()


def read_createml(tree: Tree, contents: dict[str, Any]) -> Source:
    """CreateML: a list of pictures, whose boxes have centre and size in px."""
    sheets = []
    for path, content in contents.items():
        for k, one in enumerate(content):
            name = slashes(str(one.get("image") or "")) if isinstance(one, dict) else f"entry {k}"
            sheets.append(guarded(Reference(path, name), f"{path}#{name}", partial(_createml_shapes, one)))
    return collect(tree, "createml", sheets)


def _createml_shapes(one: dict[str, Any]) -> tuple[list[str], Label]:
    shapes: list[Shape] = []
    for note in one.get("annotations") or []:
        x, y, w, h = (float(note["coordinates"][k]) for k in ("x", "y", "width", "height"))
        shapes.append((str(note.get("label") or "").strip(), x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    return label_of(shapes, None, Counter())


_COLUMNS = ("filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax")


def table_rows(data: bytes) -> list[dict[str, str]]:
    """Rows of a table by the names of its columns, which commas, semicolons or tabs part; [] of what is no table."""
    try:
        text = decode_text(data)
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        rows = list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
    except (Unparsable, csv.Error):
        return []
    return [{str(k).strip(): v or "" for k, v in row.items() if isinstance(v, str | None)} for row in rows]


def is_tensorflow(rows: list[dict[str, str]]) -> bool:
    """Has a table the columns of TensorFlow's object detection?"""
    return bool(rows) and set(_COLUMNS) <= rows[0].keys()


def read_csv(tree: Tree, contents: dict[str, list[dict[str, str]]]) -> Source:
    """TensorFlow's CSV as Roboflow writes it: one line a box. A picture without a line is unlabelled."""
    sheets = []
    for path, rows in contents.items():
        of_picture: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            of_picture.setdefault(slashes(row["filename"] or ""), []).append(row)
        for name, own in of_picture.items():
            sheets.append(guarded(Reference(path, name), f"{path}#{name}", partial(_csv_shapes, own)))
    return collect(tree, "csv", sheets)


def _csv_shapes(rows: list[dict[str, str]]) -> tuple[list[str], Label]:
    drawn = [r for r in rows if any((r[k] or "").strip() for k in _COLUMNS[3:])]  # a picture without a box: a bare line
    shapes = [((r["class"] or "").strip(), *(float(r[k]) for k in _COLUMNS[4:])) for r in drawn]
    return label_of(shapes, (int(float(rows[0]["width"])), int(float(rows[0]["height"]))), Counter())  # type: ignore[arg-type]
