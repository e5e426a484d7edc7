"""Corrected labels back from a labelling program, in any format that `prepare` reads, matched with the manifest's images."""

from __future__ import annotations

import getpass
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dfssd.data.boxes import CLS
from dfssd.data.checks import Label, Problem, check_label
from dfssd.data.formats.class_names import LIST_FILES
from dfssd.data.formats.coco import read_coco
from dfssd.data.formats.cvat import read_cvat
from dfssd.data.formats.labelstudio import csv_tasks, task_address, task_image
from dfssd.data.formats.listing import Tree
from dfssd.data.formats.matching import Pictures, Reference
from dfssd.data.formats.other_formats import table_rows
from dfssd.data.formats.parsing import Unparsable, parse_json, parse_xml
from dfssd.data.formats.read import JSON_FORMATS
from dfssd.data.formats.source import COUNTED, Item, Source
from dfssd.data.formats.voc import read_voc
from dfssd.data.formats.yolo import parse_yolo_text
from dfssd.data.manifest import Manifest
from dfssd.data.preparation.corrections import Correction
from dfssd.errors import DfssdError
from dfssd.runtime.storage import read_uri

LABELS = (".json", ".xml", ".txt", ".names", ".csv", ".tsv")
Signed = tuple[str, str]  # who, when
_NO_BOXES = ("other_shapes", "only_other_shapes")  # of what is counted: nothing came back of these


def read_corrected(path: str, manifest: Manifest, reviewer: str = "") -> tuple[list[Correction], list[str]]:
    """Corrections in a file (JSON of Label Studio or COCO, XML of CVAT or VOC), or in a folder or .zip of such or YOLO files.

    Every image that the file speaks of counts as looked at, also one without a box; a task that nobody finished does not.

    Args:
        reviewer: who corrected them, where the file does not say; default the user.

    Returns:
        corrections, and what could not be used.

    Raises:
        DfssdError: nothing in it is a label of an image of the manifest.
    """
    if Path(path).expanduser().is_file() and zipfile.is_zipfile(Path(path).expanduser()):
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(Path(path).expanduser()) as archive:
            for member in archive.infolist():
                if member.filename.lower().endswith(LABELS):
                    archive.extract(member, folder)
            return _read(folder, path, manifest, reviewer)
    return _read(path, path, manifest, reviewer)


def _read(place: str, path: str, manifest: Manifest, reviewer: str) -> tuple[list[Correction], list[str]]:
    files = _files(place)
    rows = {row.uri: row for row in manifest.rows}
    tree = _ManifestTree(list(rows))
    tree.sheets = place if Path(place).expanduser().is_dir() else str(Path(place).expanduser().absolute().parent)
    items, names, who, bad = _labels(files, tree, manifest.names, {row.image_id: row.uri for row in manifest.rows})
    fallback = (reviewer or getpass.getuser(), _now(path))
    found: list[Correction] = []
    for item in items:
        if item.label is None or item.uri not in rows:
            continue
        row = rows[item.uri]
        boxes = check_label(item.label, row.width, row.height, len(names))
        if isinstance(boxes, Problem):
            bad.append(f"{item.name}: {boxes.said()}")
            continue
        signed = who.get(item.uri) or fallback
        named: list[list[str | float]] = [[names[int(b[0])], *(round(float(v), 6) for v in b[1:])] for b in boxes]
        found.append(Correction(row.image_id, named, *signed, source=Path(path).name))
    if not found:
        first = f": {bad[0]}" if bad else ""
        raise DfssdError(
            f"no corrected label of an image of this data set is in it{first}",
            where=repr(path),
            todo="export as Label Studio JSON, CVAT for images 1.1, COCO, VOC or YOLO, with the images' file names unchanged",
        )
    return found, bad


def _files(path: str) -> dict[str, bytes]:
    """Label files by name."""
    place = Path(path).expanduser()
    if not place.exists():
        raise DfssdError(
            "the corrected labels are not there", where=repr(path), todo="check the path given to --corrected"
        )
    if place.is_dir():
        return {f: read_uri(f) for f in Tree(str(place)).below() if f.lower().endswith(LABELS)}
    return {str(place.absolute()): place.read_bytes()}


class _ManifestTree(Tree):
    """A listing that holds the images of the manifest, whether or not they can be reached from here."""

    def __init__(self, uris: list[str]) -> None:
        super().__init__("/")
        for uri in uris:
            folder, _, name = uri.rpartition("/")
            self.folders.setdefault(folder, {})[name] = uri

    def below(self, folder: str = "") -> list[str]:
        return sorted(uri for files in self.folders.values() for uri in files.values())


