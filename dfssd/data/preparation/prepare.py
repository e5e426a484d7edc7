"""Stage `prepare`: check every image and label, group near-duplicates, split, choose the labelled subset, write."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa

from dfssd.config import Data, Run
from dfssd.data.checks import Checked
from dfssd.data.formats.read import read_source
from dfssd.data.formats.unpack import resolve_zip
from dfssd.data.manifest import TRAIN, Manifest, write_manifest, write_table, write_withheld
from dfssd.data.preparation import grouping
from dfssd.data.preparation.assignment import LEAST, Pairs, choose_labelled, make_rows, split_images
from dfssd.data.preparation.bad_files import write_bad
from dfssd.data.preparation.checking import check_all, drop_duplicates, set_white_levels, stop_if_too_bad
from dfssd.data.preparation.corrections import (
    added_classes,
    lay_over,
    read_corrections,
    with_new_classes,
    write_provenance,
)
from dfssd.data.preparation.summary import budget, contact_sheet, statements, summarise
from dfssd.data.preparation.val_from_labels import take_val, without_val
from dfssd.data.preparation.versions import Previous, read_previous
from dfssd.runtime.storage import Storage


def prepare(
    config: Data,
    seed: int,
    store: Storage,
    run_settings: Run | None = None,
    cluster: bool | None = None,
    least: int = LEAST,
) -> dict[str, Any]:
    """Write `manifest.parquet`, `withheld.parquet`, `bad_files.parquet`, the split and pictures; return a summary.

    Args:
        run_settings: how long to wait for room on the cluster.
        cluster: check the images there, or in this process; None: as their number says (`check_shards.on_cluster`).
        least: labelled images that there must be; fewer than `LEAST` where nobody asks for the splits.

    Raises:
        DfssdError: unknown layout, too many bad files, or too few images for the splits asked for.
    """
    run = Storage(store.uri.rpartition("/")[0])
    data = resolve_zip(config.data, run)
    source = read_source(data, config.format, config.names)
    source.names = with_new_classes(source.names, added_classes(run))
    classes = len(source.names)
    print(
        f"data: {len(source.items)} images as {source.format}, {classes} classes: {', '.join(source.names)}", flush=True
    )
    good, bad, thumbnails, looked_at = check_all(source, config, store, run_settings or Run(), cluster)
    corrections = read_corrections(run)
    corrected = lay_over(good, source.names, corrections)
    stop_if_too_bad(bad, len(good) + len(bad), config, store)
    images, duplicates, conflicts = drop_duplicates(good)
    bad += duplicates
    levels, level_notes = set_white_levels(images, config)
    hashes = thumbnails.hashes_of(images)
    groups, pairs = grouping.group_hashes(hashes, config.near_duplicate, config.max_group_share)
    previous = read_previous(store)
    split_names = split_images(images, groups, pairs, config, seed, source, previous, least)
    split_names, labelled, hidden = _labelled(
        split_names, images, groups, pairs, config, seed, classes, previous, corrections
    )
    rows, withheld = make_rows(images, split_names, labelled, groups, levels)
    meta = {"format": source.format, "seed": seed, "label_fraction": config.label_fraction, "split": config.split}
    meta |= {"val_from_labels": config.val_from_labels, "grey": all(i.facts.grey for i in images)}
    meta["version"] = previous.version + 1 if previous else 1
    write_manifest(store, Manifest(rows, source.names, meta))
    write_withheld(store, withheld)
    write_provenance(store, corrections, {r.image_id for r in rows})
    write_bad(store, bad)
    write_pairs(store, [i.image_id for i in images], pairs)
    write_split_list(store, images, split_names, labelled)
    store.write("groups.png", contact_sheet(lambda k: thumbnails.thumb_of(images[k]), groups))
    summary = summarise(source, rows, withheld, Counter(p.reason for _, p in bad), groups, pairs)
    summary |= {"duplicates_with_other_labels": conflicts, "version": meta["version"], "files": looked_at}
    summary["corrected_images"] = corrected
    summary["data_settings"] = config.model_dump(mode="json")
    notes = _of_labels(images, corrected) + source.notes + level_notes + statements(source, summary, hidden)
    summary["notes"] = [*notes, budget(summary, config.val_from_labels)]
    store.write_json("summary.json", summary)
    thumbnails.remove()
    return summary


def _of_labels(images: list[Checked], corrected: int) -> list[str]:
    """What has to be known of the labels of usable images, `corrected` of which were corrected."""
    notes = [f"{corrected} images have corrected labels"] if corrected else []
    if repeated := sum(i.repeated for i in images):
        notes.append(f"{repeated} boxes stand twice in their labels and count once")
    return notes


def _labelled(
    names: list[str],
    images: list[Checked],
    groups: np.ndarray,
    pairs: Pairs,
    config: Data,
    seed: int,
    classes: int,
    previous: Previous | None,
    corrections: Collection[str],
) -> tuple[list[str], set[str], str]:
    """The splits (val may be taken from the labelled images), ids of the images whose labels may be used, and why the others
    are hidden ('' where none is)."""
    if config.val_from_labels:
        names = without_val(images, names, groups, config)
    labelled, hidden = choose_labelled(images, names, config, seed, classes, previous)
    # What a person labelled for this run is never hidden from it.
    labelled |= {i.image_id for i, s in zip(images, names, strict=True) if s == TRAIN and i.image_id in corrections}
    if config.val_from_labels:
        names, labelled = take_val(images, names, labelled, groups, pairs, config, seed, classes, previous)
    return names, labelled, hidden


def write_pairs(store: Storage, ids: list[str], pairs: Pairs) -> None:
    """`near_duplicates.parquet`: image ids of all pairs of near-duplicates, also those that a cut of a group separated."""
    columns = [pa.array([ids[k] for k in ends.tolist()], pa.string()) for ends in pairs[:2]]
    table = pa.table([*columns, pa.array(pairs[2], pa.float32())], names=["a", "b", "correlation"])
    write_table(store, "near_duplicates.parquet", table)


def write_split_list(store: Storage, images: list[Checked], split_names: list[str], labelled: set[str]) -> None:
    """`split.csv`, to be published: image id, file name, split, labelled."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image_id", "file", "split", "labelled"])
    rows = zip(images, split_names, strict=True)
    writer.writerows(
        sorted((i.image_id, i.uri.rsplit("/", 1)[-1], split, int(i.image_id in labelled)) for i, split in rows)
    )
    store.write("split.csv", text.getvalue().encode())
