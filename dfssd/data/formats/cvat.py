"""CVAT's own XML, for images and for video (docs.cvat.ai/docs/dataset_management/formats/format-cvat)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from xml.etree.ElementTree import Element

from dfssd.data.checks import Label
from dfssd.data.formats.listing import Tree
from dfssd.data.formats.matching import Reference, slashes
from dfssd.data.formats.shapes import Shape, around, collect, guarded, label_of, turned, with_untouched
from dfssd.data.formats.source import Sheet, Source, given_split

FRAME = re.compile(r"(^|/)frame_\d+\.\w+$")


def read_cvat(tree: Tree, roots: dict[str, Element]) -> Source:
    """CVAT's own XML ("CVAT for images", "CVAT for video"); `roots` are parsed files by path."""
    sheets: list[Sheet] = []
    declared: list[str] = []
    is_video = False
    for path, root in roots.items():
        declared += [(n.findtext("name") or "").strip() for n in root.iter("label")]
        frames: dict[str, list[Element]] = {}
        for track in root.iter("track"):
            is_video = True
            for node in track:
                if node.get("outside") != "1" and node.get("frame") is not None:
                    node.set("label", track.get("label") or "")
                    frames.setdefault((node.get("frame") or "").strip().removesuffix(".0"), []).append(node)
        for image in root.iter("image"):
            name = slashes(image.get("name") or "")
            subset = image.get("subset") or ""
            size = (image.get("width") or "0", image.get("height") or "0")
            sheet = guarded(Reference(path, name, subset), f"{path}#{name}", partial(_cvat_shapes, list(image), size))
            sheet.split = given_split(f"/{subset}/x", "")
            sheets.append(sheet)
        for frame, nodes in frames.items():
            name = f"frame_{frame.zfill(6)}."
            sheets.append(guarded(Reference(path, name), f"{path}#{name}", partial(_cvat_shapes, nodes, None)))
    source = collect(tree, "cvat", sheets, [d for d in declared if d])
    silent = sum(i.label is None and FRAME.search(i.uri) is not None for i in source.items) if is_video else 0
    return with_untouched(source, silent)


def _cvat_shapes(nodes: Sequence[Element], size: tuple[str, str] | None) -> tuple[list[str], Label]:
    shapes: list[Shape] = []
    counts: Counter[str] = Counter()
    for node in nodes:
        name = (node.get("label") or "").strip()

        def number(key: str, node: Element = node) -> float:
            return float(node.get(key) or "nan")

        if node.tag == "box":
            x1, y1, x2, y2 = (number(k) for k in ("xtl", "ytl", "xbr", "ybr"))
            if rotation := float(node.get("rotation") or 0):
                counts["rotated"] += 1
                x1, y1, x2, y2 = turned(x1, y1, x2 - x1, y2 - y1, rotation, ((x1 + x2) / 2, (y1 + y2) / 2))
            shapes.append((name, x1, y1, x2, y2))
        elif node.tag == "polygon":
            counts["polygons"] += 1
            points = [[float(v) for v in p.split(",")] for p in (node.get("points") or "").split(";")]
            shapes.append((name, *around(points)))
        elif node.tag == "mask":
            counts["polygons"] += 1
            x, y, w, h = (number(k) for k in ("left", "top", "width", "height"))
            shapes.append((name, x, y, x + w, y + h))
        elif node.tag == "ellipse":
            counts["polygons"] += 1
            cx, cy, rx, ry = (number(k) for k in ("cx", "cy", "rx", "ry"))
            shapes.append((name, cx - rx, cy - ry, cx + rx, cy + ry))
        elif node.tag in ("polyline", "points", "cuboid", "skeleton"):
            counts["other_shapes"] += 1
    return label_of(shapes, (int(float(size[0])), int(float(size[1]))) if size else None, counts)
