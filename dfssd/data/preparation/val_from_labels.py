"""`--val-from-labels`: val as a part of the labels that may be used, so that "300 labels" means 300.

Val chooses weights, teacher and thresholds, so its labels are spent as those of train are. Here the labelled images are
chosen among all that are not test, and whole groups of near-duplicates of them become val. What else was val before is
unlabelled; what is a near-duplicate of the new val, and not in it, is left out. Test stays as it is without this setting.
"""

from __future__ import annotations

import numpy as np

from dfssd.config import Data
from dfssd.data.boxes import CLS
from dfssd.data.checks import Checked
from dfssd.data.manifest import LEFT_OUT
from dfssd.data.preparation import splits
from dfssd.data.preparation.assignment import Pairs
from dfssd.data.preparation.versions import Previous
from dfssd.errors import DfssdError

FEWEST = 10  # labelled images, below which none can be spared
ENOUGH = 5  # boxes of a class in val, where that is not more than a third of those which are labelled
SHARES = (0.2, 0.25, 1 / 3)  # of the labelled images, tried in turn until val has enough boxes of each class


def without_val(images: list[Checked], split_names: list[str], groups: np.ndarray, config: Data) -> list[str]:
    """The splits before val is taken from the labels: train and test. What was left out for val's sake alone is back."""
    names = ["train" if name == "val" else name for name in split_names]
    if config.split != "grouped":
        return names
    of_test = {g for g, name in zip(groups.tolist(), split_names, strict=True) if name == "test"}
    of_val = {g for g, name in zip(groups.tolist(), split_names, strict=True) if name == "val"} - of_test
    return [
        "train" if name == LEFT_OUT and image.boxes is None and g in of_val else name
        for image, name, g in zip(images, names, groups.tolist(), strict=True)
    ]


def take_val(
    images: list[Checked],
    split_names: list[str],
    labelled: set[str],
    groups: np.ndarray,
    pairs: Pairs,
    config: Data,
    seed: int,
    classes: int,
    previous: Previous | None = None,
) -> tuple[list[str], set[str]]:
    """Make whole groups of the labelled images val.

    Args:
        split_names: as `without_val` gives them.
        labelled: ids of the labelled images.

    Returns:
        splits, and the ids of the labelled images of train.

    Raises:
        DfssdError: there are too few labelled images.
    """
    unit = np.arange(len(images)) if config.split == "random" else groups
    rows = [k for k, i in enumerate(images) if i.image_id in labelled and split_names[k] == "train"]
    before = _earlier(images, unit, previous)
    fixed = np.array([before.get(int(unit[k]), -1) for k in rows], np.int64)
    if len(rows) < FEWEST or len({int(unit[k]) for k in rows}) < 2:
        raise DfssdError(
            f"{len(rows)} labelled images are too few to take val from them: it takes {FEWEST}, in two groups of "
            "near-duplicates at least",
            where=repr(config.data),
            todo="label more images (--label-fraction, --labels-per-class), or leave --val-from-labels out",
        )
    boxes = [images[k].boxes for k in rows]
    counts, ids = splits.class_counts(boxes, classes), [images[k].image_id for k in rows]
    own = config.split_shares[1] / (config.split_shares[0] + config.split_shares[1])
    for share in sorted({own, *SHARES}):
        placed = splits.assign_splits(ids, unit[rows], counts, (1 - share, share), seed, fixed)
        if _enough([b for b in boxes if b is not None], placed, classes):
            break
    names, val = list(split_names), {int(unit[k]) for k, place in zip(rows, placed.tolist(), strict=True) if place}
    for k, name in enumerate(split_names):
        if int(unit[k]) in val and name in ("train", "unlabelled-only"):
            names[k] = "val" if images[k].image_id in labelled and name == "train" else LEFT_OUT
    if config.split == "given":  # as for its own val: direct pairs count, whatever group they came to
        held = np.array([name == "val" for name in names])
        i, j, _ = pairs
        for k in {*i[held[j]].tolist(), *j[held[i]].tolist()}:
            names[k] = LEFT_OUT if names[k] in ("train", "unlabelled-only") else names[k]
    return names, {i.image_id for i, name in zip(images, names, strict=True) if name == "train"} & labelled


def _earlier(images: list[Checked], unit: np.ndarray, previous: Previous | None) -> dict[int, int]:
    """By group: 1 where an earlier version measured on it, 0 where it trained on it."""
    found: dict[int, int] = {}
    for image, own in zip(images, unit.tolist(), strict=True):
        row = previous.rows.get(image.image_id) if previous else None
        if row is not None and row.split in ("train", "val", "unlabelled-only"):
            found[own] = max(found.get(own, 0), int(row.split == "val"))
    return found


def _enough(boxes: list[np.ndarray], placed: np.ndarray, classes: int) -> bool:
    """Has val enough boxes of each class?"""
    of_class = np.array([np.bincount(b[:, CLS].astype(int), minlength=classes) for b in boxes])
    every, in_val = of_class.sum(0), of_class[placed == 1].sum(0)
    return bool((in_val >= np.minimum(ENOUGH, every // 3)).all() and 0 < (placed == 1).sum() < len(placed))
