"""What `prepare` found, in numbers and as a picture."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import numpy as np
from PIL import Image

from dfssd.data.checks import THUMB_SIDE
from dfssd.data.manifest import SPLITS, Boxes, Row
from dfssd.data.source import Source


def contact_sheet(thumbs: list[np.ndarray], groups: np.ndarray, rows: int = 10, columns: int = 12) -> bytes:
    """PNG with the ten largest groups, one a row, up to twelve members spread over the group."""
    cell = THUMB_SIDE + 2
    sheet = np.full((rows * cell, columns * cell), 255, np.uint8)
    for y, (group, _) in enumerate(Counter(groups.tolist()).most_common(rows)):
        members = np.flatnonzero(groups == group)
        for x, k in enumerate(members[np.linspace(0, len(members) - 1, min(columns, len(members))).astype(int)]):
            sheet[y * cell : y * cell + THUMB_SIDE, x * cell : x * cell + THUMB_SIDE] = thumbs[k]
    buffer = io.BytesIO()
    Image.fromarray(sheet).resize((columns * cell * 2, rows * cell * 2), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def summarise(
    source: Source,
    rows: list[Row],
    withheld: dict[str, Boxes],
    bad: Counter[str],
    groups: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray],
) -> dict[str, Any]:
    """Numbers for stage.json, the terminal and the report."""
    split_of = np.array([SPLITS.index(r.split) for r in rows])
    i, j = pairs
    leaking = set(i[(split_of[i] == 2) & (split_of[j] == 0)].tolist())
    leaking |= set(j[(split_of[j] == 2) & (split_of[i] == 0)].tolist())
    per_split: dict[str, Any] = {}
    for name in SPLITS:
        members = [r for r in rows if r.split == name]
        boxes = [b for r in members if (b := r.boxes if r.boxes is not None else withheld.get(r.image_id)) is not None]
        classes = np.concatenate([b[:, 0] for b in boxes]).astype(int) if boxes else np.zeros(0, int)
        per_split[name] = {
            "images": len(members),
            "labelled": sum(r.labelled for r in members),
            "boxes": {n: int((classes == c).sum()) for c, n in enumerate(source.names)},
        }
    seen = [r.boxes for r in rows if r.labelled and r.boxes is not None]
    labelled_classes = np.concatenate([b[:, 0] for b in seen]).astype(int) if seen else np.zeros(0, int)
    return {
        "format": source.format,
        "names": source.names,
        "files": len(source.items),
        "images": len(rows),
        "splits": per_split,
        "labelled_images": sum(r.labelled for r in rows),
        "labelled_boxes": {n: int((labelled_classes == c).sum()) for c, n in enumerate(source.names)},
        "bad_files": dict(bad),
        "groups": len(set(groups.tolist())),
        "images_with_near_duplicate": int(sum(s for s in Counter(groups.tolist()).values() if s > 1)),
        "largest_group": int(max(Counter(groups.tolist()).values())),
        "test_images_with_near_duplicate_in_train": len(leaking),
    }
