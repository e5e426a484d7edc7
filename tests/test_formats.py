"""The same images and boxes, written in each layout, must come out the same."""

import json
import shutil

import cv2
import numpy as np
import pytest

from dfssd.data.checks import check_label
from dfssd.data.formats.read import read_source
from dfssd.data.formats.yolo import CR7_NAMES, parse_yolo_text
from dfssd.data.synthetic import NAMES
from dfssd.errors import DfssdError


def _truth(strip):
    images = sorted((strip / "images").glob("*.png"))[:12]
    return {p: parse_yolo_text((strip / "labels" / f"{p.stem}.txt").read_text()).boxes for p in images}


def _write_voc(truth, out):
    (out / "JPEGImages").mkdir(parents=True)
    (out / "Annotations").mkdir()
    for path, boxes in truth.items():
        shutil.copy(path, out / "JPEGImages" / path.name)
        objects = ""
        for c, x, y, w, h in boxes:
            corners = [(x - w / 2) * 64, (y - h / 2) * 64, (x + w / 2) * 64, (y + h / 2) * 64]
            tags = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
            objects += f"<object><name>{NAMES[int(c)]}</name><bndbox>{tags}</bndbox></object>"
        size = "<size><width>64</width><height>64</height><depth>1</depth></size>"
        xml = f"<annotation><filename>{path.name}</filename>{size}{objects}</annotation>"
        (out / "Annotations" / f"{path.stem}.xml").write_text(xml)


def _write_coco(truth, out):
    (out / "images").mkdir(parents=True)
    sheet = {"images": [], "annotations": [], "categories": [{"id": k + 5, "name": n} for k, n in enumerate(NAMES)]}
    sheet["categories"].append({"id": 1, "name": "defects"})  # Roboflow's unused super-category
    for i, (path, boxes) in enumerate(truth.items()):
        shutil.copy(path, out / "images" / path.name)
        sheet["images"].append({"id": i, "file_name": path.name, "width": 64, "height": 64})
        for c, x, y, w, h in boxes:
            box = [(x - w / 2) * 64, (y - h / 2) * 64, w * 64, h * 64]
            sheet["annotations"].append({"id": 1, "image_id": i, "category_id": int(c) + 5, "bbox": box})
    (out / "annotations.json").write_text(json.dumps(sheet))


def _write_cr7(truth, out):
    (out / "image").mkdir(parents=True)
    (out / "label").mkdir()
    for path, boxes in truth.items():
        name = path.stem.replace("_", " ")  # file names with spaces, no final newline
        shutil.copy(path, out / "image" / f"{name}.png")
        text = "\n".join(f"{int(b[0])} " + " ".join(str(v) for v in b[1:]) for b in boxes)
        (out / "label" / f"{name}.txt").write_text(text)


def _write_yolo(truth, out):
    (out / "images").mkdir(parents=True)
    (out / "labels").mkdir()
    for path in truth:
        shutil.copy(path, out / "images")
        shutil.copy(path.parent.parent / "labels" / f"{path.stem}.txt", out / "labels")
    (out / "data.yaml").write_text(f"path: .\ntrain: images\nval: images\nnames: {list(NAMES)}\n")


@pytest.mark.parametrize(
    ("fmt", "write"), [("voc", _write_voc), ("coco", _write_coco), ("cr7-det", _write_cr7), ("yolo", _write_yolo)]
)
def test_every_layout_gives_the_same_boxes(strip, tmp_path, fmt, write):
    truth = _truth(strip)
    write(truth, tmp_path / "d")
    source = read_source(str(tmp_path / "d"), fmt if fmt == "cr7-det" else "auto", ())  # known by its pictures' names
    assert source.format == fmt
    assert not source.bad
    names = NAMES if fmt != "cr7-det" else CR7_NAMES
    assert set(source.names) == set(names)
    found = {i.name.replace(" ", "_"): i for i in source.items}
    assert set(found) == {p.name for p in truth}
    for path, boxes in truth.items():
        got = check_label(found[path.name].label, 64, 64, len(source.names))
        ids = [source.names.index(names[int(b[0])]) for b in boxes]
        want = check_label(parse_yolo_text("\n".join(
            f"{i} " + " ".join(str(v) for v in b[1:]) for i, b in zip(ids, boxes, strict=True))), 64, 64, 7)  # fmt: skip
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_voc_with_reused_names_is_matched_by_folder(tmp_path):
    for part, c in (("train", "a"), ("validation", "b")):
        (tmp_path / part / "images").mkdir(parents=True)
        (tmp_path / part / "annotations").mkdir()
        cv2.imwrite(str(tmp_path / part / "images" / "x_1.jpg"), np.zeros((20, 20), np.uint8))
        box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
        xml = f"<annotation><filename>x_1</filename><object><name>{c}</name>{box}</object></annotation>"
        (tmp_path / part / "annotations" / "x_1.xml").write_text(xml)
    source = read_source(str(tmp_path), "auto", ())
    got = {i.split: source.names[int(i.label.boxes[0, 0])] for i in source.items}
    assert got == {"train": "a", "val": "b"}


def test_yolo_yaml_splits_lists_and_missing_labels(tmp_path):
    for part in ("train", "valid"):
        (tmp_path / part / "images").mkdir(parents=True)
        (tmp_path / part / "labels").mkdir()
        cv2.imwrite(str(tmp_path / part / "images" / "a.jpg"), np.zeros((20, 20), np.uint8))
    (tmp_path / "train" / "labels" / "a.txt").write_text("")
    # Roboflow writes '../train/images' although the file lies beside the folders.
    (tmp_path / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnames: {0: x}\n")
    items = {i.split: i for i in read_source(str(tmp_path / "data.yaml"), "auto", ()).items}
    assert len(items["train"].label.boxes) == 0  # labelled, defect-free
    assert items["val"].label is None  # nobody labelled it


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "not there"),
        (lambda p: p.mkdir(), "no image files"),
        (lambda p: (p.mkdir(), cv2.imwrite(str(p / "a.png"), np.zeros((9, 9)))), "layout"),
    ],
)
def test_unusable_sources_say_what_to_do(tmp_path, make, message):
    make(tmp_path / "d")
    with pytest.raises(DfssdError, match=message) as caught:
        read_source(str(tmp_path / "d"), "auto", ())
    assert caught.value.todo


def test_names_missing(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), np.zeros((9, 9)))
    (tmp_path / "labels" / "a.txt").write_text("0 .5 .5 .5 .5")
    with pytest.raises(DfssdError, match="no class names"):
        read_source(str(tmp_path), "auto", ())
    assert read_source(str(tmp_path), "auto", ("x",)).names == ["x"]
