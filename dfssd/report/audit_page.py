"""`audit.html`: one self-contained page on a prepared data set."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from importlib.resources import files
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jinja2 import Environment
from PIL import Image

from dfssd.data.checks import REASONS
from dfssd.data.manifest import SPLITS, Boxes, Row, read_manifest, read_withheld
from dfssd.report import audit
from dfssd.report.pictures import draw
from dfssd.runtime.storage import Storage

SHOWN = 12  # pictures of a kind
SIDE = 300  # px of a picture
SIZE_HEAD = ("class", "boxes", "10 % under", "median", "90 % under", "10 % under, in the image")
KINDS = {
    "nearly the same": "twice there",
    "also labelled": "two classes at one place",
    "times as long": "thread-like",
    "as large": "as large as the image",
    "far from": "unlike its class in size",
}  # by words of the reason

CHAPTERS = (
    ("classes", "Classes"), ("sizes", "Box sizes"), ("contradictions", "Near-duplicates"), ("suspects", "Suspicious boxes"),
    ("clean", "Clean pictures"), ("bad", "Set aside"),
)  # fmt: skip


def write_audit(dataset: Storage, summary: dict[str, Any], imgsz: int) -> None:
    """Write `audit.html` from what `prepare` has left.

    Args:
        dataset: the artefact.
        imgsz: training resolution (px).
    """
    manifest, withheld = read_manifest(dataset), read_withheld(dataset)
    labels, names = audit.labels_of(manifest, withheld), manifest.names
    sizes = audit.class_sizes(labels, names, imgsz)
    suspects = audit.suspects(labels, names, imgsz)
    contradictions = audit.contradictions(labels, _pairs(dataset))
    proposal = audit.proposal(sizes, labels, imgsz) if labels else ""
    fields: dict[str, Any] = {
        "total": len(manifest.rows),
        "names": names,
        "version": summary.get("version", 1),
        "imgsz": imgsz,
        "chapters": CHAPTERS,
        "notes": list(summary.get("notes", [])),
        "small": int(audit.SMALL),
        "proposal": proposal,
        "size_head": [*SIZE_HEAD, f"under {audit.SMALL:.0f} px"],
        "size_rows": [_size_row(s) for s in sizes],
        "contradiction_count": len(contradictions),
        "contradictions": [_pair(c, names) for c in audit.varied(contradictions, SHOWN)],
        "suspect_count": len(suspects),
        "suspects": [_suspect(s, names) for s in _spread(suspects)],
        "suspect_rows": _suspect_rows(suspects),
        "clean_rows": [[s, n, k, f"{k / n:.0%}"] for s, (k, n) in audit.clean_images(labels).items()],
        "bad_rows": _bad_rows(dataset),
        "bins": _bins(labels, imgsz),
        **_counts(summary, names),
    }
    template = Environment(autoescape=True).from_string(
        files("dfssd.report").joinpath("templates/audit.html.jinja").read_text()
    )
    dataset.write("audit.html", template.render(**fields).encode())


def _counts(summary: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The tables of classes by split, and of the boxes behind each class's numbers."""
    splits = {s: summary["splits"][s] for s in SPLITS if summary["splits"].get(s, {}).get("images")}
    rows = [[s, v["images"], v["labelled"], *(v["boxes"][n] for n in names)] for s, v in splits.items()]
    learnt = summary["labelled_boxes"]
    behind = []
    for name in names:
        test, val = (summary["splits"][s]["boxes"][name] for s in ("test", "val"))
        about = f"{100 * audit.uncertainty(test):.0f} points" if test else "cannot be measured"
        behind.append([name, learnt[name], _marked(val), _marked(test), about])
    return {
        "split_head": ["split", "images", "labels in use", *names],
        "split_rows": rows,
        "behind_head": [
            "class",
            "boxes to learn from",
            "boxes in val",
            "boxes in test",
            "its test recall is uncertain by",
        ],
        "behind_rows": behind,
    }


