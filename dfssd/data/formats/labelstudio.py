"""Label Studio's JSON and JSON-MIN (labelstud.io/guide/export, labelstud.io/guide/task_format)."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from dfssd.data.checks import Label, Problem
from dfssd.data.formats.listing import Tree, is_image
from dfssd.data.formats.matching import Reference, slashes
from dfssd.data.formats.shapes import Shape, around, collect, guarded, label_of, turned
from dfssd.data.formats.source import Bad, Sheet, Source, unusable


def is_label_studio(content: Any) -> bool:
    """Tasks (`data` with `annotations` or `predictions`), or JSON-MIN (`image` with `annotator` or `label`)."""
    if not isinstance(content, list) or not content or not isinstance(content[0], dict):
        return False
    first = content[0]
    tasks = isinstance(first.get("data"), dict) and any(
        k in first for k in ("annotations", "completions", "predictions")
    )
    small = isinstance(first.get("image"), str) and isinstance(first.get("label"), list)
    return tasks or small or "annotation_id" in first


def csv_tasks(rows: list[dict[str, str]]) -> list[dict[str, Any]] | None:
    """Rows of Label Studio's CSV or TSV as entries of JSON-MIN; None of any other table."""
    if not rows or "annotation_id" not in rows[0]:
        return None
    tasks: list[dict[str, Any]] = []
    for row in rows:
        tasks.append({k: v for k, v in row.items() if v})
        for key, text in tasks[-1].items():
            if text.lstrip().startswith("["):
                try:
                    tasks[-1][key] = json.loads(text)
                except ValueError:
                    continue  # a text that a person wrote
    return tasks


def task_image(address: str) -> str:
    """Name of a picture in a task: a path, a URL, an upload (`/data/upload/1/ab12-x.png`) or local storage (`?d=x.png`)."""
    parts = urlparse(slashes(address))
    if "d" in (query := parse_qs(parts.query)):
        return slashes(query["d"][0])
    return slashes(unquote(parts.path)).lstrip("/")


def read_label_studio(tree: Tree, contents: dict[str, Any]) -> Source:
    """Label Studio's JSON; a task that nobody finished is unlabelled, a finished one without a box is free of defects."""
    sheets: list[Sheet] = []
    bad: list[Bad] = []
    counts: Counter[str] = Counter()
    for path, content in contents.items():
        for task in filter(lambda t: isinstance(t, dict), content):
            try:
                address, results, others = _task(task)
                pages = _pages(task, address, results or [])
            except (TypeError, AttributeError, ValueError):
                said = "its data or annotations are not as the JSON export has them"
                bad.append((f"{path}#task {task.get('id')}", Problem("label_unreadable", said)))
                continue
            if results is None:
                of = [p.get("result") or [] for p in task.get("predictions") or [] if isinstance(p, dict)]
                counts["unsure"] += sum(len(found) for found in of if isinstance(found, list))
                continue
            counts["opinions"] += others > 0
            for page, drawn in pages.items():
                name = task_image(page)
                sheets.append(guarded(Reference(path, name), f"{path}#{name}", partial(_studio_shapes, drawn)))
    source = collect(tree, "labelstudio", sheets)
    source.bad += bad
    source.counts += counts
    return source


def _task(task: dict[str, Any]) -> tuple[str, list[dict[str, Any]] | None, int]:
    """Address of the picture, the results of the annotation that counts (the newest that was not skipped), and how many
    others there are."""
    if "data" not in task:
        # The key of the shapes is the name of the control, and of the picture that of its variable: both are free.
        shapes = [v for key, values in task.items() if isinstance(values, list) and key != "data" for v in values]
        return task_address(task), [_as_result(v) for v in shapes if isinstance(v, dict)], 0
    address = task_address(task["data"])
    done = [a for a in task.get("annotations") or task.get("completions") or [] if not a.get("was_cancelled")]
    done.sort(key=lambda a: (bool(a.get("ground_truth")), str(a.get("updated_at") or a.get("created_at") or "")))
    results = done[-1].get("result") if done else None  # null is no result: nobody said that there is none
    return address, None if results is None else list(results), len(done) - 1


