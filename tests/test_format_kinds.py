"""Kinds of trouble that people report about their data sets, each in several forms; none of them may go wrong in silence."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from layouts import (
    BOTH,
    BOX,
    HEIGHT,
    NAMES,
    WIDTH,
    N,
    coco,
    coco_sheet,
    picture,
    pictures,
    put,
    read,
    tally,
    texts,
    voc,
    voc_xml,
    yolo,
    yolo_line,
)

from dfssd.data.formats.coco import _around, _unpack
from dfssd.data.formats.parsing import Unparsable, parse_xml, parse_yaml
from dfssd.errors import DfssdError

HEAD = "path: .\ntrain: images\nval: images\n"


def check_all_read(path, names=()):
    boxes, bad, clean = tally(read(path, names))
    assert (boxes, dict(bad), clean) == (BOTH, {}, 0)


# A: which label belongs to which picture


def _lots(root, folder, write):
    """Two lots with the same file names; all scratches in lotA, all pits in lotB."""
    for lot, first in (("lotA", 0), ("lotB", 1)):
        pictures(root / folder / lot, range(first, N, 2), "x{:03d}.png")
    for lot, first in (("lotA", 0), ("lotB", 1)):
        for k in range(4):
            Path(root / folder / lot / f"x{2 * k + first:03d}.png").rename(root / folder / lot / f"{k:04d}.png")
            write(lot, k, first)


@pytest.mark.parametrize(
    "place", ["Annotations/{lot}", "{lot}/xml", "labels/{lot}", "{lot}", "Annotations/train/{lot}"]
)
def test_voc_sheets_belong_to_the_picture_in_the_folder_of_the_same_name(tmp_path, place):
    def write(lot, k, kind):
        put(tmp_path / place.format(lot=lot) / f"{k:04d}.xml", voc_xml(kind))

    _lots(tmp_path, "JPEGImages", write)
    check_all_read(tmp_path)
    source = read(tmp_path)
    for item in source.items:
        assert source.names[int(item.label.boxes[0, 0])] == ("scratch" if "lotA" in item.uri else "pit")


@pytest.mark.parametrize(
    "pattern",
    [
        "{lot}/{k:04d}.png",
        "images/{lot}/{k:04d}.png",
        "{lot}\\{k:04d}.png",
        "./{lot}/{k:04d}.png",
        "C:\\work\\{lot}\\{k:04d}.png",
        "/mnt/x/{lot}/{k:04d}.PNG",
    ],
)
def test_coco_names_with_folders_are_matched_by_them(tmp_path, pattern):
    _lots(tmp_path, "images", lambda *_: None)
    sheet = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "scratch"}, {"id": 2, "name": "pit"}]}
    for lot, kind in (("lotA", 1), ("lotB", 2)):
        for k in range(4):
            image = len(sheet["images"])
            sheet["images"].append({"id": image, "file_name": pattern.format(lot=lot, k=k)})
            sheet["annotations"].append({"id": image, "image_id": image, "category_id": kind, "bbox": BOX})
    put(tmp_path / "annotations" / "all.json", json.dumps(sheet))
    check_all_read(tmp_path)


def test_one_coco_file_a_split_finds_its_folder_by_its_name(tmp_path):
    """COCO's own layout: annotations/instances_train2017.json, train2017/0.png, the same names in val2017."""
    for split, first in (("train2017", 0), ("val2017", 1)):
        pictures(tmp_path / split, range(first, N, 2), "p{:03d}.png")
        for j, k in enumerate(range(first, N, 2)):
            Path(tmp_path / split / f"p{k:03d}.png").rename(tmp_path / split / f"{j}.png")
        sheet = coco_sheet(range(4), "{}.png", category_id=first + 1)
        put(tmp_path / "annotations" / f"instances_{split}.json", json.dumps(sheet))
    check_all_read(tmp_path)
    assert {i.split for i in read(tmp_path).items} == {"train", "val"}


@pytest.mark.parametrize("layout", ["voc", "coco"])
def test_a_tie_names_both_pictures(tmp_path, layout):
    _lots(tmp_path, "images", lambda *_: None)
    if layout == "voc":
        put(tmp_path / "Annotations" / "0000.xml", voc_xml(0))
    else:
        put(tmp_path / "a.json", json.dumps(coco_sheet([0], "0000.png")))
    with pytest.raises(DfssdError, match=r"lotA/0000.png.*lotB/0000.png"):
        read(tmp_path)