def _marked(count: int) -> str:
    return f"{count} (few)" if count < 5 else str(count)


def _size_row(s: audit.ClassSizes) -> list[str]:
    numbers = (s.low, s.median, s.high, s.original_low)
    return [s.name, str(s.boxes), *(f"{v:.0f} px" for v in numbers), f"{s.small:.0%}"]


def _bins(labels: list[tuple[Row, Boxes]], imgsz: int) -> list[dict[str, Any]]:
    edges = [0, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 1e9]
    short = np.concatenate([audit.sides_px(r, b, imgsz).min(1) for r, b in labels if len(b)] or [np.zeros(0)])
    counts, _ = np.histogram(short, edges)
    most = max(int(counts.max()), 1)
    names = [f"{a:g}-{b:g}" for a, b in pairwise(edges[:-1])] + [f"over {edges[-2]:g}"]
    heights = [round(100 * int(n) / most, 1) for n in counts]
    bars = zip(counts.tolist(), heights, names, strict=True)
    return [{"count": n, "height": height, "label": label} for n, height, label in bars]


def _pairs(dataset: Storage) -> list[tuple[str, str]]:
    if not dataset.exists("near_duplicates.parquet"):
        return []
    table = pq.read_table(io.BytesIO(dataset.read("near_duplicates.parquet")))
    close = table.filter(pc.greater_equal(table["correlation"], audit.CLOSE))
    return list(zip(close["a"].to_pylist(), close["b"].to_pylist(), strict=True))


def _pair(c: audit.Contradiction, names: list[str]) -> dict[str, str]:
    text = f"{_file(c.a)} ({c.a.split}) and {_file(c.b)} ({c.b.split}): {c.differing} boxes differ"
    return {
        "a": _picture(c.a, c.boxes_a, names, SIDE // 2),
        "b": _picture(c.b, c.boxes_b, names, SIDE // 2),
        "text": text,
    }


def _suspect(s: audit.Suspect, names: list[str]) -> dict[str, str]:
    box = s.boxes[s.which : s.which + 1]
    return {"picture": _picture(s.row, box, names, SIDE), "text": f"{_file(s.row)}: {names[int(box[0, 0])]}, {s.why}"}


def _kind(suspect: audit.Suspect) -> str:
    for key, kind in KINDS.items():
        if key in suspect.why:
            return kind
    return f"under {audit.TINY_PX:.0f} px in training"


def _spread(suspects: list[audit.Suspect]) -> list[audit.Suspect]:
    """Some of each kind, so that a frequent one does not hide the others."""
    by_kind: dict[str, list[audit.Suspect]] = {}
    for suspect in suspects:
        by_kind.setdefault(_kind(suspect), []).append(suspect)
    each = max(1, SHOWN // max(len(by_kind), 1))
    return [s for own in by_kind.values() for s in own[:each]]


def _suspect_rows(suspects: list[audit.Suspect]) -> list[list[Any]]:
    kinds = [_kind(s) for s in suspects]
    return [[k, kinds.count(k)] for k in sorted(set(kinds), key=lambda k: -kinds.count(k))]


def _bad_rows(dataset: Storage) -> list[list[Any]]:
    table = pq.read_table(io.BytesIO(dataset.read("bad_files.parquet"))).to_pylist()
    rows = []
    for reason in sorted({r["reason"] for r in table}):
        own = [r for r in table if r["reason"] == reason]
        rows.append(
            [
                reason,
                len(own),
                REASONS.get(reason, ""),
                f"{own[0]['uri'].rsplit('/', 1)[-1]} {own[0]['detail']}".strip(),
            ]
        )
    return rows


def _file(row: Row) -> str:
    return row.uri.rsplit("/", 1)[-1]


def _picture(row: Row, boxes: Boxes, names: list[str], side: int) -> str:
    """A picture with its boxes as the address of an image."""
    buffer = io.BytesIO()
    image: Image.Image = draw(row, boxes, names, side=side)
    image.convert("RGB").save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
