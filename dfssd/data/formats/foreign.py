"""Formats that are recognised but not read: the error names them, and a way to one that is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dfssd.data.formats.listing import IMAGE_SUFFIXES, Tree, is_image
from dfssd.data.formats.other_formats import table_rows
from dfssd.data.formats.parsing import Unparsable, decode_text, parse_json
from dfssd.errors import DfssdError
from dfssd.runtime.storage import read_uri

LOOKED_AT = 5  # files of a kind
READ = "COCO, VOC or YOLO"
MASK_NAME = re.compile(
    r"[-_ ](mask|label|gt|seg|segmentation)$", re.IGNORECASE
)  # of pictures in another folder as well
MAY_BE_LABELS = (
    ".txt",
    ".xml",
    ".json",
    ".csv",
    ".yaml",
    ".yml",
    ".zip",
    ".gz",
    ".tar",
    ".tgz",
    ".7z",
    ".rar",
    ".xlsx",
)
SPLITS = {"train", "val", "valid", "validation", "test", "images", "image", "img"}


PACKED = (".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".tfrecord", ".parquet", ".h5", ".zip")


class Foreign(NamedTuple):
    """What the data looks like, the file that says so, and what to do."""

    looks_like: str
    where: str
    todo: str


def _first(content: Any) -> dict[str, Any]:
    first = content[0] if isinstance(content, list) and content else None
    return first if isinstance(first, dict) else {}


def _of_coco(content: Any, key: str) -> bool:
    notes = content.get("annotations") if isinstance(content, dict) else None
    return key in _first(notes)


_JSON: Sequence[tuple[Callable[[Any], bool], str, str]] = (
    (
        lambda c: {"image_id", "bbox", "score"} <= _first(c).keys(),
        "COCO results (boxes that a model found, without a list of images)",
        "give the annotations file of the data set, which holds images, annotations and categories",
    ),
    (
        lambda c: _of_coco(c, "caption"),
        "COCO captions (sentences, no boxes)",
        "give the file of the same set that holds boxes, instances_*.json",
    ),
    (
        lambda c: _of_coco(c, "segments_info"),
        "COCO panoptic (masks of whole pictures)",
        "give the file of the same set that holds boxes, instances_*.json",
    ),
    (
        lambda c: isinstance(c, dict) and isinstance(c.get("assets"), dict) and "tags" in c,
        "a VoTT project",
        "export it from VoTT as Pascal VOC",
    ),
    (
        lambda c: "name" in _first(c) and isinstance(_first(c).get("labels"), list),
        "Scalabel or BDD100K",
        "convert it to COCO: python -m scalabel.label.to_coco",
    ),
    (
        lambda c: isinstance(c, dict) and isinstance(c.get("labels"), dict) and "classes" in c,
        "FiftyOne's own JSON (FiftyOneImageDetectionDataset)",
        "export it from FiftyOne as COCO: dataset.export(dataset_type=fiftyone.types.COCODetectionDataset, ...)",
    ),
    (
        lambda c: isinstance(c, dict) and "filepath" in _first(c.get("samples")),
        "FiftyOne's own data set (samples.json)",
        "export it from FiftyOne as COCO: dataset.export(dataset_type=fiftyone.types.COCODetectionDataset, ...)",
    ),
    (
        lambda c: "file_name" in _first(c) and "bbox_mode" in _first(_first(c).get("annotations")),
        "the dicts of Detectron2",
        "write COCO: detectron2.data.datasets.convert_to_coco_json(NAME, FILE)",
    ),
    (
        lambda c: isinstance(c, dict) and isinstance(c.get("asset"), dict) and "regions" in c,
        "VoTT (a JSON a picture)",
        "export it from VoTT as Pascal VOC",
    ),
    (
        lambda c: isinstance(c, dict) and isinstance(c.get("item"), dict) and isinstance(c.get("annotations"), list),
        "V7's Darwin JSON",
        "export it from V7 as COCO",
    ),
    (
        lambda c: isinstance(c, dict) and isinstance(c.get("metadata"), dict) and isinstance(c.get("instances"), list),
        "SuperAnnotate",
        f"convert it to {READ}",
    ),
    (
        lambda c: isinstance(c, dict) and "items" in c and "categories" in c,
        "Datumaro's own JSON",
        "convert it: datum convert -if datumaro -f coco_instances -i FOLDER -o NEW -- --save-media",
    ),
)


def _table(rows: list[dict[str, str]]) -> tuple[str, str] | None:
    """What a table looks like, and what to do."""
    columns = {k.lower() for k in rows[0]} if rows else set()
    joined = " ".join(columns)
    if "encodedpixels" in columns:
        return (
            "run-length encoded masks (Kaggle, EncodedPixels)",
            f"draw a box round each connected part of a mask, and write {READ}",
        )
    if {"imageid", "labelname", "xmin", "xmax"} <= columns:
        return "Open Images", f"convert it to {READ}, for example with FiftyOne"
    corners = sum(bool(re.search(p, joined)) for p in (r"x_?(min|1)", r"y_?(min|1)", r"x_?(max|2)", r"y_?(max|2)"))
    if corners == 4 or len(re.findall(r"\b(x|y|w|h|width|height|bbox)\b", joined)) >= 4 or "bbox" in columns:
        return (
            f"a table of boxes whose columns ({', '.join(rows[0])}) are not those that are read",
            "call them filename,width,height,class,xmin,ymin,xmax,ymax (px), one line a box",
        )
    headers = list(rows[0]) if rows else []
    if len(headers) == 6 and all(h.replace(".", "", 1).isdecimal() or not h for h in headers[1:5]):
        return (
            "a CSV without a line of column names (RetinaNet: path,x1,y1,x2,y2,class)",
            "put filename,xmin,ymin,xmax,ymax,class as its first line, and add the columns width and height (px)",
        )
    if len(headers) == 8 and _numbers(headers[1:5] + headers[6:]) and is_image(headers[5]):
        return (
            "a CSV without a line of column names (makesense.ai: class,x,y,width,height,file,width,height)",
            "export it from there as VOC or YOLO",
        )
    return None


def recognise(tree: Tree, files: Sequence[str]) -> Foreign | None:
    """The first format that the files look like and that is not read."""
    for found in (_jsons, _tables, _texts, _masks, _folders):
        foreign = found(tree, files)
        if foreign:
            return foreign
    return None


def _of(files: Sequence[str], *endings: str) -> list[str]:
    return [f for f in files if f.lower().endswith(endings)][:LOOKED_AT]


def _jsons(tree: Tree, files: Sequence[str]) -> Foreign | None:
    for path in _of(files, ".json"):
        try:
            content = parse_json(read_uri(path))
        except Unparsable:
            continue
        for fits, name, todo in _JSON:
            if fits(content):
                return Foreign(name, path, todo)
    for path in _of(files, ".ndjson", ".jsonl", ".manifest"):
        return Foreign("JSON by lines, as Labelbox and SageMaker export it", path, f"export or convert it as {READ}")
    return None


def _tables(tree: Tree, files: Sequence[str]) -> Foreign | None:
    for path in _of(files, ".csv", ".tsv"):
        found = _table(table_rows(read_uri(path)))
        if found:
            return Foreign(found[0], path, found[1])
    return None


def _texts(tree: Tree, files: Sequence[str]) -> Foreign | None:
    """Text files of corners in px, as DeepPCB, KITTI and keras-yolo3 have them."""
    for path in _of(files, ".txt"):
        try:
            lines = [
                re.split(r"[\s,]+", line.strip()) for line in decode_text(read_uri(path)).splitlines() if line.strip()
            ]
        except Unparsable:
            continue
        if lines and all(len(p) in (15, 16) and _numbers(p[1:]) and not _numbers(p[:1]) for p in lines):
            return Foreign("KITTI (text files of 15 columns, corners in px)", path, f"convert it to {READ}")
        if lines and all(is_image(p[0]) and len(p) % 5 == 1 and _numbers(p[1:]) for p in lines) and len(lines[0]) > 1:
            return Foreign(
                "a list of pictures with their boxes (keras-yolo3, 'YOLO Keras TXT': path x1,y1,x2,y2,class ...)",
                path,
                f"export it as {READ}",
            )
        if lines and path.lower().endswith("gt/gt.txt") and all(len(p) >= 8 and _numbers(p) for p in lines):
            return Foreign("MOT (gt/gt.txt, one line a box and frame)", path, f"convert it to {READ}")
        whole = lines and all(len(p) == 5 and all(v.isdecimal() for v in p) for p in lines)
        if whole and all(int(p[0]) < int(p[2]) and int(p[1]) < int(p[3]) for p in lines) and int(lines[0][2]) > 1:
            return Foreign(
                "text files of corners in px (x1 y1 x2 y2 class, as DeepPCB has them)",
                path,
                "write YOLO lines of the same name as the picture: class cx cy w h, as shares of the picture's sides",
            )
    return None


def _numbers(words: Sequence[str]) -> bool:
    return all(re.fullmatch(r"-?\d+(\.\d+)?", w) for w in words)


def _masks(tree: Tree, files: Sequence[str]) -> Foreign | None:
    pictures = tree.pictures()
    stems = {f.rpartition("/")[2].rpartition(".")[0] for f in pictures}
    apart = [s for s in stems if MASK_NAME.search(s) and MASK_NAME.sub("", s) in stems]
    masks = sorted(tree.masks) or [f for f in pictures if f.rpartition("/")[2].rpartition(".")[0] in apart]
    if not masks:
        return None
    return Foreign(
        "pictures with masks (MVTec, DAGM, Kolektor)",
        masks[0],
        f"draw a box round each connected part of a mask (cv2.connectedComponentsWithStats), and write {READ}",
    )


def _folders(tree: Tree, files: Sequence[str]) -> Foreign | None:
    """Pictures sorted into folders, and not one file that could be a label."""
    pictures = [f for f in files if is_image(f)]
    others = [f for f in files if f.lower().endswith(MAY_BE_LABELS)]
    folders = sorted({f.rpartition("/")[0].rpartition("/")[2] for f in pictures})
    if others or len(folders) < 2 or SPLITS.issuperset(f.lower() for f in folders):
        return None
    return Foreign(
        f"a set for classification (pictures in folders such as {', '.join(map(repr, folders[:4]))}, and no label file)",
        tree.root,
        "a detector learns from boxes: draw them in a labelling program (dfssd review names some), or give the folder that "
        "holds the labels too",
    )


def no_pictures(tree: Tree) -> DfssdError:
    """What to say of a folder without any picture."""
    files = tree.below()
    packed = [f for f in files if f.lower().endswith(PACKED)]
    labels = [f for f in files if f.lower().endswith((".json", ".xml", ".csv", ".txt"))]
    said, todo = "", f"known endings: {', '.join(sorted(IMAGE_SUFFIXES))}"
    if packed:
        said = f"; {packed[0]!r} is of a kind that is not unpacked"
        todo = "unpack it, and give the folder that the pictures are in"
    elif labels:
        said = f", but {len(labels)} files that may be labels, such as {labels[0]!r}"
        todo = "put the pictures beside them (CVAT: 'Save images')"
    return DfssdError(f"no image files found{said}", where=repr(tree.root), todo=todo)
