"""Which picture goes into which split, and whose labels training may see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from dfssd.config import Data
from dfssd.data.checks import Checked
from dfssd.data.formats.matching import slashes
from dfssd.data.formats.source import Source
from dfssd.data.manifest import LEFT_OUT, SPLITS, Boxes, Row
from dfssd.data.preparation import splits
from dfssd.data.preparation.versions import Previous
from dfssd.errors import DfssdError
from dfssd.runtime.storage import read_uri

HELD_OUT = ("val", "test")
LEAST = 10  # labelled images that can be split
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]  # i, j, correlation


def split_images(
    images: list[Checked],
    groups: np.ndarray,
    pairs: Pairs,
    config: Data,
    seed: int,
    source: Source,
    previous: Previous | None = None,
    least: int = LEAST,
) -> list[str]:
    """Split of every image; one that nobody labelled follows its group, is unlabelled-only, or is left out because it is
    a near-duplicate of an image of val or test.

    Args:
        least: labelled images that there must be; fewer than `LEAST` where nobody asks for the splits.

    Raises:
        DfssdError: too few images, or --split given and the data's splits are none.
    """
    if config.split == "given":
        return _given(images, pairs, config, source)
    has_label = np.array([i.boxes is not None for i in images])
    ids = [i.image_id for i in images]
    if has_label.sum() < least:
        raise DfssdError(
            f"{int(has_label.sum())} images have labels; train, val and test need at least {least}",
            where=repr(config.data),
            todo="label more images, or check that the label files are found (bad_files.parquet, --format)",
        )
    unit = groups if config.split == "grouped" else np.arange(len(images))
    kept = [
        _kept(previous, image, others) for image, others in zip(images, _earlier(images, unit, previous), strict=True)
    ]
    rows = np.array([r for r in np.flatnonzero(has_label) if kept[r] != LEFT_OUT], np.int64)
    counts = splits.class_counts([images[r].boxes for r in rows], len(source.names))
    fixed = np.array([SPLITS.index(kept[r]) if kept[r] in ("train", *HELD_OUT) else -1 for r in rows], np.int64)
    placed = splits.assign_splits([ids[r] for r in rows], unit[rows], counts, config.split_shares, seed, fixed)
    names = [name or "unlabelled-only" for name in kept]
    of_group: dict[int, str] = {}
    for row, place in zip(rows.tolist(), placed.tolist(), strict=True):
        names[row] = SPLITS[place]
        of_group[int(unit[row])] = SPLITS[place]
    for row in np.flatnonzero(~has_label).tolist():
        followed = kept[row] or of_group.get(int(unit[row]), "unlabelled-only")
        names[row] = LEFT_OUT if followed in HELD_OUT else followed
    return names


def _earlier(images: list[Checked], unit: np.ndarray, previous: Previous | None) -> list[set[str]]:
    """For each image the splits that an earlier version gave to images of its group."""
    of_group: dict[int, set[str]] = {}
    if previous:
        for image, group in zip(images, unit.tolist(), strict=True):
            if image.image_id in previous.rows:
                of_group.setdefault(group, set()).add(previous.rows[image.image_id].split)
    return [of_group.get(group, set()) for group in unit.tolist()]


def _kept(previous: Previous | None, image: Checked, others: set[str]) -> str:
    """Split that an image has because of an earlier version, its own or that of its near-duplicates; '' where none is."""
    if previous is None:
        return ""
    own = previous.fixed_split(image.image_id, image.boxes is not None)
    if own is not None or not others:
        return own or ""
    held = others.intersection(HELD_OUT)
    if held:  # a new near-duplicate of what is measured on: with its like, or nowhere
        return held.pop() if len(others) == 1 and image.boxes is not None else LEFT_OUT
    if LEFT_OUT in others:
        return LEFT_OUT
    return "train" if image.boxes is not None or "train" in others else "unlabelled-only"


def _given(images: list[Checked], pairs: Pairs, config: Data, source: Source) -> list[str]:
    """The data's own splits. What lies in val or test, or is a near-duplicate of what does, is never trained on."""
    if source.twice:
        path, both = source.twice[0]
        raise DfssdError(
            f"{len(source.twice)} pictures lie in two of the given splits, such as {path!r} in {both}",
            where=repr(config.data),
            todo="let each picture be in one split, or use --split grouped, which makes its own",
        )
    if not {"train", "val", "test"} <= {i.given_split for i in images if i.boxes is not None}:
        found = Counter(i.given_split or "no split" for i in images if i.boxes is not None)
        said = ", ".join(f"{n} labelled images in {name}" for name, n in sorted(found.items())) or "no labelled image"
        raise DfssdError(
            f"--split given needs train, val and test in the data; found {said}",
            where=repr(config.data),
            todo="use --split grouped, which makes its own",
        )
    lost = [i.uri for i in images if i.boxes is not None and not i.given_split]
    if lost:
        raise DfssdError(
            f"{len(lost)} labelled pictures lie in none of the given splits: {by_folder(lost, source.root)}",
            where=repr(config.data),
            todo="move them into train, val or test, take their labels away, or use --split grouped",
        )
    names = [i.given_split if i.boxes is not None else "unlabelled-only" for i in images]
    for row, image in enumerate(images):
        if image.boxes is None and image.given_split in HELD_OUT:
            names[row] = LEFT_OUT
    held_out = np.array([n in HELD_OUT for n in names])
    i, j, _ = pairs
    for row in {*i[held_out[j]].tolist(), *j[held_out[i]].tolist()}:
        if not held_out[row]:
            names[row] = LEFT_OUT
    if "train" not in names:
        raise DfssdError(
            "every picture of the given train split is a near-duplicate of one in val or test",
            where=repr(config.data),
            todo="use --split grouped, which keeps near-duplicates together, or a higher --near-duplicate",
        )
    return names