def test_a_sheet_of_another_lot_says_nothing_about_a_picture_of_the_same_name(tmp_path):
    pictures(tmp_path / "JPEGImages" / "lotA", range(4))
    for lot in ("lotA", "lotB"):
        for k in range(4):
            put(tmp_path / "Annotations" / lot / f"{k:03d}.xml", voc_xml(k, name=lot))
    boxes, bad, _ = tally(read(tmp_path))
    assert boxes == {"lotA": 4} and bad == {"label_without_image": 4}


def test_several_sheets_and_ids_about_one_picture_are_joined(tmp_path):
    sheet = coco_sheet()
    sheet["images"] += [{**i, "id": i["id"] + 100} for i in sheet["images"]]
    sheet["annotations"] += [{**a, "image_id": a["image_id"] + 100, "bbox": [1, 1, 8, 8]} for a in sheet["annotations"]]
    source = read(coco(tmp_path / "c", sheet))
    assert tally(source)[0] == {"scratch": 8, "pit": 8} and source.counts["joined"] == N
    root = voc(tmp_path / "v")
    put(root / "Annotations" / "more" / "000.xml", voc_xml(1).replace("20.0", "22.0"))
    source = read(root)
    assert tally(source)[0] == {"scratch": 4, "pit": 5} and source.counts["joined"] == 1


def test_joined_sheets_of_different_sizes_are_refused_by_name(tmp_path):
    root = voc(tmp_path)
    put(root / "Annotations" / "more" / "000.xml", voc_xml(1).replace("<width>64", "<width>640"))
    assert tally(read(root))[1] == {"label_size_mismatch": 1}


@pytest.mark.parametrize("other", [1, "1", 1.0])
def test_one_id_for_two_pictures_is_refused(tmp_path, other):
    sheet = coco_sheet()
    sheet["images"][1]["id"] = other
    with pytest.raises(DfssdError, match=r"share the image id 1: '000.png' and '001.png'"):
        read(coco(tmp_path, sheet))


def test_voc_names_and_tags(tmp_path):
    """LabelImg pairs by the file's own name; a stale <filename> does not count while that finds a picture."""
    root = voc(tmp_path)
    for k in range(N):
        put(root / "Annotations" / f"{k:03d}.xml", voc_xml(k).replace(f"{k:03d}.png", f"{(k + 1) % N:03d}.png"))
    source = read(root)
    assert all(source.names[int(i.label.boxes[0, 0])] == NAMES[int(i.name[:3]) % 2] for i in source.items)
    for k in range(N):
        Path(root / "Annotations" / f"{k:03d}.xml").rename(root / "Annotations" / f"ann_{k}.xml")
    check_all_read(root)  # no picture is called so: the tag counts


@pytest.mark.parametrize("dotted", ["part.{:03d}.png", "a.b {:03d}.v2.png"])
def test_names_with_dots(tmp_path, dotted):
    pictures(tmp_path / "JPEGImages", pattern=dotted)
    put(tmp_path / "JPEGImages" / "part.png", picture(99))
    for k in range(N):
        put(tmp_path / "Annotations" / dotted.format(k).replace(".png", ".xml"), voc_xml(k))
    boxes, bad, _ = tally(read(tmp_path))
    assert boxes == BOTH and not bad


# B: --names never renames


@pytest.mark.parametrize("write", [yolo, voc, coco])
def test_given_names_are_matched_whatever_their_order(tmp_path, write):
    source = read(write(tmp_path), ("pit", "scratch"))
    assert source.names == ["pit", "scratch"] and tally(source)[0] == BOTH


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("scratch", "dent"), "'dent' is unknown.*'pit' is missing"),
        (("scratch",), "'pit' is missing"),
        (("scratch", "pit", "hole"), "'hole' is unknown"),
        (("Scratch", "pit"), "did you mean 'scratch'"),
    ],
)
@pytest.mark.parametrize("write", [yolo, voc, coco])
def test_unknown_and_missing_names_are_refused(tmp_path, write, names, said):
    with pytest.raises(DfssdError, match=said):
        read(write(tmp_path), names)


# C: no annotation disappears uncounted


