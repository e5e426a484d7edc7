"""Which layout defect data comes in, and its reader.

Each reader turns a folder into a `Source`: image files, what their label says, and class names. Nothing is checked here;
`checks` does that on what comes out. Images without a label file carry `label=None`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from dfssd.config.choices import FORMATS
from dfssd.data.checks import Problem
from dfssd.data.formats import other_formats
from dfssd.data.formats.class_names import LIST_FILES
from dfssd.data.formats.cvat import read_cvat
from dfssd.data.formats.listing import IMAGE_SUFFIXES, Tree, is_image, refuse_query
from dfssd.data.formats.parsing import Unparsable, parse_json, parse_xml, parse_yaml
from dfssd.data.formats.source import Bad, Source, listing_faults
from dfssd.data.formats.voc import read_voc
from dfssd.data.formats.yolo import load_yaml, read_cr7, read_yolo
from dfssd.errors import DfssdError
from dfssd.runtime.storage import Storage, read_uri, side_by_side


def _reader(place: str) -> tuple[Callable[[Any], bool], Callable[[Tree, dict[str, Any]], Source]]:
    """How a JSON of a format is known, and its reader (`DataFormat.json`)."""
    file, _, name = place.partition(".")
    module = importlib.import_module(f"dfssd.data.formats.{file}")
    return getattr(module, f"is_{name}"), getattr(module, f"read_{name}")


JSON_FORMATS = {name: _reader(row.json) for name, row in FORMATS.items() if row.json}


def read_source(data: str, fmt: str, names: Sequence[str]) -> Source:
    """Read images and labels below `data`, detecting the format where `fmt` is 'auto'.

    Raises:
        DfssdError: nothing there, unknown layout, or class names missing.
    """
    if not data:
        raise DfssdError("no data given", todo="add --data FOLDER (or a data.yaml)")
    refuse_query(data)
    is_yaml = data.lower().endswith((".yaml", ".yml"))
    if not Storage(data).exists():
        raise DfssdError("the data is not there", where=repr(data), todo="check the path given to --data")
    store = Storage(data)
    tree = Tree(store.uri.rpartition("/")[0] if is_yaml else store.uri)
    if not is_yaml and not tree.is_folder(tree.root):
        raise DfssdError(
            "--data is a file of a kind that is not read", where=repr(data), todo="give a folder, a data.yaml or a .zip"
        )
    if not is_yaml and not any(is_image(f) for f in tree.below()):
        raise DfssdError("no image files found", where=repr(tree.root), todo=f"known endings: {sorted(IMAGE_SUFFIXES)}")
    source = read_yolo(tree, store.uri) if is_yaml else _Detector(tree, fmt).source()
    source = source.with_names(names)
    source.bad += listing_faults(tree)
    source.notes = tree.notes() + source.notes
    if not source.names:
        raise DfssdError(
            "the data has no class names",
            where=repr(data),
            todo="add --names NAME NAME ... in the order of the class ids, or a classes.txt with one name a line",
        )
    return source


class _Detector:
    """Looks at the files of a folder and reads them with the reader they are for."""

    def __init__(self, tree: Tree, fmt: str) -> None:
        self.tree, self.fmt, self.files = tree, fmt, tree.below()
        self.broken: list[Bad] = []  # label files that cannot be parsed

    def source(self) -> Source:
        """Read as the format asked for, or as the first one that fits.

        Raises:
            DfssdError: none does.
        """
        attempts = (self._yolo_with_yaml, self._cr7, self._json, self._xml, self._yolo, self._csv)
        for attempt in attempts:
            source = attempt()
            if source is not None:
                return source
        first = f": {self.broken[0][0]!r}: {self.broken[0][1].detail}" if self.broken else ""
        asked = "" if self.fmt == "auto" else f" as {self.fmt}"
        raise DfssdError(
            f"the layout of the data was not recognised{asked}{first}",
            where=repr(self.tree.root),
            todo="mend that file" if first else "see docs/data.md for the layouts, or name one with --format",
        )

    def _asked(self, *formats: str) -> bool:
        return self.fmt == "auto" or self.fmt in formats

    def _depth(self, path: str) -> int:
        return path[len(self.tree.root) :].strip("/").count("/")

    def _yolo_with_yaml(self) -> Source | None:
        if not self._asked("yolo"):
            return None
        found: dict[int, list[str]] = {}
        for path in self.files:
            if path.lower().endswith((".yaml", ".yml")) and self._depth(path) <= 2 and self._names_classes(path):
                found.setdefault(self._depth(path), []).append(path)
        if not found:
            return None
        nearest = found[min(found)]
        if len(nearest) > 1:  # one that names pictures too says more than one that names classes only
            nearest = [p for p in nearest if {"train", "val"} <= load_yaml(p).keys()] or nearest
        if len(nearest) > 1 and len({read_uri(p) for p in nearest}) > 1:
            raise DfssdError(
                f"two files describe the data: {nearest[0]!r} and {nearest[1]!r}",
                where=repr(self.tree.root),
                todo="give the one that is meant with --data",
            )
        return read_yolo(self.tree, nearest[0])

    def _names_classes(self, path: str) -> bool:
        """Is it a data.yaml? A yaml of another program is none, whatever it holds.

        Raises:
            DfssdError: it speaks of names, and cannot be parsed.
        """
        data = read_uri(path)
        try:
            content = parse_yaml(data)
        except Unparsable as error:
            if path.rpartition("/")[2].lower() in ("data.yaml", "data.yml", "dataset.yaml") or b"names:" in data:
                raise DfssdError(f"the data.yaml cannot be read: {error}", where=path, todo="mend that line") from error
            return False
        if not isinstance(content, dict):
            return False
        return "names" in content or ("nc" in content and "train" in content)

    def _cr7(self) -> Source | None:
        if not self._asked("cr7-det"):
            return None
        inside = [f[len(self.tree.root) :].strip("/") for f in self.files]
        tops = {f.split("/")[0].lower() for f in inside if "/" in f}
        lists = any(f.rpartition("/")[2].lower() in LIST_FILES for f in inside)
        if self.fmt == "auto" and (lists or not {"image", "label"} <= tops):
            return None
        if any(f.startswith("label/") and f.endswith(".txt") for f in inside):
            return read_cr7(self.tree)
        return None

    def _json(self) -> Source | None:
        paths = [f for f in self.files if f.lower().endswith(".json") and self._asked(*JSON_FORMATS)]
        by_format: dict[str, dict[str, Any]] = {}
        for path, content in zip(paths, side_by_side(_parsed_json, paths, self.tree.is_remote), strict=True):
            if isinstance(content, Unparsable):
                self.broken.append((path, Problem("label_unreadable", str(content))))
                continue
            for fmt, (fits, _) in JSON_FORMATS.items():
                if self._asked(fmt) and fits(content):
                    by_format.setdefault(fmt, {})[path] = content
                    break
        for fmt, (_, read) in JSON_FORMATS.items():
            if fmt in by_format:
                source = read(self.tree, by_format[fmt])
                source.bad += self.broken
                return source
        return None

    def _xml(self) -> Source | None:
        paths = [f for f in self.files if f.lower().endswith(".xml")]
        if not paths or not self._asked("voc", "cvat"):
            return None
        roots: dict[str, Any] = {}
        for path in paths if len(paths) <= 20 or self.fmt == "cvat" else paths[:1]:  # CVAT: one file for many pictures
            try:
                root = parse_xml(read_uri(path))
            except Unparsable:
                continue  # read_voc counts it, with the reason
            if root.tag == "annotations":
                roots[path] = root
        if roots and self._asked("cvat"):
            return read_cvat(self.tree, roots)
        return read_voc(self.tree, paths) if self._asked("voc") else None

    def _yolo(self) -> Source | None:
        if not self._asked("yolo"):
            return None
        inside = [f[len(self.tree.root) :].lower().split("/") for f in self.files]
        texts = [p for p in inside if p[-1].endswith(".txt")]
        labels = any("labels" in p[:-1] for p in texts)
        listed = any(p[-1] in LIST_FILES or p[-1].endswith(".data") for p in inside)
        stems = {"/".join(p).rpartition(".")[0] for p in inside if is_image(p[-1])}
        beside = any("/".join(p)[:-4] in stems for p in texts)
        return read_yolo(self.tree) if labels or listed or beside else None

    def _csv(self) -> Source | None:
        if not self._asked("csv"):
            return None
        found = {f: other_formats.csv_rows(read_uri(f)) for f in self.files if f.lower().endswith(".csv")}
        contents = {path: rows for path, rows in found.items() if rows}
        return other_formats.read_csv(self.tree, contents) if contents else None


def _parsed_json(path: str) -> Any:
    try:
        return parse_json(read_uri(path))
    except Unparsable as error:
        return error
