"""What a reader of any layout returns, and what the readers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import PurePosixPath
from typing import TypeVar

from dfssd.config import Data
from dfssd.data.checks import Label
from dfssd.errors import DfssdError
from dfssd.runtime.progress import Progress
from dfssd.runtime.storage import Storage, side_by_side

T = TypeVar("T")

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}


@dataclass
class Item:
    """One image file: name relative to the source, its label (None: nobody labelled it), its given split ('' none)."""

    name: str
    label: Label | None = None
    split: str = ""


@dataclass
class Source:
    """All that a reader found. `orphans` are label files without an image."""

    store: Storage
    format: str
    names: list[str]
    items: list[Item]
    orphans: list[str] = field(default_factory=list)


def unlabelled_uris(config: Data) -> list[str]:
    """All images of the --unlabelled folders.

    Raises:
        DfssdError: one of them holds no image.
    """
    uris: list[str] = []
    for folder in config.unlabelled:
        store = Storage(folder)
        names = [f for f in store.files() if is_image(f)]
        if not names:
            raise DfssdError("no image files found", where=store.uri, todo="check the path given to --unlabelled")
        uris += [f"{store.uri}/{name}" for name in names]
    return uris


def read_labels(read: Callable[[str], T], names: Sequence[str], store: Storage) -> Iterator[T]:
    """What `read` makes of each label file; many files at a time, and with progress, where they lie in an object store."""
    progress = Progress("labels", len(names), "file")
    for label in side_by_side(read, names, not store.is_local):
        yield label
        if not store.is_local:
            progress.add()


def is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def given_split(name: str) -> str:
    """Split that a path's folders name, or ''."""
    words = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
    for part in name.lower().split("/")[:-1]:
        stem = part.rstrip("0123456789")  # train2017
        if stem in words:
            return words[stem]
    return ""


def closest(name: str, candidates: list[str]) -> str:
    """The candidate that shares most folders with `name` (data sets reuse file names in train/ and test/)."""
    folders = name.lower().split("/")[:-1]

    def shared(candidate: str) -> int:
        pairs = zip(folders, candidate.lower().split("/")[:-1], strict=False)
        return sum(1 for _ in takewhile(lambda p: p[0] == p[1], pairs))

    return max(candidates, key=lambda c: (shared(c), c))