def _rle(box):
    """Plain run-length counts of a mask that fills a box, column by column."""
    x, y, w, h = (int(v) for v in box)
    mask = np.zeros((HEIGHT, WIDTH), int)
    mask[y : y + h, x : x + w] = 1
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    return [int(v) for v in np.diff([0, *changes, len(flat)])]


def _packed(counts):
    """COCO's packed text of run lengths (maskApi.c, rleToString)."""
    text = ""
    for k, value in enumerate(counts):
        x = value - (counts[k - 2] if k > 2 else 0)
        more = True
        while more:
            c, x = x & 0x1F, x >> 5
            more = x != -1 if c & 0x10 else x != 0
            text += chr((c | 0x20 if more else c) + 48)
    return text


POLYGON = [[20, 10, 36, 10, 36, 22, 20, 22]]


@pytest.mark.parametrize(
    ("changes", "counted"),
    [
        ({"iscrowd": 1, "segmentation": {"counts": _rle(BOX), "size": [HEIGHT, WIDTH]}}, "crowds"),
        ({"bbox": None, "segmentation": POLYGON}, "polygons"),
        ({"bbox": [], "segmentation": POLYGON}, "polygons"),
        ({"bbox": [0, 0, 0, 0], "segmentation": POLYGON}, "polygons"),
        ({"bbox": None, "segmentation": [[20, 10, 28, 10, 28, 22], [28, 10, 36, 10, 36, 22]]}, "polygons"),
        ({"bbox": None, "iscrowd": 1, "segmentation": {"counts": _rle(BOX), "size": [HEIGHT, WIDTH]}}, "polygons"),
        ({"bbox": None, "segmentation": {"counts": _packed(_rle(BOX)), "size": [HEIGHT, WIDTH]}}, "polygons"),
    ],
)
def test_masks_and_crowds_are_boxes_and_are_counted(tmp_path, changes, counted):
    source = read(coco(tmp_path, coco_sheet(**changes)))
    assert tally(source) == (BOTH, {}, 0)
    assert source.counts[counted] == N
    assert np.allclose(source.items[0].label.boxes[0, 1:], [28, 16, 16, 12])


def test_packed_run_lengths_against_the_plain_ones():
    rng = np.random.default_rng(0)
    for _ in range(50):
        counts = rng.integers(0, 3000, rng.integers(2, 12)).tolist()
        assert _unpack(_packed(counts)) == counts
    assert _around({"counts": [3 * 48 - 2, 4], "size": [48, 64]}) == (2, 0, 2, 48)  # a run over the end of a column


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bbox": None}, "label_columns"),
        ({"bbox": [1, 2, 3]}, "label_columns"),
        ({"bbox": "1,2,3,4"}, "label_columns"),
        ({"image_id": 999}, "annotation_without_image"),
        ({"image_id": None}, "annotation_without_image"),
        ({"category_id": 9}, "class_out_of_range"),
        ({"bbox": [1, 2, None, 4]}, "label_nan"),
        ({"bbox": [5, 5, 0, 3]}, "box_empty"),
    ],
)
def test_a_dropped_annotation_is_counted_and_its_picture_is_never_clean(tmp_path, change, reason):
    sheet = coco_sheet()
    sheet["annotations"][0].update(change)
    boxes, bad, clean = tally(read(coco(tmp_path, sheet)))
    assert boxes == {"scratch": 3, "pit": 4} and bad == {reason: 1}
    assert clean == (reason == "annotation_without_image")  # nobody can say which picture that one was about


@pytest.mark.parametrize("kind", [str, float, lambda i: f" {i} "])
def test_ids_are_compared_as_text(tmp_path, kind):
    sheet = coco_sheet()
    for image in sheet["images"]:
        image["id"] = kind(image["id"])
    for category in sheet["categories"]:
        category["id"] = str(category["id"])
    assert tally(read(coco(tmp_path, sheet))) == (BOTH, {}, 0)