def _pages(task: dict[str, Any], address: str, results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]] | None]:
    """Results of each picture that a task's results are about; None where it is not clear which of several that is."""
    data = task.get("data") or task
    pages = {key: v for key, v in data.items() if isinstance(v, str) and is_image(task_image(v))}
    targets = {str(r.get("to_name") or "") for r in results if isinstance(r, dict)}
    if len(pages) > 1 and targets and targets <= pages.keys():
        return {pages[key]: [r for r in results if r.get("to_name") == key] for key in sorted(targets)}
    several = len(pages) > 1 and len(targets) > 1
    several |= any(isinstance(r, dict) and (r.get("item_index") or 0) for r in results)
    return {address: None if several else results}


def task_address(data: dict[str, Any]) -> str:
    """Address of the picture among the variables of a task."""
    texts = [v for v in data.values() if isinstance(v, str)]
    return str(data.get("image") or next((v for v in texts if is_image(task_image(v))), texts[0] if texts else ""))


def _as_result(value: dict[str, Any]) -> dict[str, Any]:
    """A shape of JSON-MIN as one of a task."""
    kind = next((k for k in value if k.endswith("labels")), "rectanglelabels")
    return {**{k: value.get(k) for k in ("original_width", "original_height")}, "type": kind, "value": value}


def _kind(result: dict[str, Any]) -> str:
    """Type of a shape; that of a <Labels> control is told by what it holds."""
    value, kind = result.get("value") or {}, str(result.get("type") or "")
    if kind == "labels":
        known = {"points": "polygon", "radiusX": "ellipse", "rle": "brush", "height": "rectangle"}
        return next((shape for key, shape in known.items() if key in value), kind)
    return kind


def _classes(result: dict[str, Any]) -> list[Any]:
    value = result.get("value") or {}
    return next((v for k, v in value.items() if k.endswith("labels") and isinstance(v, list)), None) or []


def _geometry(result: dict[str, Any]) -> dict[str, Any]:
    value = result.get("value") or {}
    return {k: value[k] for k in ("x", "y", "width", "height", "radiusX", "radiusY", "points", "rle") if k in value}


def _studio_shapes(results: list[dict[str, Any]] | None) -> tuple[list[str], Label]:
    if results is None:
        return [], unusable(
            "label_unreadable", "a task with several pictures, whose names are not those of their variables"
        )
    shapes: list[Shape] = []
    counts: Counter[str] = Counter()
    size = None
    drawn = [_geometry(r) for r in results if _classes(r)]
    for result in results:
        value, kind = result.get("value") or {}, _kind(result)
        if not _classes(result) and _geometry(result) in drawn:
            continue  # a bare shape, whose class is in a result of its own (<Rectangle> and <Labels>)
        if not any(k in kind for k in ("rectangle", "polygon", "ellipse", "brush", "keypoint")):
            continue  # choices, texts, relations: nothing that is drawn
        width, height = float(result.get("original_width") or 0), float(result.get("original_height") or 0)
        names = _classes(result) or [""]
        if "brush" in kind:
            return [], unusable("label_unreadable", "a painted mask; export rectangles, or as COCO")
        if "keypoint" in kind:
            counts["other_shapes"] += 1
            continue
        if min(width, height) <= 0:
            return [], unusable("label_unreadable", "a shape without original_width and original_height")
        size = (int(width), int(height))
        shapes += [(str(n).strip(), *_studio_box(value, kind, width, height, counts)) for n in names]  # type: ignore[misc]
    return label_of(shapes, size, counts)


def _studio_box(
    value: dict[str, Any], kind: str, width: float, height: float, counts: Counter[str]
) -> tuple[float, ...]:
    """Corners in px; Label Studio counts in percent, and turns a rectangle about its upper left corner."""
    if "polygon" in kind:
        counts["polygons"] += 1
        return around([[p[0] * width / 100, p[1] * height / 100] for p in value["points"]])
    if "ellipse" in kind:
        counts["polygons"] += 1
        cx, cy, rx, ry = (float(value[k]) for k in ("x", "y", "radiusX", "radiusY"))
        low, high = (cx - rx, cy - ry), (cx + rx, cy + ry)
        return around([[x * width / 100, y * height / 100] for x, y in (low, high)])
    x, y, w, h = (float(value[k]) for k in ("x", "y", "width", "height"))
    x, y, w, h = x * width / 100, y * height / 100, w * width / 100, h * height / 100
    if rotation := float(value.get("rotation") or 0):
        counts["rotated"] += 1
        return turned(x, y, w, h, rotation, (x, y))
    return x, y, x + w, y + h
