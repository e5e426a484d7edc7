"""YOLO text labels: the Ultralytics layout, with or without data.yaml, Darknet's and CVAT's lists, LabelImg's and Label
Studio's class lists, and CR7-DET as published.

What Ultralytics makes of an entry, a list or a label is taken from its `data/utils.py` (`check_det_dataset`,
`img2label_paths`, `verify_image_label`) and `data/base.py` (`get_img_files`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from dfssd.data.checks import Label, Problem
from dfssd.data.formats.class_names import (
    LIST_FILES,
    NO_NAMES,
    instead_of_numbers,
    names_of_list,
    names_of_yaml,
    one_list,
)
from dfssd.data.formats.darknet import SPLIT_KEYS, Head, read_darknet
from dfssd.data.formats.entries import Resolver, Split
from dfssd.data.formats.listing import Tree
from dfssd.data.formats.matching import Pictures, Reference, slashes
from dfssd.data.formats.parsing import Unparsable, decode_text, parse_json, parse_yaml
from dfssd.data.formats.source import Item, Source, given_split, read_labels, unusable
from dfssd.errors import DfssdError
from dfssd.runtime.storage import read_uri

CR7_NAMES = ("inclusion", "dent", "oil_spot", "pit", "punching", "linear", "macular")
_CR7_PICTURES = ("inclusions", "dents", "oil spots", "pits", "punching", "linear", "macular")
_LIST_NAMES = {"train.txt", "val.txt", "valid.txt", "test.txt", "trainval.txt", "readme.txt", "requirements.txt"}


def parse_yolo_text(text: str, keypoints: int = 0) -> Label:
    """Parse `class cx cy w h` lines; a polygon (`class x y x y x y ...`) is read as its bounding box.

    Args:
        text: content of a label file; a missing final newline and blank lines are fine.
        keypoints: further columns of each box that are keypoints (`kpt_shape` of the data.yaml).
    """
    rows: list[list[float]] = []
    counts: Counter[str] = Counter()
    for number, line in enumerate(text.splitlines(), 1):
        parts = line.split()
        if not parts:
            continue
        try:
            values = [float(p) for p in parts]
        except ValueError:
            return unusable("label_unreadable", f"line {number}: {line[:60]!r}, not numbers (class id, cx, cy, w, h)")
        if len(parts) == 5 or (keypoints and len(parts) == 5 + keypoints):
            rows.append(values[:5])
            counts["keypoints"] += len(parts) > 5
        elif len(parts) >= 7 and len(parts) % 2:
            points = np.array(values[1:]).reshape(-1, 2)
            low, high = points.min(0), points.max(0)
            rows.append([values[0], *(low + high) / 2, *(high - low)])
            counts["polygons"] += 1
        else:
            score = ", the last of them a model's score?" if len(parts) == 6 and 0 <= values[5] <= 1 else ""
            return unusable("label_columns", f"line {number}: {len(parts)} columns{score}")
    return Label(np.array(rows, np.float64).reshape(-1, 5), counts=counts)


def is_cr7(stems: Iterable[str]) -> bool:
    """Are pictures called as those of CR7-DET are? A user's own `image/` and `label/` must not get its classes."""
    return len({stem.rstrip("0123456789_- ()") for stem in stems}.intersection(_CR7_PICTURES)) > 2


def read_cr7(tree: Tree) -> Source:
    """CR7-DET as published: image/*.jpg, label/*.txt, no class list, no split."""
    source = Source(tree.root, "cr7-det", list(CR7_NAMES), [])
    _pair(tree, tree.pictures(), source, "image", "label")
    return source