@pytest.mark.parametrize(
    ("inner", "counted", "boxes"),
    [
        ("<polygon><x1>20</x1><y1>10</y1><x2>36</x2><y2>10</y2><x3>36</x3><y3>22</y3></polygon>", "polygons", 1),
        (
            "<polygon><pt><x>20</x><y>10</y></pt><pt><x>36</x><y>22</y></pt><pt><x>20</x><y>22</y></pt></polygon>",
            "polygons",
            1,
        ),
        ("<robndbox><cx>28</cx><cy>16</cy><w>12</w><h>16</h><angle>1.5707963</angle></robndbox>", "rotated", 1),
        (
            "<bndbox><xmin>20</xmin><ymin>10</ymin><xmax>36</xmax><ymax>22</ymax></bndbox>"
            "<bndbox><xmin>2</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>",
            "several",
            2,
        ),
        (
            "<part><name>tip</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
            "<difficult>1</difficult><bndbox><xmin>20</xmin><ymin>10</ymin><xmax>36</xmax><ymax>22</ymax></bndbox>",
            "",
            1,
        ),
    ],
)
def test_voc_objects_of_every_shape(tmp_path, inner, counted, boxes):
    root = voc(tmp_path)
    for k in range(N):
        put(root / "Annotations" / f"{k:03d}.xml", voc_xml(k, inner))
    source = read(root)
    assert tally(source) == (dict.fromkeys(NAMES, 4 * boxes), {}, 0)
    assert not counted or source.counts[counted] == N
    assert any(np.allclose(b[1:], [28, 16, 16, 12], atol=1e-4) for b in source.items[0].label.boxes)


@pytest.mark.parametrize(
    "inner", ["<bndbox><xmin>1</xmin></bndbox>", "<pose>x</pose>", "<bndbox><xmin>a</xmin></bndbox>"]
)
def test_voc_objects_without_a_whole_box_are_bad_files(tmp_path, inner):
    root = voc(tmp_path)
    put(root / "Annotations" / "000.xml", voc_xml(0, inner))
    boxes, bad, clean = tally(read(root))
    assert boxes == {"scratch": 3, "pit": 4} and sum(bad.values()) == 1 and not clean


def test_yolo_polygons_keypoints_and_wrong_columns(tmp_path):
    root = yolo(tmp_path, HEAD + "names: [scratch, pit]\nkpt_shape: [2, 3]\n")
    x1, y1, x2, y2 = 20 / WIDTH, 10 / HEIGHT, 36 / WIDTH, 22 / HEIGHT
    put(root / "labels" / "000.txt", f"0 {x1} {y1} {x2} {y1} {x2} {y2} {x1} {y2}")
    put(root / "labels" / "001.txt", yolo_line(1) + " .1 .1 2 .2 .2 2")
    put(root / "labels" / "002.txt", f"0 {x1} {y1} {x2} {y1} {x2} {y2}")
    source = read(root)
    assert tally(source) == (BOTH, {}, 0)
    assert source.counts["polygons"] == 2 and source.counts["keypoints"] == 1
    for line in ("0 .1 .2 .3", "0 .1 .2 .3 .4 .9", "0 .1 .1 .2 .2 .3 .3 .4", "0,.1,.2,.3,.4", "scratch .1 .2 .3 .4"):
        put(root / "labels" / "000.txt", line)
        boxes, bad, clean = tally(read(root))
        assert sum(bad.values()) == 1 and boxes["scratch"] == 3 and not clean


# D: class lists


@pytest.mark.parametrize(
    "names",
    [
        "{0: scratch, 1: pit}",
        "{'0': scratch, '1': pit}",
        "{1: pit, 0: scratch}",
        "\n- scratch\n- pit",
        "!!python/tuple [scratch, pit]",
        "[scratch, pit]\nnc: 2",
        "[' scratch', 'pit ']",
    ],
)
def test_class_lists_that_say_the_same(tmp_path, names):
    check_all_read(yolo(tmp_path, f"{HEAD}names: {names}\n"))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("{0: scratch, 2: pit}", r"\[0, 2\]"),
        ("{1: scratch, 2: pit}", "not 0 to 1"),
        ("{a: scratch, b: pit}", "not a whole number"),
        ("scratch", "one word"),
        ("scratch, pit", "one word"),
        ("[scratch, pit]\nnc: 3", "nc: 3.*disagree"),
        ("{-1: scratch, 0: pit}", "not a whole number"),
        ("[scratch, scratch]", "two classes are called"),
        ("[scratch, '']", "no name"),
        ("[scratch, [pit]]", "something else"),
        ("[scratch, pit]\nnc: two", "not a whole number"),
    ],
)
def test_class_lists_that_cannot_be_meant(tmp_path, names, said):
    with pytest.raises(DfssdError, match=said) as caught:
        read(yolo(tmp_path, f"{HEAD}names: {names}\n"))
    assert caught.value.todo and "data.yaml" in caught.value.where


