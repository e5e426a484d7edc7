"""A long-tailed version of a labelled set: what a line looks like, where few defects are frequent and most are rare.

The usual protocol (Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019): the share of a class
that is kept falls geometrically over the classes, from 1 to 1 / `factor`. Here the order of the classes is drawn by the seed,
so that no class is rare in all seeds, and an image that shows several classes is kept by its rarest. Val and test stay as
they are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from dfssd.data.manifest import Manifest
from dfssd.data.preparation.splits import shuffle_key


def class_shares(classes: int, factor: float, seed: int) -> np.ndarray:
    """(C,) share of each class's images that is kept, 1 to 1 / factor."""
    order = random.Random(f"long tail {seed}").sample(range(classes), classes)
    shares = np.ones(classes)
    shares[order] = factor ** (-np.arange(classes) / max(classes - 1, 1))
    return shares


def rare_classes(classes: int, factor: float, seed: int) -> list[int]:
    """The classes of which less than a quarter is kept; none where factor is 1."""
    return np.flatnonzero(class_shares(classes, factor, seed) < 0.25).tolist()


def long_tailed(manifest: Manifest, factor: float, seed: int) -> Manifest:
    """The manifest without the train images that a long tail would not have; images free of defects stay.

    Of the images whose rarest class is c as many stay as its share says, to the image; which ones follows seed and content.
    """
    if factor < 1:
        raise ValueError(f"the factor of a long tail is at least 1, not {factor}")
    shares = class_shares(len(manifest.names), factor, seed)
    rarest: dict[int, list[str]] = {}
    for row in manifest.of_split("train"):
        if row.boxes is not None and len(row.boxes):
            shown: Sequence[int] = np.unique(row.boxes[:, 0].astype(int)).tolist()
            rarest.setdefault(min(shown, key=lambda c: shares[c]), []).append(row.image_id)
    dropped: set[str] = set()
    for c, ids in rarest.items():
        ranked = sorted(ids, key=lambda i: shuffle_key(seed, f"long tail {i}"))
        dropped.update(ranked[round(shares[c] * len(ids)) :])
    return Manifest([r for r in manifest.rows if r.image_id not in dropped], manifest.names, manifest.meta)
