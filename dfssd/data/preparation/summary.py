"""What `prepare` found, in numbers and as a picture."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from dfssd.data.boxes import CLS
from dfssd.data.checks import THUMB_SIDE
from dfssd.data.formats.source import COUNTED, Source
from dfssd.data.manifest import LEFT_OUT, SPLITS, Boxes, Row
from dfssd.data.preparation.assignment import Pairs, by_folder

FEW = 5  # boxes of a class in val or test below which its numbers say little


def contact_sheet(thumb: Callable[[int], np.ndarray], groups: np.ndarray, rows: int = 10, columns: int = 12) -> bytes:
    """PNG with the ten largest groups, one a row, up to twelve members spread over the group.

    Args:
        thumb: (48,48) uint8 of an image.
        groups: (n,) of all images.
    """
    cell = THUMB_SIDE + 2
    sheet = np.full((rows * cell, columns * cell), 255, np.uint8)
    for y, (group, _) in enumerate(Counter(groups.tolist()).most_common(rows)):
        members = np.flatnonzero(groups == group)
        for x, k in enumerate(members[np.linspace(0, len(members) - 1, min(columns, len(members))).astype(int)]):
            sheet[y * cell : y * cell + THUMB_SIDE, x * cell : x * cell + THUMB_SIDE] = thumb(int(k))
    buffer = io.BytesIO()
    Image.fromarray(sheet).resize((columns * cell * 2, rows * cell * 2), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def summarise(
    source: Source,
    rows: list[Row],
    withheld: dict[str, Boxes],
    bad: Counter[str],
    groups: np.ndarray,
    pairs: Pairs,
) -> dict[str, Any]:
    """Numbers for stage.json, the terminal and the report."""
    leaks = {name: leaking(rows, pairs, name) for name in ("val", "test")}
    per_split: dict[str, Any] = {}
    for name in SPLITS:
        members = [r for r in rows if r.split == name]
        boxes = [b for r in members if (b := r.boxes if r.boxes is not None else withheld.get(r.image_id)) is not None]
        classes = np.concatenate([b[:, CLS] for b in boxes]).astype(int) if boxes else np.zeros(0, int)
        per_split[name] = {
            "images": len(members),
            "labelled": sum(r.labelled for r in members),
            "boxes": {n: int((classes == c).sum()) for c, n in enumerate(source.names)},
        }
    seen = [r.boxes for r in rows if r.labelled and r.boxes is not None]
    labelled_classes = np.concatenate([b[:, CLS] for b in seen]).astype(int) if seen else np.zeros(0, int)
    return {
        "format": source.format,
        "names": source.names,
        "images": len(rows),
        "splits": per_split,
        "labelled_images": sum(r.labelled for r in rows),
        "labelled_boxes": {n: int((labelled_classes == c).sum()) for c, n in enumerate(source.names)},
        "bad_files": dict(bad),
        "groups": len(set(groups.tolist())),
        "images_with_near_duplicate": int(sum(s for s in Counter(groups.tolist()).values() if s > 1)),
        "largest_group": int(max(Counter(groups.tolist()).values())),
        "test_images_with_near_duplicate_in_train": leaks["test"],
        "val_images_with_near_duplicate_in_train": leaks["val"],
        "left_out": sum(r.split == LEFT_OUT for r in rows),
        "in_no_split": len(source.unused),
        "read_otherwise": {key: n for key, n in source.counts.items() if n},
    }


def leaking(rows: list[Row], pairs: Pairs, split: str) -> int:
    """Images of a split that have a near-duplicate among all that trains, labelled or not."""
    held = np.array([r.split == split for r in rows], bool)
    trains = np.array([r.split in ("train", "unlabelled-only") for r in rows], bool)
    i, j, _ = pairs
    return len({*i[held[i] & trains[j]].tolist(), *j[held[j] & trains[i]].tolist()})


def budget(summary: dict[str, Any], from_labels: bool) -> str:
    """How many images' labels are used, val among them: it chooses weights, teacher and thresholds."""
    train, val = summary["labelled_images"], summary["splits"]["val"]["images"]
    how = "val is a part of the labels" if from_labels else "--val-from-labels makes val a part of the labels"
    return (
        f"labels used: {train} train + {val} val = {train + val} images, for val chooses weights and thresholds ({how})"
    )


def statements(source: Source, summary: dict[str, Any], hidden: str) -> list[str]:
    """What a user should know before hours of training, in whole sentences.

    Args:
        hidden: why labels of train images are hidden; '' where none are.
    """
    notes = [f"{n} {COUNTED[key]}" for key, n in summary["read_otherwise"].items()]
    if source.unused:
        where = by_folder(source.unused, source.root)
        notes.append(f"{len(source.unused)} pictures lie in no split of the data.yaml and are left out: {where}")
    splits = summary["splits"]
    if hidden:
        count = splits["train"]["images"] - summary["labelled_images"]
        notes.append(f"the labels of {count} of {splits['train']['images']} train images are hidden ({hidden})")
    unlabelled = splits["train"]["images"] - summary["labelled_images"] + splits["unlabelled-only"]["images"]
    if not unlabelled:
        notes.append(
            "every image that may train is labelled, so there is nothing to pseudo-label: the student will learn from labels "
            "and teacher alone; --unlabelled FOLDER adds images without labels, --label-fraction 0.1 hides nine of ten "
            "labels to see what pseudo-labels are worth"
        )
    for name in ("val", "test"):
        if not splits[name]["images"]:
            notes.append(f"the {name} split is empty: nothing can be measured on it")
            continue
        few = [f"{c} ({n})" for c, n in splits[name]["boxes"].items() if n < FEW]
        if few:
            notes.append(
                f"fewer than {FEW} boxes in {name}: {', '.join(few)}; numbers of these classes there say little"
            )
    unseen = [c for c, n in summary["labelled_boxes"].items() if not n]
    if unseen:
        notes.append(f"no labelled train image shows {', '.join(unseen)}: the teacher cannot learn what it never sees")
    if summary["left_out"]:
        n = summary["left_out"]
        notes.append(
            f"{n} images are near-duplicates of images of val or test and are left out: nothing trains on them"
        )
    if summary["duplicates_with_other_labels"]:
        n = summary["duplicates_with_other_labels"]
        notes.append(f"{n} byte-identical copies carry other labels than the one that is kept")
    return notes
