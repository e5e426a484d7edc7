"""Splits and the labelled subset: functions of the seed and the images' content, never of the order of files.

A group is placed as a whole, into the split that lacks most of what the group holds (greedy form of Sechidis et al.
2011, "On the stratification of multi-label data"). The labelled subset is a prefix of one fixed, stratified order of the
train images, so that the 5 % subset lies inside the 10 % one.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from dfssd.data.boxes import CLS


def shuffle_key(seed: int, image_id: str) -> str:
    """Pseudo-random but fixed rank of an image; it depends on nothing but seed and content."""
    return hashlib.sha256(f"{seed}:{image_id}".encode()).hexdigest()


def class_counts(boxes: Sequence[np.ndarray | None], classes: int) -> np.ndarray:
    """(n, classes+1) float: 1 where an image shows the class; the last column marks images without a box."""
    counts = np.zeros((len(boxes), classes + 1))
    for row, one in enumerate(boxes):
        if one is not None and len(one):
            counts[row, np.unique(one[:, CLS].astype(int))] = 1
        else:
            counts[row, classes] = 1
    return counts


def assign_splits(
    ids: Sequence[str],
    groups: np.ndarray,
    counts: np.ndarray,
    shares: Sequence[float],
    seed: int,
    fixed: np.ndarray | None = None,
) -> np.ndarray:
    """Place whole groups into splits, so that images and every class come close to `shares`.

    Args:
        ids: n image ids.
        groups: (n,) group of each image.
        counts: (n, k) what each image holds (see `class_counts`).
        shares: share of each split, adding up to 1.
        seed: another seed gives another split.
        fixed: (n,) splits that are given, -1 where none is; these count as filled, and keep their places.

    Returns:
        (n,) index into `shares`.
    """
    members: dict[int, list[int]] = defaultdict(list)
    given = np.full(len(ids), -1) if fixed is None else fixed
    for row, group in enumerate(groups.tolist()):
        if given[row] < 0:
            members[group].append(row)
    keys = {g: shuffle_key(seed, min(ids[r] for r in rows)) for g, rows in members.items()}
    # Large groups first, while every split still has room for them; ties in pseudo-random order.
    order = sorted(members, key=lambda g: (-len(members[g]), keys[g]))
    load = np.concatenate([counts, np.ones((len(ids), 1))], 1)  # what it holds, and that it is one image
    total = load.sum(0)
    target = np.outer(shares, total)
    missing = target.copy()
    result = np.array(given, np.int64)
    for row in np.flatnonzero(given >= 0).tolist():
        missing[given[row]] -= load[row]
    scale = np.maximum(target, 1e-9)
    for group in order:
        rows = members[group]
        held = load[rows].sum(0)
        rarity = held / np.maximum(total, 1)
        # Relative need, but never a split that the group would overfill by more than a tenth of its target.
        need = (missing / scale) @ rarity
        need[(held > missing + 0.1 * target).any(1)] -= 1e6
        split = int(need.argmax() if need.max() > -1e5 else (missing @ rarity).argmax())
        result[rows] = split
        missing[split] -= held
    return result


def labelling_order(ids: Sequence[str], counts: np.ndarray, seed: int) -> list[int]:
    """Order in which train images would be labelled; every prefix is stratified.

    Each next image is the first one, in pseudo-random order, that shows the class which is furthest behind its share.
    """
    ranked = sorted(range(len(ids)), key=lambda r: shuffle_key(seed, ids[r]))
    queues = [[r for r in reversed(ranked) if counts[r, c]] for c in range(counts.shape[1])]
    share = counts.sum(0) / max(counts.sum(), 1)
    given, taken = np.zeros(counts.shape[1]), np.zeros(len(ids), bool)
    order: list[int] = []
    while len(order) < len(ids):
        open_classes = [c for c, queue in enumerate(queues) if queue]
        total = given.sum() + 1
        # A class without any image yet comes first, rare ones before common ones.
        c = min(open_classes, key=lambda k: (given[k] - share[k] * total, share[k]))
        row = queues[c].pop()
        if taken[row]:
            continue
        taken[row] = True
        given += counts[row]
        order.append(row)
    return order


def take_per_class(order: Sequence[int], counts: np.ndarray, per_class: int) -> list[int]:
    """The first `per_class` images of `order` that show each class, united: nested in `per_class` by construction.

    Images show several classes, so frequent classes end up with more than `per_class`.
    """
    ranked = np.asarray(order)
    firsts = [ranked[counts[ranked, c] > 0][:per_class] for c in range(counts.shape[1] - 1)]
    chosen = set(np.concatenate(firsts).tolist()) if firsts else set()
    return [row for row in order if row in chosen]
