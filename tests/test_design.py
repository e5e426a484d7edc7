"""The map of docs/design.md (section 4): every file of the package stands in it, and imports go down it, in no circle."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np

import dfssd
from dfssd.data import boxes
from dfssd.line import detector

ROOT = Path(dfssd.__file__).parent
HALL = ("__init__", "cli", "jobs", "api")  # they start things, and may import any room


def sections() -> dict[str, str]:
    """Text of the map by room or file of the hall, in its order."""
    page = (ROOT.parent / "docs" / "design.md").read_text()
    lines = page.split("## 4. Map of the code", 1)[1].split("```")[1].splitlines()
    found, room, inner = dict[str, str](), "", ""
    for line in lines[next(k for k, text in enumerate(lines) if text.startswith("dfssd/")) + 1 :]:
        if not line.startswith(" "):
            break
        if name := re.match(r"  (\w+)(/|\.py) ", line):
            room = inner = name[1]
        elif name := re.match(r"    (\w+)/ ", line):
            inner = f"{room}/{name[1]}"
        found[inner] = found.get(inner, "") + " " + line
    return found


def modules() -> dict[str, Path]:
    """Files of the package by dotted name."""
    paths = {p: p.relative_to(ROOT.parent).with_suffix("").parts for p in ROOT.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): p for p, parts in paths.items()}


def imports(name: str, path: Path, known: dict[str, Path], top_level: bool) -> set[str]:
    """Modules of the package that a file imports: at its top level, or anywhere."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dfssd"):
            full = {f"{node.module}.{a.name}" for a in node.names}
            found |= {f if f in known else node.module for f in full}
    return found & known.keys() - {name}


def test_every_file_is_in_the_map():
    places = sections()
    for name, path in modules().items():
        room = "/".join(path.relative_to(ROOT).parts[:-1])
        if path.stem == "__init__" or room == "jobs":  # a file a command
            continue
        text = places.get(room or path.stem, "")
        assert re.search(rf"\b{path.stem}\b", text), f"{name} is not named under {room or path.stem}/ in docs/design.md"


def test_imports_go_down_the_map():
    order = [name for name in sections() if "/" not in name]
    known = modules()
    for name, path in known.items():
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room in HALL:
            continue
        for other in imports(name, path, known, top_level=False):
            target = other.split(".")[1]
            assert target == room or order.index(target) < order.index(room), (
                f"{name} imports {other}, which is above it"
            )


def test_no_file_imports_itself_by_way_of_others():
    known = modules()
    TopologicalSorter({n: imports(n, p, known, top_level=True) for n, p in known.items()}).prepare()


def test_the_doors_of_the_walks_are_there():
    doors = re.findall(r"`([\w/]+\.py):(\w+)`", (ROOT.parent / "docs" / "design.md").read_text())
    assert len(doors) > 20
    for file, name in doors:
        defined = {
            n.name for n in ast.parse((ROOT / file).read_text()).body if isinstance(n, ast.FunctionDef | ast.ClassDef)
        }
        assert name in defined, f"{file} defines no {name}"


# What holds boxes is called one of these; readers of files have layouts of their own.
BOXES = {"box", "boxes", "candidates", "detections", "found", "labels", "truth"}
OWN_LAYOUT = ("data/formats", "data/preparation")


def bare_columns(source: str) -> list[str]:
    """Where a column of boxes is a number: `boxes[:, 4]`, `boxes[:, 1:5]`, `row.boxes[:, [0, 5]]`, `box[5]`.

    From 4 on no other array here has a column: there it is asked whatever the array is called."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Subscript):
            continue
        name = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
        index = node.slice
        if isinstance(index, ast.Tuple) and isinstance(index.elts[0], ast.Slice):
            index = index.elts[-1]
        elif name != "box":
            continue  # rows
        column = index is not node.slice
        parts = index.elts if isinstance(index, ast.List) else [index]
        parts = [p for one in parts for p in ((one.lower, one.upper) if isinstance(one, ast.Slice) else (one,))]
        numbers = [p.value for p in parts if isinstance(p, ast.Constant) and type(p.value) is int]
        if numbers and (name in BOXES or (column and max(numbers) >= 4)):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_columns_of_boxes_have_names():
    assert len(bare_columns("boxes[:, 4], r.boxes[:, 1:5], found[:, [0, 5]], box[5], own[0][:, 5]")) == 5
    assert not bare_columns("boxes[:, CLS], boxes[0], boxes[:20], sizes[:, 0], boxes[:, XY], boxes[:, None]")
    bare = {
        name: lines
        for name, path in modules().items()
        if not str(path.relative_to(ROOT)).startswith(OWN_LAYOUT) and (lines := bare_columns(path.read_text()))
    }
    assert not bare
    alone = detector.SCORE, detector.CLS, detector.XYXY  # it is copied to where this package is not
    columns = np.arange(6)
    for own, ours in zip(alone, (boxes.DET_SCORE, boxes.DET_CLS, boxes.XYXY), strict=True):
        assert (columns[own] == columns[ours]).all()