def test_words_that_yaml_takes_for_something_else_stay_names(tmp_path):
    source = read(yolo(tmp_path, HEAD + "names: [off, 1e3]\n"))
    assert source.names == ["off", "1e3"]


def test_a_count_alone_numbers_the_classes_as_ultralytics_does(tmp_path):
    assert read(yolo(tmp_path, HEAD + "nc: 2\n")).names == ["class_0", "class_1"]


def test_lists_of_classes_of_labelling_programs(tmp_path):
    root = yolo(tmp_path, None)
    put(root / "labels" / "classes.txt", "scratch\r\npit\r\n")
    check_all_read(root)
    put(root / "classes.txt", "scratch\npit\ndent\n")  # LabelImg: the same list, grown
    assert read(root).names == ["scratch", "pit", "dent"]
    put(root / "classes.txt", "pit\nscratch\n")
    with pytest.raises(DfssdError, match=r"disagree.*classes.txt"):
        read(root)
    (root / "labels" / "classes.txt").unlink()
    put(root / "classes.txt", "pit\n\nscratch\n")
    with pytest.raises(DfssdError, match="class 1 has no name"):
        read(root)


# E: entries of a data.yaml and of lists


def test_entries_are_resolved_as_ultralytics_does(tmp_path):
    names = "names: [scratch, pit]\n"
    for k, text in enumerate(
        [
            "path: .\ntrain: images\n",
            "train: ./images\n",
            "train: ../images\n",
            "train: images/\nval: images\n",
            "path: ../d{k}\ntrain: images\n",
            "path: d{k}\ntrain: images\n",
            "train: d{k}/images\n",
            "train: data/images\n",
            "train: {root}/images\n",
            "path: {root}\ntrain: images\n",
            "path: /nowhere/d{k}\ntrain: images\n",
            "train: [images]\n",
            "train: .\\images\n",
            "train: images\nvalidation: images\n",
            "path: datasets/d{k}\ntrain: images\n",
            "train: images\nval: ''\ntest: null\n",
            "train: C:\\users\\me\\d{k}\\images\n",
        ]
    ):
        root = yolo(tmp_path / f"d{k}", text.replace("{k}", str(k)).replace("{root}", str(tmp_path / f"d{k}")) + names)
        check_all_read(root / "data.yaml")
        check_all_read(root)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    "line", ["./images/{}", "images/{}", "images\\{}", "data/images/{}", "{root}/images/{}", "/other/machine/images/{}"]
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists_of_pictures(tmp_path, mark, line, end):
    root = yolo(tmp_path, "train: train.txt\nval: train.txt\nnames: [scratch, pit]\n")
    lines = [line.format(f"{k:03d}.png", root=root).replace("{root}", str(root)) for k in range(N)]
    put(root / "train.txt", mark + end.join(lines).encode())
    check_all_read(root)


def test_lists_and_yamls_in_other_folders(tmp_path):
    root = yolo(tmp_path / "a", None)
    put(root / "images" / "train.txt", "\n".join(f"./{k:03d}.png" for k in range(N)))
    put(root / "configs" / "data.yaml", "train: ../images/train.txt\nval: ../images\nnames: [scratch, pit]\n")
    check_all_read(root / "configs" / "data.yaml")
    check_all_read(root)  # found one folder deeper, and read where it lies
    put(tmp_path / "b" / "steel.yaml", "train: ../a/images\nnames: [scratch, pit]\n")  # a folder beside the set
    check_all_read(tmp_path / "b" / "steel.yaml")


@pytest.mark.parametrize(
    "entry",
    [
        "train: images/line_2",
        "train: [images, imagse]",
        "val: valid/images",
        "train: train.txt",
        "train: /no/where/images",
        "train: /",
        "test: ../tset",
    ],
)
def test_an_entry_that_leads_nowhere_is_an_error_by_name(tmp_path, entry):
    rest = "".join(f"{k}: images\n" for k in ("train", "val") if not entry.startswith(k))
    with pytest.raises(DfssdError, match="leads nowhere") as caught:
        read(yolo(tmp_path, f"{entry}\n{rest}names: [scratch, pit]\n"))
    assert entry.split(": ")[1].strip("[]").split(", ")[-1] in str(caught.value)


