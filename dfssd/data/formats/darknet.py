"""What says which pictures and classes a YOLO data set has, and Darknet's way to say it: `obj.data` and bare lists."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath

from dfssd.data.formats.class_names import names_of_list
from dfssd.data.formats.entries import Resolver, Split
from dfssd.data.formats.listing import Tree
from dfssd.data.formats.parsing import Unparsable, decode_text
from dfssd.errors import DfssdError
from dfssd.runtime.storage import read_uri

SPLIT_KEYS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}


@dataclass
class Head:
    """A parsed data.yaml, or what a Darknet `.data` file says in its place."""

    path: str = ""
    names: list[str] = field(default_factory=list)
    splits: dict[str, Split] = field(default_factory=dict)
    root: str = ""
    keypoints: int = 0
    moved: int = 0
    numbered: bool = False  # classes have no names


def read_darknet(tree: Tree) -> Head:
    """No data.yaml: Darknet's `obj.data` (CVAT's YOLO 1.1), or bare lists train.txt, val.txt and test.txt."""
    head = Head(root=tree.root)
    files = tree.below()
    tops = [f for f in files if f[len(tree.root) :].strip("/").count("/") <= 1]
    data = next((f for f in tops if f.endswith(".data")), "")
    own = data.rpartition("/")[0] if data else tree.root
    resolver = Resolver(tree, [own], {PurePosixPath(own).name.lower()})
    named: dict[str, str] = {}
    if data:
        head.path = data
        try:
            text = decode_text(read_uri(data))
        except Unparsable as error:
            raise DfssdError(f"a list cannot be read: {error}", where=data, todo="save it as UTF-8") from error
        named = {k.strip().lower(): v.strip() for k, e, v in (line.partition("=") for line in text.splitlines()) if e}
        if (listed := resolver.find(named.get("names", "-"), files=True)) is not None:
            head.names = names_of_list(listed)
            _check_count(named.get("classes", ""), head.names, data)
    for split, keys in SPLIT_KEYS.items():
        for key in keys:
            entry = named.get(key) or ("" if data else f"{key}.txt")
            path = resolver.find(entry, files=True) if entry else None
            if path is not None:
                found, missing = resolver.listed(path)
                if data or len(found) >= len(missing):  # else it is a list of something else
                    head.splits[split] = Split(found, missing)
                    head.path = head.path or path
                break
    head.moved = resolver.moved
    return head


def _check_count(count: str, names: list[str], where: str) -> None:
    """Raise a DfssdError where `classes =` is another number than that of the names."""
    if count.isdecimal() and int(count) != len(names):
        raise DfssdError(
            f"'classes = {count}' and {len(names)} names ({', '.join(names[:8])}) disagree",
            where=where,
            todo="mend one of them",
        )
