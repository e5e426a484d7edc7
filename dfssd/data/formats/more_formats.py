"""Supervisely (a JSON a picture) and VGG Image Annotator (VIA 1 and 2: project, JSON or CSV)."""

from __future__ import annotations

import base64
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from dfssd.data.checks import Label
from dfssd.data.formats.listing import Tree
from dfssd.data.formats.matching import Reference, slashes
from dfssd.data.formats.shapes import Shape, around, collect, guarded, label_of, with_untouched
from dfssd.data.formats.source import Source
from dfssd.errors import DfssdError

CLASS_KEYS = ("class", "label", "name", "type", "category", "defect")  # of VIA's attributes, where a region has several
_VIA_COLUMNS = {"filename", "region_shape_attributes", "region_attributes"}


def is_supervisely(content: Any) -> bool:
    size = content.get("size") if isinstance(content, dict) else None
    return isinstance(size, dict) and "height" in size and isinstance(content.get("objects"), list)


def read_supervisely(tree: Tree, contents: dict[str, Any]) -> Source:
    """Supervisely: `ann/a.jpg.json` for `img/a.jpg`; classes that no object has are left out."""
    sheets = []
    for path, content in contents.items():
        name = path.rpartition("/")[2].rpartition(".")[0]
        reference = Reference(path, name if "." in name else f"{name}.")  # early exports leave the picture's ending out
        if content["objects"]:
            sheets.append(guarded(reference, path, partial(_supervisely_shapes, content)))
    return with_untouched(collect(tree, "supervisely", sheets), len(contents) - len(sheets))


def _supervisely_shapes(content: dict[str, Any]) -> tuple[list[str], Label]:
    shapes: list[Shape] = []
    counts: Counter[str] = Counter()
    for one in content["objects"]:
        name, kind = str(one.get("classTitle") or "").strip(), str(one.get("geometryType") or "rectangle")
        if kind in ("rectangle", "polygon"):
            counts["polygons"] += kind == "polygon"
            shapes.append((name, *around(one["points"]["exterior"])))
        elif kind == "bitmap":
            counts["polygons"] += 1
            (x, y), (w, h) = one["bitmap"]["origin"], _png_size(one["bitmap"]["data"])
            shapes.append((name, x, y, x + w, y + h))
        else:
            counts["other_shapes"] += 1
    size = content["size"]
    return label_of(shapes, (int(size.get("width") or 0), int(size.get("height") or 0)), counts)


def _png_size(packed: str) -> tuple[int, int]:
    """Width and height (px) of a mask that is a packed PNG; no more than its head is unpacked."""
    head = zlib.decompressobj().decompress(base64.b64decode(packed), 24)
    if head[:4] != b"\x89PNG":
        raise ValueError("a bitmap is no PNG")
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def is_via(content: Any) -> bool:
    pictures = _via_pictures(content)
    return bool(pictures) and all(isinstance(p, dict) and {"filename", "regions"} <= p.keys() for p in pictures)


def _via_pictures(content: Any) -> list[Any]:
    if not isinstance(content, dict):
        return []
    known = content.get("_via_img_metadata", content)
    return list(known.values()) if isinstance(known, dict) else []


def via_tables(tables: dict[str, list[dict[str, str]]]) -> dict[str, Any]:
    """VIA's CSV files, one line a region, as what its JSON says."""
    found: dict[str, Any] = {}
    for path, rows in tables.items():
        if not rows or not _VIA_COLUMNS.issubset({key.lstrip("#") for key in rows[0]}):
            continue
        pictures: dict[str, dict[str, Any]] = {}
        for row in ({key.lstrip("#"): value for key, value in r.items()} for r in rows):
            own = pictures.setdefault(row["filename"], {"filename": row["filename"], "regions": []})
            shape, about = (_parsed(row[f"region_{part}"]) for part in ("shape_attributes", "attributes"))
            if shape != {}:  # a picture without a region has a line of its own
                own["regions"].append({"shape_attributes": shape, "region_attributes": about})
        found[path] = pictures
    return found


def _parsed(text: str) -> Any:
    try:
        return json.loads(text or "{}")
    except ValueError:
        return text  # `guarded` says what is wrong with it


def read_via(tree: Tree, contents: dict[str, Any]) -> Source:
    """VIA: shapes of each picture that was loaded; the class is the attribute of its regions, whatever it is called.

    Raises:
        DfssdError: regions have several attributes, and none is called as a class is.
    """
    sheets, untouched = [], 0
    for path, content in contents.items():
        pictures = [p for p in _via_pictures(content) if isinstance(p, dict)]
        key = _class_key(pictures, path)
        for one in pictures:
            name = slashes(str(one.get("filename") or ""))
            if not one.get("regions"):
                untouched += 1
                continue
            sheets.append(guarded(Reference(path, name), f"{path}#{name}", partial(_via_shapes, one, key)))
    return with_untouched(collect(tree, "via", sheets), untouched)


def _regions(picture: dict[str, Any]) -> list[dict[str, Any]]:
    regions = picture.get("regions") or []
    if isinstance(regions, dict):  # VIA 1
        regions = list(regions.values())
    return regions if isinstance(regions, list) else [regions]  # `guarded` says what is wrong with it


def _class_key(pictures: Sequence[dict[str, Any]], path: str) -> str:
    about = [r.get("region_attributes") for p in pictures for r in _regions(p) if isinstance(r, dict)]
    keys = list(dict.fromkeys(str(key) for one in about if isinstance(one, dict) for key in one))
    known = [key for name in CLASS_KEYS for key in keys if key.lower().rstrip("_ ") == name]
    if len(keys) > 1 and not known:
        raise DfssdError(
            f"regions have several attributes ({', '.join(map(repr, keys))}), and it is not clear which is the class",
            where=repr(path),
            todo="call that attribute 'class' in VIA (Attributes), and export again",
        )
    return known[0] if known else keys[0] if keys else ""


def _via_shapes(picture: dict[str, Any], key: str) -> tuple[list[str], Label]:
    shapes: list[Shape] = []
    counts: Counter[str] = Counter()
    for region in _regions(picture):
        shape, value = region["shape_attributes"], region["region_attributes"].get(key, "")
        if isinstance(value, dict):  # a checkbox
            value = next((name for name, on in value.items() if on), "")
        name, kind = str(value).strip(), shape["name"]
        if kind == "rect":
            x, y, w, h = (float(shape[k]) for k in ("x", "y", "width", "height"))
            shapes.append((name, x, y, x + w, y + h))
        elif kind in ("circle", "ellipse"):
            rx, ry = (float(shape[k]) for k in (("r", "r") if kind == "circle" else ("rx", "ry")))
            cx, cy, turn = float(shape["cx"]), float(shape["cy"]), float(shape.get("theta") or 0)  # rad
            w, h = np.hypot(rx * np.cos(turn), ry * np.sin(turn)), np.hypot(rx * np.sin(turn), ry * np.cos(turn))
            shapes.append((name, cx - w, cy - h, cx + w, cy + h))
        elif kind in ("polygon", "polyline"):
            shapes.append((name, *around(list(zip(shape["all_points_x"], shape["all_points_y"], strict=True)))))
        else:
            counts["other_shapes"] += 1
            continue
        counts["polygons"] += kind != "rect"
    return label_of(shapes, None, counts)