def test_missing_lines_are_counted_and_pictures_in_no_split_too(tmp_path):
    root = yolo(tmp_path, "train: train.txt\nnames: [scratch, pit]\n")
    put(root / "train.txt", "\n".join(f"images/{k:03d}.png" for k in [0, 1, 2, 3, 90, 91]))
    source = read(root)
    assert tally(source)[:2] == ({"scratch": 2, "pit": 2}, {"listed_not_there": 2})
    assert [Path(p).name for p in source.unused] == [f"{k:03d}.png" for k in (4, 5, 6, 7)]
    put(root / "train.txt", "images/90.png\n")
    with pytest.raises(DfssdError, match=r"images/90.png"):
        read(root)


def test_two_yamls_are_not_chosen_between_by_their_names(tmp_path):
    root = yolo(tmp_path)
    put(root / "another.yaml", "train: images\nval: images\nnames: [a, b]\n")
    with pytest.raises(DfssdError, match=r"another.yaml.*data.yaml"):
        read(root)
    put(root / "another.yaml", "names: [a, b]\n")  # class names only: a lesser claim
    check_all_read(root)


# F: layouts of labelling programs


def test_layouts_as_programs_write_them(tmp_path):
    flat = tmp_path / "labelimg"
    pictures(flat, pattern="IMG {:03d}.JPG")
    texts(flat, pattern="IMG {:03d}.txt")
    put(flat / "classes.txt", "scratch\npit\n")
    check_all_read(flat)
    upper = tmp_path / "upper"
    pictures(upper / "Images")
    texts(upper / "Labels")
    put(upper / "obj.names", "scratch\npit\n")
    check_all_read(upper)
    cvat = tmp_path / "cvat_yolo_1_1"
    pictures(cvat / "obj_train_data", pattern="frame_{:06d}.PNG")
    texts(cvat / "obj_train_data", pattern="frame_{:06d}.txt")
    put(cvat / "obj.data", "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
    put(cvat / "obj.names", "scratch\npit\n")
    put(cvat / "train.txt", "".join(f"data/obj_train_data/frame_{k:06d}.PNG\n" for k in range(N)))
    check_all_read(cvat)
    ultra = tmp_path / "cvat_ultralytics"
    pictures(ultra / "images" / "train")
    texts(ultra / "labels" / "train")
    put(ultra / "data.yaml", "names:\n  0: scratch\n  1: pit\npath: .\ntrain: train.txt\n")
    put(ultra / "train.txt", "".join(f"data/images/train/{k:03d}.png\n" for k in range(N)))
    check_all_read(ultra)
    roboflow = tmp_path / "darknet"
    pictures(roboflow / "train")
    texts(roboflow / "train")
    put(roboflow / "train" / "_darknet.labels", "scratch\npit\n")
    put(roboflow / "README.roboflow.txt", "This dataset was exported via roboflow.com\n\nIt has 8 images.\n")
    check_all_read(roboflow)
    studio = yolo(tmp_path / "studio", None)
    put(
        studio / "notes.json",
        json.dumps({"categories": [{"id": 0, "name": "scratch"}, {"id": 1, "name": "pit"}], "info": {}}),
    )
    check_all_read(studio)
    parts = tmp_path / "parts"
    pictures(parts / "part1" / "images", range(4))
    texts(parts / "part1" / "images", range(4))
    pictures(parts / "part2" / "images", range(4, N))
    texts(parts / "part2" / "labels", range(4, N))
    put(parts / "data.yaml", "train: [part1/images, part2/images]\nval: part2/images\nnames: [scratch, pit]\n")
    check_all_read(parts)


def test_cvat_for_images(tmp_path):
    x, y, w, h = BOX
    cvat = tmp_path / "cvat"
    pictures(cvat / "images" / "lot")
    body = "".join(
        f'<image id="{k}" name="lot/{k:03d}.png" width="{WIDTH}" height="{HEIGHT}">'
        + (
            f'<box label="{NAMES[k % 2]}" xtl="{x}" ytl="{y}" xbr="{x + w}" ybr="{y + h}"/>'
            if k > 1
            else f'<polygon label="{NAMES[k % 2]}" points="{x},{y};{x + w},{y};{x + w},{y + h}"/>'
        )
        + "</image>"
        for k in range(N)
    )
    put(cvat / "annotations.xml", f'<?xml version="1.0" encoding="utf-8"?><annotations>{body}</annotations>')
    check_all_read(cvat)


def test_label_studio_and_its_skipped_tasks(tmp_path):
    x, y, w, h = BOX
    studio = tmp_path / "studio"
    pictures(studio / "images", pattern="1a2b-{:03d}.png")
    value = {
        "x": 100 * x / WIDTH,
        "y": 100 * y / HEIGHT,
        "width": 100 * w / WIDTH,
        "height": 100 * h / HEIGHT,
        "rotation": 0,
    }
    tasks = []
    for k in range(N):
        result = {
            "type": "rectanglelabels",
            "original_width": WIDTH,
            "original_height": HEIGHT,
            "from_name": "label",
            "to_name": "image",
            "value": {**value, "rectanglelabels": [NAMES[k % 2]]},
        }
        old = {"result": [], "updated_at": "2026-01-01T00:00:00Z"}
        tasks.append(
            {
                "id": k,
                "data": {"image": f"/data/upload/1/1a2b-{k:03d}.png"},
                "predictions": [],
                "annotations": [{"result": [result], "updated_at": "2026-02-01T00:00:00Z"}, old],
            }
        )
    put(studio / "export.json", json.dumps(tasks))
    check_all_read(studio)
    tasks[0]["annotations"] = [{**tasks[0]["annotations"][0], "was_cancelled": True}]
    put(studio / "export.json", json.dumps(tasks))
    source = read(studio)
    assert tally(source) == ({"scratch": 3, "pit": 4}, {}, 0)  # a skipped task is unlabelled, not free of defects
    assert sum(i.label is None for i in source.items) == 1


def test_labelme_a_table_and_createml(tmp_path):
    x, y, w, h = BOX
    me = tmp_path / "labelme"
    pictures(me)
    for k in range(N):
        shape = {"label": NAMES[k % 2], "points": [[x, y], [x + w, y + h]], "shape_type": "rectangle"}
        sheet = {
            "shapes": [shape],
            "imagePath": f"{k:03d}.png",
            "imageWidth": WIDTH,
            "imageHeight": HEIGHT,
            "imageData": None,
        }
        put(me / f"{k:03d}.json", json.dumps(sheet))
    check_all_read(me)
    table = tmp_path / "csv"
    pictures(table / "train")
    lines = [f"{k:03d}.png,{WIDTH},{HEIGHT},{NAMES[k % 2]},{x},{y},{x + w},{y + h}" for k in range(N)]
    put(table / "train" / "_annotations.csv", "filename,width,height,class,xmin,ymin,xmax,ymax\n" + "\n".join(lines))
    check_all_read(table)
    ml = tmp_path / "createml"
    pictures(ml / "train")
    box = {"x": x + w / 2, "y": y + h / 2, "width": w, "height": h}
    rows = [{"image": f"{k:03d}.png", "annotations": [{"label": NAMES[k % 2], "coordinates": box}]} for k in range(N)]
    put(ml / "train" / "_annotations.createml.json", json.dumps(rows))
    check_all_read(ml)


# I: no parser error escapes


@pytest.mark.parametrize(
    "encoding", ["gb2312", "GBK", "gb18030", "big5", "Shift_JIS", "euc-jp", "euc-kr", "utf-8", "utf-16", "iso-8859-1"]
)
def test_encodings_that_xml_declares(encoding):
    word = {"big5": "劃痕", "Shift_JIS": "傷", "euc-jp": "傷", "euc-kr": "긁힘", "iso-8859-1": "Kratzer ü"}.get(
        encoding, "划痕"
    )
    text = f'<?xml version="1.0" encoding="{encoding}"?>\n<annotation><name>{word}</name></annotation>'
    assert parse_xml(text.encode(encoding)).findtext("name") == word


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<a>",
        b"\xff\xfe<",
        b'<?xml version="1.0" encoding="klingon"?><a/>',
        "<a>ü</a>".encode("latin-1"),
        b'<!DOCTYPE a [<!ENTITY x "y">]><a>&x;</a>',
        b"{}",
        b"<a>\x00</a>",
        b"<a></b>",
    ],
)
def test_xml_that_cannot_be_parsed_is_a_bad_file_with_a_reason(tmp_path, data):
    with pytest.raises(Unparsable):
        parse_xml(data)
    root = voc(tmp_path)
    put(root / "Annotations" / "000.xml", data)
    boxes, bad, clean = tally(read(root))
    assert boxes == {"scratch": 3, "pit": 4} and bad == {"label_unreadable": 1} and not clean


