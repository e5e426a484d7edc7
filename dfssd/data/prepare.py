"""Stage `prepare`: check every image and label, group near-duplicates, split, choose the labelled subset, write."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dfssd.config import Data
from dfssd.data import checks, grouping, splits
from dfssd.data.bad_files import Bad, write_bad
from dfssd.data.formats import read_source
from dfssd.data.manifest import SPLITS, Boxes, Manifest, Row, write_manifest, write_withheld
from dfssd.data.source import Item, Source, unlabelled_uris
from dfssd.data.summary import contact_sheet, summarise
from dfssd.errors import DfssdError
from dfssd.runtime.progress import Progress
from dfssd.runtime.storage import Storage, is_remote, read_uri, side_by_side


@dataclass
class Checked:
    """A usable image and its usable label."""

    uri: str
    facts: checks.ImageFacts
    boxes: Boxes | None
    given_split: str

    @property
    def image_id(self) -> str:
        return self.facts.sha256[:16]


def prepare(config: Data, seed: int, store: Storage) -> dict[str, Any]:
    """Write `manifest.parquet`, `withheld.parquet`, `bad_files.parquet`, the split and pictures; return a summary.

    Raises:
        DfssdError: unknown layout, too many bad files, or too few images for the splits asked for.
    """
    source = read_source(config.data, config.format, config.names)
    print(
        f"data: {len(source.items)} images as {source.format}, {len(source.names)} classes {source.names}", flush=True
    )
    good, bad = check_all(source, config)
    _stop_if_too_bad(bad, len(good) + len(bad), config, store)
    images, duplicates, conflicts = drop_duplicates(good)
    bad += duplicates
    groups, pairs = grouping.group_images(
        np.stack([i.facts.thumb_hw for i in images]), config.near_duplicate, config.max_group_share
    )
    split_names = split_images(images, groups, config, seed, len(source.names))
    labelled = choose_labelled(images, split_names, config, seed, len(source.names))
    rows, withheld = make_rows(images, split_names, labelled, groups)
    meta = {"format": source.format, "seed": seed, "label_fraction": config.label_fraction, "split": config.split}
    write_manifest(store, Manifest(rows, source.names, meta))
    write_withheld(store, withheld)
    write_bad(store, bad)
    write_split_list(store, images, split_names, labelled)
    store.write("groups.png", contact_sheet([i.facts.thumb_hw for i in images], groups))
    summary = summarise(source, rows, withheld, Counter(p.reason for _, p in bad), groups, pairs)
    summary["duplicates_with_other_labels"] = conflicts
    store.write_json("summary.json", summary)
    return summary


def check_all(source: Source, config: Data) -> tuple[list[Checked], list[Bad]]:
    """Check every image and label; images of --unlabelled folders join without labels."""
    jobs = [(f"{source.store.uri}/{item.name}", item) for item in source.items]
    jobs += [(uri, Item(uri.rsplit("/", 1)[-1])) for uri in unlabelled_uris(config)]
    jobs = list({uri: (uri, item) for uri, item in reversed(jobs)}.values())[::-1]  # --unlabelled inside --data
    bad: list[Bad] = [(f"{source.store.uri}/{o}", checks.Problem("label_without_image")) for o in source.orphans]
    good: list[Checked] = []
    progress = Progress("checking", len(jobs), "img")
    for result in _parallel(jobs, len(source.names), config):
        (good if isinstance(result, Checked) else bad).append(result)  # type: ignore[arg-type]
        progress.add()
    if not good:
        raise DfssdError(
            "not one usable image", where=source.store.uri, todo=f"first problem: {bad[0] if bad else '-'}"
        )
    return good, bad


def _parallel(jobs: list[tuple[str, Item]], classes: int, config: Data) -> Iterator[Checked | Bad]:
    """Check in threads (decoding frees the interpreter), a bounded number at a time, results in order."""

    def one(job: tuple[str, Item]) -> Checked | Bad:
        uri, item = job
        try:
            data = read_uri(uri)
        except OSError as error:
            return uri, checks.Problem("unreadable", str(error))
        facts = checks.check_image(data, config.max_side)
        if isinstance(facts, checks.Problem):
            return uri, facts
        boxes: Boxes | checks.Problem | None = None
        if item.label is not None:
            boxes = checks.check_label(item.label, facts.width, facts.height, classes)
        elif config.missing_labels == "background":
            boxes = np.zeros((0, 5), np.float32)
        if isinstance(boxes, checks.Problem):
            return uri, boxes
        return Checked(uri, facts, boxes, item.split)

    remote = any(is_remote(uri) for uri, _ in jobs)
    yield from side_by_side(one, jobs, remote, os.cpu_count() or 1)


def _stop_if_too_bad(bad: list[Bad], total: int, config: Data, store: Storage) -> None:
    share = len(bad) / max(total, 1)
    if share <= config.bad_limit:
        return
    write_bad(store, bad)
    counts = Counter(problem.reason for _, problem in bad)
    lines = [f"{n} x {reason}: {checks.REASONS[reason]}" for reason, n in counts.most_common()]
    first = "\n    ".join(f"{uri}: {p.reason} {p.detail}" for uri, p in bad[:5])
    raise DfssdError(
        f"{len(bad)} of {total} files ({share:.1%}) are bad, the limit is {config.bad_limit:.1%}\n    "
        + "\n    ".join(lines)
        + f"\n  for example:\n    {first}",
        where=store.path("bad_files.parquet"),
        todo="mend or remove these files, or accept them with --bad-limit",
    )


def drop_duplicates(good: list[Checked]) -> tuple[list[Checked], list[Bad], int]:
    """Keep one of each set of byte-identical images: the one with most boxes, then the first by name.

    Returns:
        images kept in the order of their ids, the others as bad files, and how many had other labels.
    """
    by_id: dict[str, list[Checked]] = {}
    for image in good:
        by_id.setdefault(image.image_id, []).append(image)
    kept, dropped, conflicts = [], [], 0
    for _, copies in sorted(by_id.items()):
        copies.sort(key=lambda c: (-1 if c.boxes is None else len(c.boxes), c.uri), reverse=True)
        most = [c for c in copies if _count(c) == _count(copies[0])]
        keep = min(most, key=lambda c: c.uri)
        kept.append(keep)
        for copy in copies:
            if copy is not keep:
                dropped.append((copy.uri, checks.Problem("duplicate", f"of {keep.uri}")))
                same = copy.boxes is None or (keep.boxes is not None and np.array_equal(copy.boxes, keep.boxes))
                conflicts += not same
    return kept, dropped, conflicts


def _count(image: Checked) -> int:
    return -1 if image.boxes is None else len(image.boxes)


def split_images(images: list[Checked], groups: np.ndarray, config: Data, seed: int, classes: int) -> list[str]:
    """Split of every image; an image nobody labelled follows its group, or is unlabelled-only."""
    has_label = np.array([i.boxes is not None for i in images])
    ids = [i.image_id for i in images]
    if config.split == "given":
        if not {"train", "val", "test"} <= {i.given_split for i in images}:
            found = sorted({i.given_split or "(none)" for i in images})
            raise DfssdError(
                f"--split given needs train, val and test in the data, found {found}",
                where=config.data,
                todo="use --split grouped, which makes its own",
            )
        return [i.given_split if i.boxes is not None else "unlabelled-only" for i in images]
    if has_label.sum() < 10:
        raise DfssdError(
            f"{int(has_label.sum())} images have labels; train, val and test need at least 10",
            where=config.data,
            todo="label more images, or check that the label files are found (bad_files.parquet, --format)",
        )
    unit = groups if config.split == "grouped" else np.arange(len(images))
    rows = np.flatnonzero(has_label)
    counts = splits.class_counts([images[r].boxes for r in rows], classes)
    placed = splits.assign_splits([ids[r] for r in rows], unit[rows], counts, config.split_shares, seed)
    names = ["unlabelled-only"] * len(images)
    of_group: dict[int, str] = {}
    for row, place in zip(rows.tolist(), placed.tolist(), strict=True):
        names[row] = SPLITS[place]
        of_group[int(unit[row])] = SPLITS[place]
    # A near-duplicate of a test image must not be trained on, labelled or not: it goes where its group went.
    return [of_group.get(int(unit[k]), name) if name == "unlabelled-only" else name for k, name in enumerate(names)]


def choose_labelled(images: list[Checked], split_names: list[str], config: Data, seed: int, classes: int) -> set[str]:
    """Ids of the train images whose labels may be used."""
    train = [i for i, s in zip(images, split_names, strict=True) if s == "train" and i.boxes is not None]
    if config.labelled_list:
        wanted = {line.strip() for line in read_uri(config.labelled_list).decode().splitlines() if line.strip()}
        chosen = {i.image_id for i in train if i.image_id in wanted or i.uri.rsplit("/", 1)[-1] in wanted}
        if not chosen:
            raise DfssdError(
                "no train image is in the labelled list",
                where=config.labelled_list,
                todo="list image ids or file names of train images, one a line (split.csv shows both)",
            )
        return chosen
    counts = splits.class_counts([i.boxes for i in train], classes)
    order = splits.labelling_order([i.image_id for i in train], counts, seed)
    if config.labels_per_class:
        order = splits.take_per_class(order, counts, config.labels_per_class)
    else:
        order = order[: max(1, round(config.label_fraction * len(train)))]
    return {train[row].image_id for row in order}


def make_rows(
    images: list[Checked], split_names: list[str], labelled: set[str], groups: np.ndarray
) -> tuple[list[Row], dict[str, Boxes]]:
    """Rows of the manifest, and the boxes that training must not see."""
    rows, withheld = [], {}
    for image, split, group in zip(images, split_names, groups.tolist(), strict=True):
        key, boxes = image.image_id, image.boxes
        if split == "train" and key not in labelled and boxes is not None:
            withheld[key], boxes = boxes, None
        facts = image.facts
        rows.append(Row(key, image.uri, facts.width, facts.height, split, key in labelled, group, boxes))
    return rows, withheld


def write_split_list(store: Storage, images: list[Checked], split_names: list[str], labelled: set[str]) -> None:
    """`split.csv`, to be published: image id, file name, split, labelled."""
    lines = ["image_id,file,split,labelled"]
    for image, split in zip(images, split_names, strict=True):
        lines.append(f'{image.image_id},"{image.uri.rsplit("/", 1)[-1]}",{split},{int(image.image_id in labelled)}')
    store.write("split.csv", "\n".join([lines[0], *sorted(lines[1:])]).encode() + b"\n")