def read_yolo(tree: Tree, yaml: str = "") -> Source:
    """Ultralytics layout: images/ and labels/, with or without a data.yaml (names, path, train, val, test)."""
    head = _read_yaml(tree, yaml) if yaml else read_darknet(tree)
    source = Source(head.root, "yolo", head.names, [], numbered=head.numbered)
    source.counts["moved"] = head.moved
    below = tree.pictures(head.root)
    split_of: dict[str, str] = {}
    for name, split in head.splits.items():
        source.bad += [(f"{head.path}#{name}: {line}", Problem("listed_not_there")) for line in split.missing]
        for picture in split.pictures:
            if split_of.setdefault(picture, name) != name:
                source.twice.append((picture, f"{split_of[picture]} and {name}"))
    if split_of:
        source.unused = sorted(set(below).difference(split_of))
    elif any(s.missing for s in head.splits.values()):
        missing = [line for s in head.splits.values() for line in s.missing]
        raise DfssdError(
            f"none of the {len(missing)} pictures that the lists name exists, such as {missing[0]!r}",
            where=head.path,
            todo="mend the lists, or the folders they are relative to",
        )
    _pair(tree, sorted(split_of) or below, source, "images", "labels", head.keypoints)
    for item in source.items:
        item.split = split_of.get(item.uri) or given_split(item.uri, head.root)
    lists = [f for f in tree.below(head.root) if f.rpartition("/")[2].lower() in LIST_FILES]
    _take_names(source, tree, lists)
    return source


def _take_names(source: Source, tree: Tree, lists: list[str]) -> None:
    """Class names from lists beside the data, where no data.yaml gives them."""
    if not source.names:
        source.names = one_list(lists) or _label_studio_names(tree)
        return
    if source.numbered and lists:
        source.names, source.numbered = instead_of_numbers(one_list(lists), len(source.names), lists[0]), False
    for path in lists:
        names = names_of_list(path)
        if names != source.names and source.format == "yolo":
            source.notes.append(f"{path!r} lists other classes than the data.yaml, whose names are used")


def _label_studio_names(tree: Tree) -> list[str]:
    for path in tree.below():
        if path.rpartition("/")[2] == "notes.json":
            try:
                content = parse_json(read_uri(path))
                names = {int(c["id"]): str(c["name"]) for c in content.get("categories") or []}
            except (ValueError, TypeError, KeyError, AttributeError):
                return []  # somebody else's notes
            return [names[k] for k in sorted(names)] if sorted(names) == list(range(len(names))) else []
    return []


def load_yaml(path: str) -> dict[str, Any]:
    """A data.yaml as dict of text.

    Raises:
        DfssdError: it cannot be parsed, or is no mapping.
    """
    try:
        content = parse_yaml(read_uri(path))
    except (Unparsable, OSError) as error:
        raise DfssdError(f"the data.yaml cannot be read: {error}", where=path, todo="mend that line") from error
    if not isinstance(content, dict):
        raise DfssdError("the data.yaml holds no keys", where=path, todo="write 'names:', 'train:' and 'val:' into it")
    return {str(k): v for k, v in content.items()}


def _read_yaml(tree: Tree, path: str) -> Head:
    content = load_yaml(path)
    own = path.rpartition("/")[0] or "/"
    base, root, home = str(content.get("path") or "").strip(), own, set[str]()
    bases = [own]
    if base and base not in (".", "./"):
        known = {PurePosixPath(own).name}
        home = {PurePosixPath(slashes(base)).name.lower()}
        where = Resolver(tree, [own, str(PurePosixPath(own).parent), "."], known).find(base)
        if where is not None:
            root, bases = where, [where, own]
    names_key = content.get("names")
    if isinstance(names_key, str) and names_key.strip().endswith((".names", ".txt")):
        listed = Resolver(tree, bases, set()).find(names_key, files=True)
        content["names"] = names_of_list(listed) if listed else names_key
    names = names_of_yaml(content, path)
    resolver = Resolver(tree, bases, home | {PurePosixPath(b).name.lower() for b in bases})
    splits: dict[str, Split] = {}
    spelt = {k.lower(): k for k in content}  # CVAT writes its subsets' names: Train, Validation, Test
    for split, keys in SPLIT_KEYS.items():
        key = next((spelt[k] for k in keys if k in spelt and content[spelt[k]]), keys[0])
        entry = content.get(key) or []
        if isinstance(entry, dict):
            raise DfssdError(
                f"'{key}' is a mapping, not a folder, a list or several", where=path, todo="mend the entry"
            )
        entries = [str(e) for e in (entry if isinstance(entry, list) else [entry]) if e not in (None, "", "null", "~")]
        if entries:
            splits[split] = resolver.split(entries, key, path)
    shape = [int(v) for v in content.get("kpt_shape") or [] if str(v).isdecimal()]
    keypoints = int(np.prod(shape)) if shape else 0
    if splits and not any(s.pictures or s.missing for s in splits.values()):
        raise DfssdError(
            "data.yaml names no image that exists",
            where=f"{path}: {', '.join(splits)}",
            todo="check 'path', 'train', 'val' and 'test' in the data.yaml",
        )
    return Head(path, names, splits, root, keypoints, resolver.moved, content.get("names") in NO_NAMES)


