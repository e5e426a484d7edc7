"""Versions of a data set: what a correction of labels changes, and a next manifest that keeps each image in its split.

An artefact `dataset` depends on the content of images and labels, not on the path they lie at. Where only that has changed,
the same command says what, and `--update` makes the next version: the earlier manifests stay beside it, under `versions/`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dfssd.data.checks import Problem, check_label
from dfssd.data.formats.source import Item, Source
from dfssd.data.manifest import LEFT_OUT, Boxes, Manifest, Row, read_manifest, read_withheld
from dfssd.data.preparation.corrections import Correction, as_boxes
from dfssd.runtime.storage import Storage

KEPT = ("manifest.parquet", "withheld.parquet", "stage.json", "bad_files.parquet")


def content_digest(source: Source, extra: list[Item]) -> str:
    """Digest of what a data set says: images by name and size (local ones), labels, given splits, classes.

    Args:
        extra: images of the --unlabelled folders.
    """
    state = hashlib.sha256(repr((source.format, source.names)).encode())
    for item in sorted([*source.items, *extra], key=lambda i: i.uri):
        inside = item.uri.startswith(source.root)
        name = item.uri[len(source.root) :].strip("/") if inside else "/".join(item.uri.split("/")[-2:])
        state.update(f"\n{name}\t{item.split}\t{_size(item.uri)}".encode("utf-8", "surrogateescape"))
        if item.label is not None:
            problem = item.label.problem.said() if item.label.problem else ""
            state.update(f"{problem}{item.label.pixels}{item.label.size}".encode() + item.label.boxes.tobytes())
    state.update(repr(sorted(Counter(p.reason for _, p in source.bad).items())).encode())
    return state.hexdigest()[:16]


def listing_digest(folders: list[str]) -> str:
    """Digest of names, sizes and times of all files of object stores, for which one listing does: a million label files
    are not read only to see whether the data set is still the same."""
    state = hashlib.sha256()
    for folder in folders:
        for name, (size, changed_ns) in Storage(folder).listing().items():
            state.update(f"\n/{name}\t{size}\t{changed_ns}".encode())
    return state.hexdigest()[:16]


def _size(uri: str) -> int:
    if "://" in uri:
        return 0
    try:
        return Path(uri).stat().st_size
    except OSError:  # `check_all` says what is wrong with it
        return -1


@dataclass
class Previous:
    """An earlier version: what an image of it was and held.

    Args:
        version: its number, from 1.
        rows: by image id.
        boxes: of every image that had a label, hidden ones too.
        hid: were labels of train images hidden?
    """

    version: int
    rows: dict[str, Row]
    boxes: dict[str, Boxes]
    names: list[str]
    hid: bool

    def fixed_split(self, image_id: str, labelled: bool) -> str | None:
        """Split that an image keeps; None of a new one. An image that was trained on never becomes one to measure on.

        Args:
            labelled: has it a label now?
        """
        row = self.rows.get(image_id)
        if row is None:
            return None
        if row.split in ("val", "test"):
            return row.split if labelled else LEFT_OUT
        if row.split == "unlabelled-only" and labelled:
            return "train"
        return row.split


def read_previous(store: Storage) -> Previous | None:
    """The newest kept version of an artefact `dataset`."""
    numbers = [int(name) for name in store.folders("versions") if name.isdigit()]
    return as_previous(store.at("versions", str(max(numbers))), max(numbers)) if numbers else None


def as_previous(store: Storage, version: int) -> Previous:
    """A finished artefact, or a kept version of one."""
    manifest: Manifest = read_manifest(store)
    withheld = read_withheld(store)
    boxes = {r.image_id: r.boxes for r in manifest.rows if r.boxes is not None} | withheld
    hid = any(r.split == "train" and r.image_id in withheld for r in manifest.rows)
    return Previous(version, {r.image_id: r for r in manifest.rows}, boxes, manifest.names, hid)


def keep_version(store: Storage) -> int:
    """Copy what tells this version from others to `versions/N/`; returns N."""
    number = 1 + max((int(name) for name in store.folders("versions") if name.isdigit()), default=0)
    for name in KEPT:
        if store.exists(name):
            store.write(f"versions/{number}/{name}", store.read(name))
    return number


@dataclass
class Changes:
    """What differs between a version and what the data says now."""

    corrected: list[str] = field(default_factory=list)  # paths of images with other boxes
    added: int = 0  # boxes, over images that were there before
    removed: int = 0
    labelled: int = 0  # images that had no label
    cleared: int = 0  # images that have none any more
    new: int = 0  # images
    gone: int = 0
    names: str = ""

    def __bool__(self) -> bool:
        return bool(self.corrected or self.labelled or self.cleared or self.new or self.gone or self.names)

    def lines(self) -> list[str]:
        """In words."""
        found = []
        if self.corrected:
            boxes = f"{self.added} boxes added or moved here, {self.removed} taken away or moved from here"
            found.append(f"{len(self.corrected)} images have other boxes ({boxes}), such as {self.corrected[0]!r}")
        counts = {"labelled": "images are labelled now", "cleared": "images have no label any more"}
        counts |= {"new": "images are new", "gone": "images are gone"}
        found += [f"{n} {said}" for key, said in counts.items() if (n := getattr(self, key))]
        return found + ([self.names] if self.names else [])


def changes(
    previous: Previous, source: Source, extra: list[Item], corrections: dict[str, Correction] | None = None
) -> Changes:
    """Compare labels without opening an image; images are known by their paths, or, where a folder moved, their ends."""
    items = {item.uri: item for item in [*source.items, *extra]}
    tails = {"/".join(uri.split("/")[-3:]): item for uri, item in items.items()}
    result, seen = Changes(), set()
    if previous.names != source.names:
        result.names = f"the classes were {', '.join(previous.names)} and are {', '.join(source.names)}"
    order = [source.names.index(n) if n in source.names else -1 for n in previous.names]
    for image_id, row in previous.rows.items():
        item = items.get(row.uri) or tails.get("/".join(row.uri.split("/")[-3:]))
        if item is None:
            result.gone += 1
            continue
        seen.add(item.uri)
        before = previous.boxes.get(image_id)
        after = check_label(item.label, row.width, row.height, len(source.names)) if item.label is not None else None
        if isinstance(after, Problem):
            after = np.zeros((0, 5), np.float32)
        if corrections and image_id in corrections:
            after = as_boxes(corrections[image_id], source.names)
        if before is None or after is None:
            result.labelled += before is None and after is not None
            result.cleared += after is None and before is not None
            continue
        old, new = _rounded(before, order), _rounded(after)
        if old != new:
            result.corrected.append(item.uri)
            result.added += (new - old).total()
            result.removed += (old - new).total()
    known_bad = {path for path, _ in source.bad}
    result.new = sum(uri not in seen and uri not in known_bad for uri in items)
    return result


def _rounded(boxes: Boxes, order: list[int] | None = None) -> Counter[tuple[float, ...]]:
    """Boxes as a multiset, classes by their present ids, coordinates to a ten-thousandth."""
    rows = [[order[int(b[0])] if order else int(b[0]), *b[1:].tolist()] for b in boxes]
    return Counter(tuple(round(float(v), 4) for v in row) for row in rows)