@pytest.mark.parametrize(
    "text",
    ["names:\n\t- scratch\n", "names: [a, b\n", "a: {{x}}\nnames: 1", "names: &x [*x]\nb: *c", "a: 1\n---\nnames: [b]"],
)
def test_yaml_that_cannot_be_parsed_is_one_sentence_with_file_and_line(tmp_path, text):
    with pytest.raises(DfssdError, match=r"line \d") as caught:
        read(yolo(tmp_path, HEAD + text))
    assert caught.value.where.endswith("data.yaml")


def test_yaml_in_another_encoding_is_said(tmp_path):
    root = yolo(tmp_path, None)
    put(root / "data.yaml", (HEAD + "names: [划痕, 凹坑]").encode("gbk"))
    with pytest.raises(DfssdError, match="line 4: the text is not encoded as UTF-8"):
        read(root)
    put(root / "data.yaml", (HEAD + "names: [划痕, 凹坑]").encode("utf-16"))
    assert read(root).names == ["划痕", "凹坑"]


@pytest.mark.parametrize(
    "text",
    ["%YAML:1.0\n---\ncamera: 1\n", "apiVersion: v1\nkind: {{ x }}\n", "channels: [conda]\n", "\t", "- a\n- b\n"],
)
def test_yaml_of_other_programs_is_passed_over(tmp_path, text):
    root = yolo(tmp_path)
    put(root / "camera.yml", text)
    check_all_read(root)
    assert parse_yaml(b"a: !!python/object/new:os.system [x]") == {"a": ["x"]}  # built into text, never into objects