def _pair(tree: Tree, pictures: list[str], source: Source, image_dir: str, label_dir: str, keypoints: int = 0) -> None:
    """Give each picture its label file: as Ultralytics does, else beside it, else by folders of the same names."""
    label_of: dict[str, str] = {}
    for picture in pictures:
        for path in _places(tree, picture, image_dir, label_dir):
            label_of[picture] = path
            break
    _refuse_shared(label_of)
    used = set(label_of.values())
    spare = [f for f in tree.below(source.root) if f not in used and _may_be_label(f, label_dir)]
    waiting = [p for p in pictures if p not in label_of]
    references = [Reference(f, f.rpartition("/")[2].removesuffix(".txt").removesuffix(".TXT") + ".") for f in spare]
    for path, match in zip(spare, Pictures(source.root, waiting).match(references), strict=True):
        if match and label_of.setdefault(match, path) == path:
            used.add(path)
    paths = sorted(used)
    found = dict(zip(paths, read_labels(partial(_read_text, keypoints), paths, tree.is_remote), strict=True))
    for label in found.values():
        source.counts += label.counts
    source.items = [Item(p, found.get(label_of.get(p, "")), given_split(p, source.root)) for p in sorted(pictures)]
    left_out = {p.rpartition("/")[2].rpartition(".")[0] for p in source.unused}
    for path in spare:
        stem = path.rpartition("/")[2].rpartition(".")[0]
        if path not in used and stem not in left_out and _is_label(path, label_dir):
            source.bad.append((path, Problem("label_without_image")))


def _refuse_shared(label_of: dict[str, str]) -> None:
    """Two pictures of one label file are the same picture, or nobody can say whose it is.

    Raises:
        DfssdError: they differ.
    """
    first: dict[str, str] = {}
    for picture, label in label_of.items():
        other = first.setdefault(label, picture)
        if other != picture and read_uri(other) != read_uri(picture):
            raise DfssdError(
                f"one label file for two pictures: {other!r} and {picture!r}",
                where=label,
                todo="remove or rename the picture that it is not about",
            )


def _places(tree: Tree, picture: str, image_dir: str, label_dir: str) -> list[str]:
    """Label files of a picture that exist: `images` in its path (the last one) as `labels`, then beside it."""
    folder, _, name = picture.rpartition("/")
    stem = name.rpartition(".")[0]
    parts = folder.split("/")
    found = []
    places = [k for k, part in enumerate(parts) if part.lower() == image_dir]
    if places:
        k = places[-1]
        for word in dict.fromkeys((label_dir, label_dir.capitalize(), label_dir.upper())):
            found.append("/".join([*parts[:k], word, *parts[k + 1 :]]))
    paths = []
    for place in [*found, folder]:
        files = tree.in_folder(place)
        paths += [files[n] for n in (f"{stem}.txt", f"{stem}.TXT") if n in files]
    return paths


def _may_be_label(path: str, label_dir: str) -> bool:
    name = path.rpartition("/")[2].lower()
    return name.endswith(".txt") and name not in LIST_FILES and (name not in _LIST_NAMES or _in_labels(path, label_dir))


def _in_labels(path: str, label_dir: str) -> bool:
    return label_dir in path.lower().split("/")[:-1]


def _is_label(path: str, label_dir: str) -> bool:
    """Is a text without a picture a label that has lost it? In labels/ it is; elsewhere where it reads like one."""
    if _in_labels(path, label_dir) and path.rpartition("/")[2].lower() not in _LIST_NAMES:
        return True
    label = _read_text(0, path)
    return label.problem is None and len(label.boxes) > 0


def _read_text(keypoints: int, path: str) -> Label:
    try:
        return parse_yolo_text(decode_text(read_uri(path)), keypoints)
    except (Unparsable, OSError) as error:
        return unusable("label_unreadable", str(error))