def by_folder(paths: Sequence[str], root: str) -> str:
    """Folders of these files with their numbers, the fullest first, five at most."""
    counts = Counter(
        p[len(root) :].strip("/").rpartition("/")[0] if p.startswith(root) else p.rpartition("/")[0] for p in paths
    )
    parts = [f"{folder or '.'!r} ({n})" for folder, n in counts.most_common(5)]
    return ", ".join(parts) + (f" and {len(counts) - 5} folders more" if len(counts) > 5 else "")


def _called(image: Checked, folders: int) -> list[str]:
    """What a list may call an image: its id, or its file name with up to so many folders, or all of them."""
    parts = image.uri.split("/")
    return [image.image_id, image.uri, *("/".join(parts[-k:]) for k in range(1, folders + 2))]


def choose_labelled(
    images: list[Checked],
    split_names: list[str],
    config: Data,
    seed: int,
    classes: int,
    previous: Previous | None = None,
) -> tuple[set[str], str]:
    """Ids of the train images whose labels may be used, and why the others are hidden ('' where none is).

    Raises:
        DfssdError: --labelled-list names no train image.
    """
    train = [i for i, s in zip(images, split_names, strict=True) if s == "train" and i.boxes is not None]
    if config.labelled_list:
        lines = read_uri(config.labelled_list).decode("utf-8-sig").splitlines()
        wanted = {slashes(line): line for line in lines if line.strip()}
        most = max((name.count("/") for name in wanted), default=0)
        meant = {i.image_id: [n for n in _called(i, most) if n in wanted] for i in train}
        chosen = {key for key, names in meant.items() if names}
        lost = [wanted[n] for n in wanted.keys() - {n for names in meant.values() for n in names}]
        if not chosen:
            raise DfssdError(
                "no train image is in the labelled list",
                where=config.labelled_list,
                todo="list image ids or file names of train images, one a line (split.csv shows both)",
            )
        said = f"; {len(lost)} of its lines name no labelled train image, such as {min(lost)!r}" if lost else ""
        return chosen, f"--labelled-list{said}"
    counts = splits.class_counts([i.boxes for i in train], classes)
    order = splits.labelling_order([i.image_id for i in train], counts, seed)
    if config.labels_per_class:
        order, why = splits.take_per_class(order, counts, config.labels_per_class), "--labels-per-class"
    else:
        share, why = config.label_fraction or 1.0, f"--label-fraction {config.label_fraction:g}"
        order = order[: max(1, round(share * len(train)))]
    chosen = {train[row].image_id for row in order}
    if previous:  # what was labelled stays labelled
        kept = {key for key, row in previous.rows.items() if row.labelled or row.split == "val"}
        chosen |= {i.image_id for i in train} & kept  # of val only under --val-from-labels: else it is not in train
    return chosen, why if len(chosen) < len(train) else ""


def make_rows(
    images: list[Checked], split_names: list[str], labelled: set[str], groups: np.ndarray, levels: dict[str, float]
) -> tuple[list[Row], dict[str, Boxes]]:
    """Rows of the manifest, and the boxes that training must not see."""
    rows, withheld = [], {}
    for image, split, group in zip(images, split_names, groups.tolist(), strict=True):
        key, boxes = image.image_id, image.boxes
        if (split == "train" and key not in labelled and boxes is not None) or (
            split == LEFT_OUT and boxes is not None
        ):
            withheld[key], boxes = boxes, None
        facts, white = image.facts, levels.get(key, 0.0)
        rows.append(Row(key, image.uri, facts.width, facts.height, split, key in labelled, group, boxes, white))
    return rows, withheld