def _labels(
    files: dict[str, bytes], tree: Tree, classes: list[str], uris: dict[str, str]
) -> tuple[list[Item], list[str], dict[str, Signed], list[str]]:
    """Labels of all files in one order of classes, who signed them by uri, and what could not be parsed."""
    bad: list[str] = []
    sources: list[Source] = []
    who: dict[str, Signed] = {}
    pictures = Pictures(tree.root, tree.below(), tree.sheets)
    by_format: dict[str, dict[str, Any]] = {}
    for name, data in files.items():
        try:
            if name.lower().endswith(".json"):
                content = parse_json(data)
                fmt = next((f for f, (fits, _) in JSON_FORMATS.items() if fits(content)), "")
                by_format.setdefault(fmt, {})[name] = content
                if fmt == "labelstudio":
                    _name_by_id(content, uris)
                    who.update(_who_of_tasks(name, content, pictures))
            elif name.lower().endswith((".csv", ".tsv")):
                if tasks := csv_tasks(table_rows(data)):
                    by_format.setdefault("labelstudio", {})[name] = tasks
                    _name_by_id(tasks, uris)
                    who.update(_who_of_tasks(name, tasks, pictures))
            elif name.lower().endswith(".xml"):
                root = parse_xml(data)
                by_format.setdefault("cvat" if root.tag == "annotations" else "voc", {})[name] = root
        except Unparsable as error:
            bad.append(f"{name}: {error}")
    for fmt, contents in by_format.items():
        if fmt == "coco":
            sources.append(read_coco(tree, contents, looked_at=True))
        elif fmt in JSON_FORMATS:
            sources.append(JSON_FORMATS[fmt][1](tree, contents))
        elif fmt == "cvat":
            sources.append(read_cvat(tree, contents))
            signed = [s for root in contents.values() if (s := _who_of_cvat(root))]
            who.update({i.uri: signed[0] for i in sources[-1].items if i.label is not None and signed})
        elif fmt == "voc":
            sources.append(read_voc(tree, list(contents)))
    texts = _yolo(files, tree, pictures, classes)
    items = [i for s in sources for i in _in_order(s, classes)] + texts
    bad += [f"{path}: {problem.said()}" for s in sources for path, problem in s.bad]
    bad += [f"{s.counts[key]} {COUNTED[key]}" for s in sources for key in _NO_BOXES if s.counts[key]]
    return items, classes, who, bad


def _in_order(source: Source, classes: list[str]) -> list[Item]:
    """Items with classes by their ids in the manifest.

    Raises:
        DfssdError: a class that the manifest has not.
    """
    unknown = [n for n in source.names if n not in classes]
    if unknown:
        raise DfssdError(
            f"corrected labels name classes that the data has not: {', '.join(map(repr, unknown))}",
            where=source.format,
            todo=f"rename them in the labelling program (the classes are {', '.join(classes)}), or --add-classes NAME",
        )
    source.names = source.names or classes
    labelled = [i for i in source.items if i.label is not None]
    for item in labelled:
        label = item.label
        if label is not None and len(label.boxes):
            label.boxes[:, CLS] = [classes.index(source.names[int(c)]) if c >= 0 else -1 for c in label.boxes[:, CLS]]
    return labelled


def _yolo(files: dict[str, bytes], tree: Tree, pictures: Pictures, classes: list[str]) -> list[Item]:
    """Labels of .txt files, whose ids are those of a classes.txt beside them, else of the manifest."""
    texts = {
        n: d for n, d in files.items() if n.lower().endswith(".txt") and n.rpartition("/")[2].lower() not in LIST_FILES
    }
    lists = [n for n in files if n.rpartition("/")[2].lower() in LIST_FILES]
    names = (
        [line.strip() for line in files[lists[0]].decode("utf-8-sig").splitlines() if line.strip()]
        if lists
        else classes
    )
    unknown = [n for n in names if n not in classes]
    if unknown:
        raise DfssdError(
            f"the list of classes names others than the data: {', '.join(map(repr, unknown))}",
            where=lists[0],
            todo=f"the classes are {', '.join(classes)}; --add-classes NAME adds one",
        )
    references = [Reference(n, _picture_of(n, tree.sheets)) for n in texts]
    items = []
    for (_, data), uri in zip(texts.items(), pictures.match(references), strict=True):
        if uri is not None:
            label: Label = parse_yolo_text(data.decode("utf-8-sig", "replace"))
            for box in label.boxes:
                box[CLS] = classes.index(names[int(box[CLS])]) if 0 <= box[CLS] < len(names) else -1
            items.append(Item(uri, label))
    return items


def _picture_of(path: str, top: str) -> str:
    """The picture that a text file is about: its own name, with the folders it lies in below `labels/`."""
    inside = path[len(top) :].strip("/").rpartition(".")[0]
    return (inside.rpartition("labels/")[2] or inside) + "."


def _name_by_id(tasks: list[Any], uris: dict[str, str]) -> None:
    """Tasks that hold the id of their image, as those that were sent out do, name it by its whole path."""
    for task in tasks:
        data = (task.get("data") or task) if isinstance(task, dict) else None
        if isinstance(data, dict) and (uri := uris.get(str(data.get("image_id")))):
            data["image"] = quote(uri, safe="/:")


def _who_of_tasks(path: str, content: list[dict[str, Any]], pictures: Pictures) -> dict[str, Signed]:
    """Who finished each task of Label Studio, and when, by uri of the image."""
    signed = {}
    tasks = [t for t in content if isinstance(t, dict)]
    names = [task_image(task_address(t.get("data") or t)) for t in tasks]
    for task, uri in zip(tasks, pictures.match([Reference(path, n) for n in names]), strict=True):
        done = [a for a in task.get("annotations") or [task] if not a.get("was_cancelled")]
        if uri is None or not done:
            continue
        last = max(done, key=lambda a: str(a.get("updated_at") or a.get("created_at") or ""))
        person = last.get("completed_by") or last.get("annotator") or ""
        person = person.get("email") or person.get("id") if isinstance(person, dict) else person
        if str(person).isdecimal():
            person = f"user {person} of Label Studio"  # which exports numbers, and names in its organisation's page
        signed[uri] = (str(person), str(last.get("updated_at") or last.get("created_at") or ""))
    return signed


def _who_of_cvat(root: Any) -> Signed | None:
    """Assignee, else owner, of CVAT's task, and its last change."""
    for place in ("meta/task", "meta/job", "meta/project"):
        node = root.find(place)
        if node is not None:
            person = node.findtext("assignee/username") or node.findtext("owner/username") or ""
            when = node.findtext("updated") or root.findtext("meta/dumped") or ""
            if person or when:
                return person, when
    return None


def _now(path: str) -> str:
    """Time of the file's last change."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(Path(path).expanduser().stat().st_mtime))
