"""Which layout defect data comes in, and its reader.

Each reader turns a folder into a `Source`: image files, what their label says, and class names. Nothing is checked here;
`checks` does that on what comes out. Images without a label file carry `label=None`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dfssd.config.choices import FORMATS
from dfssd.data.checks import Problem
from dfssd.data.formats import labelstudio, other_formats
from dfssd.data.formats.class_names import LIST_FILES, NoClassNames, spelt_alike
from dfssd.data.formats.cvat import read_cvat
from dfssd.data.formats.foreign import PACKED, no_pictures, recognise
from dfssd.data.formats.listing import Tree, is_image, printable, refuse_query
from dfssd.data.formats.more_formats import read_via, via_tables
from dfssd.data.formats.parsing import Unparsable, decode_text, parse_json, parse_xml, parse_yaml
from dfssd.data.formats.source import Bad, Source, listing_faults
from dfssd.data.formats.voc import read_voc
from dfssd.data.formats.yolo import is_cr7, load_yaml, parse_yolo_text, read_cr7, read_yolo
from dfssd.errors import DfssdError
from dfssd.runtime.storage import Storage, read_uri, side_by_side


def _reader(place: str) -> tuple[Callable[[Any], bool], Callable[[Tree, dict[str, Any]], Source]]:
    """How a JSON of a format is known, and its reader (`DataFormat.json`)."""
    file, _, name = place.partition(".")
    module = importlib.import_module(f"dfssd.data.formats.{file}")
    return getattr(module, f"is_{name}"), getattr(module, f"read_{name}")


JSON_FORMATS = {name: _reader(row.json) for name, row in FORMATS.items() if row.json}
ENDINGS = {".xml": ("voc", "cvat"), ".json": tuple(JSON_FORMATS), ".txt": ("yolo", "cr7-det")}


def read_source(data: str, fmt: str, names: Sequence[str]) -> Source:
    """Read images and labels below `data`, detecting the format where `fmt` is 'auto'.

    Raises:
        DfssdError: nothing there, or unknown layout.
        NoClassNames: class names are missing.
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
        raise no_pictures(tree)
    source = read_yolo(tree, store.uri) if is_yaml else _Detector(tree, fmt).source()
    source = source.with_names(names)
    source.bad += listing_faults(tree)
    source.notes = tree.notes() + source.notes + spelt_alike(source.names)
    if not source.names:
        broken = [(item.uri, item.label.problem) for item in source.items if item.label and item.label.problem]
        if broken or source.bad:
            path, problem = (broken or source.bad)[0]
            raise DfssdError(
                f"no label could be read: {len(broken) or len(source.bad)} cannot be used, such as that of "
                f"{printable(path)!r}: {problem.said()}",
                where=repr(data),
                todo="mend the label files",
            )
        raise NoClassNames(
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
                self._look_for_other_labels(source)
                return source
        foreign = None if self.broken else recognise(self.tree, self.files)
        if foreign:
            raise DfssdError(
                f"the data looks like {foreign.looks_like}, which is not read",
                where=repr(foreign.where),
                todo=foreign.todo,
            )
        first = f": {self.broken[0][0]!r}: {self.broken[0][1].detail}" if self.broken else ""
        bare = [f for f in self.files if is_image(f)]
        if bare and len(bare) == len(self.files):
            raise DfssdError(
                f"there are no labels: all {len(bare)} files are pictures",
                where=repr(self.tree.root),
                todo=self._hint(),
            )
        asked = "" if self.fmt == "auto" else f" as {self.fmt}"
        raise DfssdError(
            f"the layout of the data was not recognised{asked}{first}",
            where=repr(self.tree.root),
            todo="mend that file" if first else self._hint(),
        )

    def _hint(self) -> str:
        packed = [f for f in self.files if f.lower().endswith(PACKED)]
        if packed:
            return f"unpack {packed[0]!r} where the labels are in it"
        above = self.tree.root.rpartition("/")[0]
        if self.tree.root.lower().endswith("/images") and any(n.lower() == "labels" for n in _names(above)):
            return f"give the folder above, {above!r}, where the labels lie"
        return "see docs/data.md for the layouts, or name one with --format"

    def _look_for_other_labels(self, source: Source) -> None:
        """Labels of a second format: a note, or where the first says nothing about their pictures an error.

        Raises:
            DfssdError: a part of the pictures is labelled in another format.
        """
        own = next((e for e, formats in ENDINGS.items() if source.format in formats), "")
        bare = {_stem(item.uri) for item in source.items if item.label is None}
        for ending in ENDINGS:
            found = [f for f in self.files if f.lower().endswith(ending) and _stem(f) in bare] if ending != own else []
            if not any(map(_reads_like_a_label, found[:5])):
                continue
            said = f"{len(found)} pictures that have no label as {source.format} have a {ending} file, such as {found[0]!r}"
            if self.fmt != "auto":
                source.notes.append(f"{said}; it was not read (--format {self.fmt})")
                continue
            raise DfssdError(
                f"the labels come in two formats: {said}",
                where=repr(self.tree.root),
                todo=f"--format {source.format} reads the one alone; for both, bring them into one format",
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
        if len(nearest) > 1 and len({(p.rpartition("/")[0], read_uri(p)) for p in nearest}) > 1:
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
        if self.fmt == "auto" and (lists or not {"image", "label"} <= tops or not is_cr7(map(_stem, self.files))):
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
        labels = any({"labels", "label"}.intersection(p[:-1]) for p in texts)
        listed = any(p[-1] in LIST_FILES or p[-1].endswith(".data") for p in inside)
        stems = {"/".join(p).rpartition(".")[0] for p in inside if is_image(p[-1])}
        beside = any("/".join(p)[:-4] in stems for p in texts)
        return read_yolo(self.tree) if labels or listed or beside else None

    def _csv(self) -> Source | None:
        if not self._asked("csv", "labelstudio", "via"):
            return None
        tables = {f: other_formats.table_rows(read_uri(f)) for f in self.files if f.lower().endswith((".csv", ".tsv"))}
        contents = {path: rows for path, rows in tables.items() if other_formats.is_tensorflow(rows)}
        if contents and self._asked("csv"):
            return other_formats.read_csv(self.tree, contents)
        regions = via_tables(tables)
        if regions and self._asked("via"):
            return read_via(self.tree, regions)
        tasks = {path: found for path, rows in tables.items() if (found := labelstudio.csv_tasks(rows))}
        return labelstudio.read_label_studio(self.tree, tasks) if tasks and self._asked("labelstudio") else None


def _names(folder: str) -> list[str]:
    """Names of what lies in a local folder."""
    return os.listdir(folder) if "://" not in folder and Path(folder).is_dir() else []  # noqa: PTH208  (names alone)


def _stem(path: str) -> str:
    return path.rpartition("/")[2].rpartition(".")[0].lower()


def _reads_like_a_label(path: str) -> bool:
    """Does a file beside pictures hold boxes?"""
    try:
        if path.lower().endswith(".xml"):
            return parse_xml(read_uri(path)).find("object") is not None
        if path.lower().endswith(".json"):
            content = parse_json(read_uri(path))
            return any(fits(content) for fits, _ in JSON_FORMATS.values())
        label = parse_yolo_text(decode_text(read_uri(path)))
        return label.problem is None and len(label.boxes) > 0
    except (Unparsable, OSError):
        return False


def _parsed_json(path: str) -> Any:
    try:
        return parse_json(read_uri(path))
    except Unparsable as error:
        return error
