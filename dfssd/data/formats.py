"""Which layout defect data comes in, and its reader: YOLO (Ultralytics), Pascal VOC, COCO, CR7-DET.

Each reader turns a folder into a `Source`: image files, what their label says, and class names. Nothing is checked here;
`checks` does that on what comes out. Images without a label file carry `label=None`.
"""

from __future__ import annotations

import yaml

from dfssd.data.coco import is_coco, read_coco
from dfssd.data.source import IMAGE_SUFFIXES, Source, is_image
from dfssd.data.voc import read_voc
from dfssd.data.yolo import read_cr7, read_yolo
from dfssd.errors import DfssdError
from dfssd.runtime.storage import Storage


def read_source(data: str, fmt: str, names: tuple[str, ...]) -> Source:
    """Read images and labels below `data`, detecting the format where `fmt` is 'auto'.

    Raises:
        DfssdError: nothing there, unknown layout, or class names missing.
    """
    if not data:
        raise DfssdError("no data given", todo="add --data FOLDER (or a data.yaml)")
    is_yaml = data.endswith((".yaml", ".yml"))
    folder, _, yaml_name = data.rpartition("/") if is_yaml else (data, "", "")
    store = Storage(folder or ".")
    if not store.exists() or (is_yaml and not store.exists(yaml_name)):
        raise DfssdError("the data is not there", where=data, todo="check the path given to --data")
    files = [f for f in store.files() if not any(p.startswith((".", "__MACOSX")) for p in f.split("/"))]
    if not any(is_image(f) for f in files) and not is_yaml:
        raise DfssdError("no image files found", where=store.uri, todo=f"known endings: {sorted(IMAGE_SUFFIXES)}")
    if is_yaml or fmt == "auto":
        fmt, yaml_name = ("yolo", yaml_name) if is_yaml else detect(store, files)
    if fmt == "yolo":
        source = read_yolo(store, files, yaml_name)
    else:
        source = {"voc": read_voc, "coco": read_coco, "cr7-det": read_cr7}[fmt](store, files)
    source.names = list(names) or source.names
    if not source.names:
        raise DfssdError(
            "the data has no class names", where=data, todo="add --names NAME NAME ... in the order of the class ids"
        )
    return source


def detect(store: Storage, files: list[str]) -> tuple[str, str]:
    """Return (format, name of the data.yaml or '')."""
    tops = {f.split("/")[0].lower() for f in files if "/" in f}
    for name in [f for f in files if f.endswith((".yaml", ".yml")) and f.count("/") <= 1]:
        content = yaml.safe_load(store.read(name))
        if isinstance(content, dict) and "names" in content:
            return "yolo", name
    if {"image", "label"} <= tops and any(f.startswith("label/") and f.endswith(".txt") for f in files):
        return "cr7-det", ""
    if any(f.endswith(".json") and is_coco(store, f) for f in files):
        return "coco", ""
    if any(f.lower().endswith(".xml") for f in files):
        return "voc", ""
    if any("labels" in f.split("/")[:-1] and f.endswith(".txt") for f in files):
        return "yolo", ""
    raise DfssdError(
        "the layout of the data was not recognised",
        where=store.uri,
        todo="see README 'Your own data' for the layouts, or name one with --format",
    )
