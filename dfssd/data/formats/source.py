"""What a reader of any layout returns, and what the readers share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TypeVar

import numpy as np

from dfssd.config import Data
from dfssd.data.boxes import CLS
from dfssd.data.checks import Label, Problem
from dfssd.data.formats.class_names import check_names, instead_of_numbers, reconcile
from dfssd.data.formats.listing import LABEL_SUFFIXES, OTHER_PICTURES, Tree, is_image, printable, refuse_query
from dfssd.data.formats.matching import Pictures, Reference
from dfssd.errors import DfssdError
from dfssd.runtime.progress import Progress
from dfssd.runtime.storage import Storage, side_by_side

T = TypeVar("T")
Bad = tuple[str, Problem]  # path or URI, and what is wrong with it
COUNTED = {
    "polygons": "polygons or masks were read as their bounding boxes",
    "crowds": "crowd regions (iscrowd, painted masks) were read as boxes",
    "rotated": "rotated boxes were read as their bounding boxes",
    "keypoints": "boxes came with keypoints, which were left out",
    "several": "objects hold several boxes, each of which counts",
    "joined": "pictures are described by several label files or ids, whose boxes were joined",
    "moved": "paths of another machine were found by their last folders",
    "other_shapes": "points, lines or texts are no boxes and were left out",
    "only_other_shapes": "pictures hold nothing but points, lines or texts: they are unlabelled, not free of defects",
    "opinions": "tasks hold several annotations, of which the newest (or the ground truth) counts",
    "unsure": "predictions that nobody confirmed were left out",
}


@dataclass
class Item:
    """One picture: where it lies, its label (None: nobody labelled it), its given split ('' none)."""

    uri: str
    label: Label | None = None
    split: str = ""

    @property
    def name(self) -> str:
        return self.uri.rpartition("/")[2]


@dataclass
class Source:
    """All that a reader found.

    Args:
        root: the data's folder.
        names: class names by id.
        numbered: are they no more than numbers, because the data has none?
        declared: further classes that the data lists without a box.
        bad: files that cannot be used, or lead nowhere, beside those that checks will find.
        unused: pictures that no split of a data.yaml names; they are left out.
        twice: pictures that two given splits name, and these.
        counts: what was read in another way than it was written, by a key of COUNTED.
        notes: further sentences for the user.
    """

    root: str
    format: str
    names: list[str]
    items: list[Item]
    declared: list[str] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    twice: list[tuple[str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    numbered: bool = False

    def with_names(self, given: Sequence[str]) -> Source:
        """The same with classes in the order of `--names`, which are matched by name.

        Raises:
            DfssdError: see `class_names.reconcile`.
        """
        if given and self.numbered:
            self.names = instead_of_numbers(given, len(self.names), self.root)
            return self
        names = reconcile(given, self.names, self.declared, self.root)
        if self.names and names != self.names:
            new_id = np.array([names.index(n) for n in self.names], np.float64)
            for item in self.items:
                if item.label is not None and len(item.label.boxes):
                    ids = item.label.boxes[:, CLS]
                    known = (ids >= 0) & (ids < len(new_id)) & (ids == np.round(ids))
                    ids[known] = new_id[ids[known].astype(int)]
                    ids[~known] = -1
        self.names = names
        return self


@dataclass
class Sheet:
    """What one label file, or one entry of it, says about one picture; the class column of `label` is still to be set."""

    reference: Reference
    classes: list[str]
    label: Label
    split: str = ""
    stands_for: str = ""  # what to call it where it has no picture; default the label file

    @property
    def called(self) -> str:
        return self.stands_for or self.reference.sheet


def assemble(
    tree: Tree, fmt: str, sheets: Sequence[Sheet], names: Sequence[str] = (), declared: Sequence[str] = ()
) -> Source:
    """Match sheets with pictures, join those about one picture, and number the classes.

    Args:
        names: order of the classes where the data has one; default by the alphabet.

    Raises:
        DfssdError: a sheet may be about either of two pictures.
    """
    paths = tree.pictures(named={s.reference.name.rpartition("/")[2] for s in sheets})
    source = Source(tree.root, fmt, list(names), [], list(declared))
    matched = Pictures(tree.root, paths, tree.sheets).match([s.reference for s in sheets])
    source.names = source.names or check_names(sorted({c for s in sheets for c in s.classes}), tree.root)
    ids = {n: k for k, n in enumerate(source.names)}
    of_picture: dict[str, list[Sheet]] = {}
    for sheet, picture in zip(sheets, matched, strict=True):
        if sheet.label.problem is None:
            sheet.label.boxes[:, CLS] = [ids.get(c, -1) for c in sheet.classes]
        if picture is not None:
            of_picture.setdefault(picture, []).append(sheet)
        else:
            source.bad.append((sheet.called, sheet.label.problem or Problem("label_without_image")))
    for path in paths:
        found = of_picture.get(path, [])
        splits = sorted({s.split for s in found if s.split})
        if len(splits) > 1:
            source.twice.append((path, " and ".join(splits)))
        label = _joined([s.label for s in found])
        if label and not label.problem and not len(label.boxes) and any(s.label.counts["other_shapes"] for s in found):
            label, source.counts["only_other_shapes"] = None, source.counts["only_other_shapes"] + 1
        source.counts["joined"] += len(found) > 1
        source.items.append(Item(path, label, splits[0] if splits else given_split(path, tree.root)))
    return source


def _joined(labels: list[Label]) -> Label | None:
    """One label of all that is said about a picture; a problem of one is a problem of the picture."""
    if len(labels) < 2:
        return labels[0] if labels else None
    for label in labels:
        if label.problem:
            return label
    sizes = {label.size for label in labels if label.size and min(label.size) > 0}
    if len(sizes) > 1 or len({label.pixels for label in labels}) > 1:
        detail = f"several label files about it state different sizes: {' and '.join(f'{w} x {h}' for w, h in sorted(sizes))}"
        return Label(np.zeros((0, 5)), problem=Problem("label_size_mismatch", detail))
    boxes = np.concatenate([label.boxes for label in labels])
    return Label(boxes, labels[0].pixels, next(iter(sizes), None))


def listing_faults(tree: Tree) -> list[Bad]:
    """What the listing could not hand to a reader: dangling links, names that are no UTF-8, pictures of other kinds."""
    bad: list[Bad] = []
    for path in tree.dangling:
        if _wanted(path):
            bad.append((printable(path), Problem("dangling_link")))
    for path in tree.unnameable:
        if _wanted(path):
            bad.append((path, Problem("unreadable", "its name is no UTF-8; rename the file")))
    for folder in tree.folders.values():
        for name, path in folder.items():
            if PurePosixPath(name).suffix.lower() in OTHER_PICTURES:
                bad.append(
                    (path, Problem("wrong_type", f"pictures of the kind {PurePosixPath(name).suffix} are not read"))
                )
    return sorted(bad)


def unlabelled_items(config: Data) -> tuple[list[Item], list[Bad]]:
    """All images of the --unlabelled folders, and what in them cannot be used.

    Raises:
        DfssdError: one of them holds no image.
    """
    items: list[Item] = []
    bad: list[Bad] = []
    for folder in config.unlabelled:
        tree = Tree(Storage(refuse_query(folder)).uri)
        paths = tree.pictures()
        if not paths:
            raise DfssdError("no image files found", where=repr(tree.root), todo="check the path given to --unlabelled")
        items += [Item(path) for path in paths]
        bad += listing_faults(tree)
        for note in tree.notes():
            print(f"NOTE: {note}", flush=True)
    return items, bad


def _wanted(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in LABEL_SUFFIXES | OTHER_PICTURES or is_image(path)


def read_labels(read: Callable[[str], T], paths: Sequence[str], remote: bool) -> Iterator[T]:
    """What `read` makes of each label file; many files at a time, and with progress, where they lie in an object store."""
    progress = Progress("labels", len(paths), "file")
    for label in side_by_side(read, paths, remote):
        yield label
        if remote:
            progress.add()


def unusable(reason: str, detail: str) -> Label:
    return Label(np.zeros((0, 5)), problem=Problem(reason, detail))


def given_split(path: str, root: str) -> str:
    """Split that the folders of a path name, below the root, or ''."""
    words = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
    words |= {"test": "test", "testing": "test"}
    inside = path[len(root) :] if path.startswith(root) else path
    for part in inside.lower().split("/")[:-1]:
        stem = part.rstrip("0123456789")  # train2017
        if stem in words:
            return words[stem]
    return ""