@pytest.mark.parametrize(
    "sheet", [{"images": None, "annotations": None, "categories": None}, {"images": [], "categories": [None]}]
)
def test_null_fields_of_coco_are_no_traceback(tmp_path, sheet):
    with pytest.raises(DfssdError, match="no class names"):
        read(coco(tmp_path, sheet))
    content = coco_sheet()
    content["images"][0].update(width=None, height=None)
    content["images"].append({"id": 99, "file_name": None})
    content["annotations"].append(None)
    boxes, bad, _ = tally(read(coco(tmp_path / "b", content)))
    assert boxes == BOTH and bad == {"label_columns": 1}


def test_broken_json_is_counted_or_named_with_its_line(tmp_path):
    root = coco(tmp_path)
    put(root / "more.json", '{"images": [],\n "annotations": [,')
    assert tally(read(root))[:2] == (BOTH, {"label_unreadable": 1})
    (root / "annotations.json").unlink()
    with pytest.raises(DfssdError, match=r"more.json.*line 2"):
        read(root)


# J: one listing for all


def test_hidden_files_links_and_names(tmp_path, capsys):
    root = yolo(tmp_path / "set")
    for k in range(N):
        put(root / "images" / f"._{k:03d}.png", b"\x00\x05\x16\x07")
        put(root / "labels" / f"._{k:03d}.txt", b"\x00\x05\x16\x07")
    put(root / "__MACOSX" / "images" / "._000.png", b"")
    put(root / ".git" / "x.png", picture(3))
    put(root / "images" / "Thumbs.db", b"")
    check_all_read(root)
    (root / "images" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    put(root / "images" / "x.gif", b"GIF89a")
    put(tmp_path / "elsewhere" / "100.png", picture(100))
    (root / "images" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "images" / "loop").symlink_to(root, target_is_directory=True)
    (Path(os.fsdecode(os.fsencode(root / "images")) + "/" + os.fsdecode(b"\xb0\xbc.png"))).write_bytes(picture(5))
    source = read(root)
    boxes, bad, _ = tally(source)
    assert boxes == BOTH and bad == {"dangling_link": 1, "wrong_type": 1, "unreadable": 1}
    assert any("out of the data's folder" in note and "elsewhere" in note for note in source.notes)
    assert len(source.items) == N + 1
