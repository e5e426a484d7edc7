"""Kinds of trouble found by making data sets as today's exporters write them, and reading them cold."""

import json
import zipfile

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
)

from dfssd.config import Data
from dfssd.data.checks import Checked, ImageFacts, Label, check_label
from dfssd.data.formats.class_names import spelt_alike
from dfssd.data.formats.source import Item
from dfssd.data.formats.unpack import resolve_zip
from dfssd.data.formats.yolo import is_cr7
from dfssd.data.images import BadImage, to_uint8, top_value, white_level
from dfssd.data.preparation.assignment import choose_labelled
from dfssd.data.preparation.checking import judge, set_white_levels
from dfssd.errors import DfssdError
from dfssd.runtime.storage import Storage

X, Y, W, H = BOX
PERCENT = {"x": 100 * X / WIDTH, "y": 100 * Y / HEIGHT, "width": 100 * W / WIDTH, "height": 100 * H / HEIGHT}


def stored_names(root):
    """Label Studio writes labels of local storage under the picture's address: `?d=` and folders as %5C."""
    pictures(root / "images")
    texts(root / "labels", range(4), "?d={:03d}.txt")
    texts(root / "labels", range(4, N), "?d=line%5C{:03d}.txt")
    put(root / "classes.txt", "scratch\npit\n")


def addresses_in_coco(root):
    """LVIS names pictures by their address."""
    sheet = coco_sheet()
    for image in sheet["images"]:
        image["coco_url"] = "http://images.org/train2017/" + image.pop("file_name")
    coco(root, sheet)


def annotations_by_id_in_coco(root):
    sheet = coco_sheet()
    coco(root, {**sheet, "annotations": {str(a["id"]): a for a in sheet["annotations"]}})


def folders_of_another_machine(root):
    yolo(root, "path: /content/drive/steel\ntrain: /content/drive/steel/images\nval: /content/drive/steel/images\n"
         "names: [scratch, pit]\n")  # fmt: skip


def own_image_and_label(root):
    """The folders of CR7-DET, and none of its pictures."""
    pictures(root / "image")
    texts(root / "label")
    put(root / "classes.txt", "scratch\npit\n")


def classes_of_a_count_in_a_list(root):
    yolo(root, "train: images\nval: images\nnc: 2\n")
    put(root / "classes.txt", "scratch\npit\n")


def deleted_objects(root):
    """LabelMe 3.0, as CVAT writes it, keeps what a person took away."""
    voc(root)
    ring = "<polygon><pt><x>1</x><y>1</y></pt><pt><x>9</x><y>9</y></pt></polygon>"
    gone = f"<object><name>pit</name><deleted>1</deleted>{ring}</object>"
    for path in (root / "Annotations").iterdir():
        put(path, path.read_text().replace("</annotation>", gone + "</annotation>"))


def studio(root, results, **changes):
    pictures(root / "images")
    size = {"original_width": WIDTH, "original_height": HEIGHT, "to_name": "image"}
    tasks = []
    for k in range(N):
        done = {"result": [{**size, **r} for r in results(k)], "created_at": "2026-02-01"}
        tasks.append({"id": k, "data": {"image": f"s3://b/{k:03d}.png"}, "annotations": [done], **changes})
    put(root / "export.json", json.dumps(tasks))
    return tasks


def rectangles_and_labels_apart(root):
    studio(root, lambda k: [
        {"id": "a", "type": "rectangle", "value": PERCENT},
        {"id": "a", "type": "labels", "value": {**PERCENT, "labels": [NAMES[k % 2]]}},
    ])  # fmt: skip


def two_pictures_a_task(root):
    """Front and back; results say which picture they are about by the name of its variable."""
    pictures(root)
    tasks = []
    for k in range(0, N, 2):
        size = {"original_width": WIDTH, "original_height": HEIGHT, "type": "rectanglelabels"}
        sides = (("front", "scratch"), ("back", "pit"))
        results = [{**size, "to_name": s, "value": {**PERCENT, "rectanglelabels": [c]}} for s, c in sides]
        data = {"front": f"s3://b/{k:03d}.png", "back": f"s3://b/{k + 1:03d}.png"}
        tasks.append({"data": data, "annotations": [{"result": results}]})
    put(root / "export.json", json.dumps(tasks))


def folders_in_the_path_of_voc(root):
    """LabelImg's <folder> is `images`, and its <path> tells two pictures of one name apart."""
    for k in range(N):
        put(root / "images" / f"cam{k % 2}" / f"{k // 2}.png", picture(k))
        path = f"<path>C:\\work\\images\\cam{k % 2}\\{k // 2}.png</path><size>"
        sheet = voc_xml(k).replace(f"{k:03d}.png", f"{k // 2}.png").replace("<size>", path)
        put(root / "xml" / f"sheet_{k}.xml", sheet)


def pictures_in_a_bin(root):
    yolo(root, None)
    put(root / "classes.txt", "scratch\npit\n")
    pictures(root / "#recycle" / "images", range(20, 22))


@pytest.mark.parametrize(
    "make",
    [
        stored_names, addresses_in_coco, annotations_by_id_in_coco, folders_of_another_machine, own_image_and_label,
        classes_of_a_count_in_a_list, deleted_objects, rectangles_and_labels_apart, pictures_in_a_bin,
        two_pictures_a_task, folders_in_the_path_of_voc,
    ],
    ids=lambda make: make.__name__,
)  # fmt: skip
def test_each_picture_has_its_box(tmp_path, make):
    make(tmp_path)
    source = read(tmp_path)
    assert (*tally(source), len(source.items)) == (BOTH, {}, 0, N)
    assert all(i.label is not None and len(i.label.boxes) == 1 for i in source.items)


def test_folders_called_as_those_of_cr7_det_do_not_give_its_classes(tmp_path):
    own_image_and_label(tmp_path)
    (tmp_path / "classes.txt").unlink()
    assert tally(read(tmp_path, NAMES))[0] == BOTH
    with pytest.raises(DfssdError, match="no class names"):
        read(tmp_path)
    assert is_cr7(["dents_1", "oil spots_2", "pits (3)", "x"]) and not is_cr7(["linear_1", "linear_2", "pits_1"])


def test_names_stand_in_for_the_numbers_of_a_count_alone(tmp_path):
    yolo(tmp_path, "train: images\nval: images\nnc: 2\n")
    assert tally(read(tmp_path, NAMES))[0] == BOTH
    with pytest.raises(DfssdError, match=r"3 names are given .*2 classes \(nc: 2\)"):
        read(tmp_path, (*NAMES, "dent"))


def points_of_cvat(root):
    shape = '<points label="pit" points="20,10"/>'
    box = f'<box label="{{}}" xtl="{X}" ytl="{Y}" xbr="{X + W}" ybr="{Y + H}"/>'
    pictures(root)
    body = "".join(
        f'<image name="{k:03d}.png" width="{WIDTH}" height="{HEIGHT}">{shape if k == 1 else box.format(NAMES[k % 2])}</image>'
        for k in range(N)
    )
    put(root / "a.xml", f"<annotations>{body}</annotations>")


def lines_of_labelme(root):
    pictures(root)
    for k in range(N):
        shape = {"label": NAMES[k % 2], "points": [[X, Y], [X + W, Y + H]]}
        shape["shape_type"] = "linestrip" if k == 1 else "rectangle"
        put(root / f"{k:03d}.json", json.dumps({"shapes": [shape], "imagePath": f"{k:03d}.png"}))


def keypoints_of_label_studio(root):
    box = {"type": "rectanglelabels", "value": {**PERCENT, "rectanglelabels": ["scratch"]}}
    point = {"type": "keypointlabels", "value": {"x": 1, "y": 1, "keypointlabels": ["pit"]}}
    pit = {**box, "value": {**PERCENT, "rectanglelabels": ["pit"]}}
    studio(root, lambda k: [point if k == 1 else (box, pit)[k % 2]])


@pytest.mark.parametrize("make", [points_of_cvat, lines_of_labelme, keypoints_of_label_studio])
def test_a_picture_with_nothing_but_points_or_lines_is_not_free_of_defects(tmp_path, make):
    make(tmp_path)
    source = read(tmp_path)
    assert tally(source) == ({"scratch": 4, "pit": 3}, {}, 0)
    assert [i.name for i in source.items if i.label is None] == ["001.png"]
    assert source.counts["only_other_shapes"] == source.counts["other_shapes"] == 1


def test_several_annotations_of_a_task_are_counted(tmp_path):
    box = {"type": "rectanglelabels", "value": {**PERCENT, "rectanglelabels": ["pit"]}}
    tasks = studio(tmp_path, lambda k: [box])
    tasks[0]["annotations"].append({"result": [], "created_at": "2026-01-01"})
    tasks[1]["annotations"].append({"result": [], "created_at": "2026-03-01", "was_cancelled": True})
    put(tmp_path / "export.json", json.dumps(tasks))
    source = read(tmp_path)
    assert source.counts["opinions"] == 1 and tally(source)[0] == {"pit": N}


def test_a_task_with_several_pictures_that_are_not_spelt_alike_is_no_label(tmp_path):
    two_pictures_a_task(tmp_path)
    path = tmp_path / "export.json"
    put(path, path.read_text().replace('"to_name": "front"', '"to_name": "img-1"'))
    with pytest.raises(DfssdError, match="a task with several pictures"):
        read(tmp_path)


def test_a_further_file_name_in_a_task_is_no_second_picture(tmp_path):
    """Tasks of this program hold `image` and `file`."""
    box = {"type": "rectanglelabels", "to_name": "image", "value": {**PERCENT, "rectanglelabels": ["pit"]}}
    tasks = studio(tmp_path, lambda k: [box])
    for task in tasks:
        task["data"]["file"] = "000.png"
    put(tmp_path / "export.json", json.dumps(tasks))
    source = read(tmp_path)
    assert tally(source) == ({"pit": N}, {}, 0) and not source.counts["joined"]


def test_a_bare_line_of_a_table_is_a_picture_without_a_box(tmp_path):
    pictures(tmp_path)
    x, y, w, h = (int(v) for v in BOX)
    lines = [f"{k:03d}.png,{WIDTH},{HEIGHT},pit,{x},{y},{x + w},{y + h}\n" for k in range(N - 1)]
    put(
        tmp_path / "a.csv",
        "".join(["filename,width,height,class,xmin,ymin,xmax,ymax\n", *lines, f"007.png,{WIDTH},{HEIGHT},,,,,\n"]),
    )
    assert tally(read(tmp_path)) == ({"pit": N - 1}, {}, 1)


def test_two_parts_that_say_the_same_are_not_one(tmp_path):
    for part in ("v1", "v2"):
        yolo(tmp_path / part)
    with pytest.raises(DfssdError, match="two files describe the data"):
        read(tmp_path)


def test_boxes_that_stand_twice_are_counted():
    line = [0, 0.5, 0.5, 0.2, 0.2]
    seen = judge(Item("a", Label(np.array([line, line, [1, *line[1:]]]))), ImageFacts("0", 64, 48, None), 2, Data())
    assert isinstance(seen, Checked) and (len(seen.boxes), seen.repeated) == (2, 1)


@pytest.mark.parametrize("size", [(64, 48), None])
def test_shares_where_px_are_meant_are_no_boxes_of_a_pixel(size):
    shares = Label(np.array([[0, 0.5, 0.5, 0.2, 0.2], [0, 0.5, 0.5, 1, 1]]), True, size)
    assert check_label(shares, 64, 48, 1).reason == "label_units"
    assert len(check_label(Label(np.array([[0, 0.5, 1.5, 1, 1.0]]), True, size), 64, 48, 1)) == 1


def test_a_label_of_the_unturned_picture_says_so():
    problem = check_label(Label(np.array([[0, 30, 20, 8, 8.0]]), True, (64, 48)), 48, 64, 1)
    assert problem.reason == "label_size_mismatch" and "EXIF" in problem.detail


CLASS_FAULTS = {  # what the error says -> how the data set is made
    "category id 1 stands for two names: 'scratch' and 'pit'": lambda root: coco(
        root, {**coco_sheet(), "categories": [{"id": 1, "name": "scratch"}, {"id": 1, "name": "pit"}]}
    ),
    "'classes = 3' and 2 names": lambda root: (
        yolo(root, None), put(root / "obj.names", "scratch\npit\n"),
        put(root / "obj.data", "classes = 3\nnames = obj.names\n"),
    ),
    "numbers before the names": lambda root: (yolo(root, None), put(root / "classes.txt", "0 scratch\n1: pit\n")),
}  # fmt: skip


@pytest.mark.parametrize("said", CLASS_FAULTS)
def test_classes_that_cannot_be_meant(tmp_path, said):
    CLASS_FAULTS[said](tmp_path)
    with pytest.raises(DfssdError, match=said):
        read(tmp_path)


def test_names_that_differ_in_case_alone_are_said():
    assert spelt_alike(["oil spot", "pit", "Oil_Spot", "dent"]) == [
        "classes 'oil spot' and 'Oil_Spot' differ in case and marks alone: two classes, or one in two spellings?"
    ]
    assert spelt_alike(["scratch", "+", "-", "划痕", "划 痕2"]) == []


SPLITS = {"Train": range(4), "Validation": range(4, 6), "Test": range(6, N)}


def subsets_of_cvat_yolo(root):
    put(root / "obj.names", "scratch\npit\n")
    lists = "".join(f"{s} = data/{s}.txt\n" for s in SPLITS)
    put(root / "obj.data", f"classes = 2\n{lists}names = data/obj.names\nbackup = backup/\n")
    for s, ks in SPLITS.items():
        pictures(root / f"obj_{s}_data", ks)
        texts(root / f"obj_{s}_data", ks)
        put(root / f"{s}.txt", "".join(f"data/obj_{s}_data/{k:03d}.png\n" for k in ks))


def subsets_of_cvat_images(root):
    pictures(root)
    box = f'<box label="{{}}" xtl="{X}" ytl="{Y}" xbr="{X + W}" ybr="{Y + H}"/>'
    body = "".join(
        f'<image name="{k:03d}.png" subset="{s}" width="{WIDTH}" height="{HEIGHT}">{box.format(NAMES[k % 2])}</image>'
        for s, ks in SPLITS.items() for k in ks
    )  # fmt: skip
    put(root / "a.xml", f"<annotations>{body}</annotations>")


def words_in_coco_files(root):
    pictures(root / "images")
    for s, ks in SPLITS.items():
        put(root / f"{s.lower()}_annotations.json", json.dumps(coco_sheet(ks)))


def lists_of_voc2012(root):
    """Other tasks than detection list fewer pictures."""
    voc(root)
    for s, name in zip(SPLITS, ("train", "val", "test"), strict=True):
        put(root / "ImageSets" / "Main" / f"{name}.txt", "".join(f"{k:03d}\n" for k in SPLITS[s]))
    put(root / "ImageSets" / "Segmentation" / "train.txt", "005\n")
    put(root / "ImageSets" / "Action" / "val.txt", "000\n")


@pytest.mark.parametrize("make", [subsets_of_cvat_yolo, subsets_of_cvat_images, words_in_coco_files, lists_of_voc2012])
def test_given_splits_are_found(tmp_path, make):
    make(tmp_path)
    source = read(tmp_path)
    assert [i.split for i in sorted(source.items, key=lambda i: i.name)] == ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    assert (tally(source), source.twice, source.notes) == ((BOTH, {}, 0), [], [])


def test_lists_of_voc_that_share_pictures_or_lead_nowhere_say_so(tmp_path):
    lists_of_voc2012(tmp_path)
    put(tmp_path / "ImageSets" / "Main" / "val.txt", "003\n004\n005\n090\n")
    source = read(tmp_path)
    assert [(path[-7:], both) for path, both in source.twice] == [("003.png", "train and val")]
    assert any("1 lines of" in note and "'090'" in note for note in source.notes)


@pytest.mark.parametrize("line", ["lot 1/{}", '"lot 1/{}" 1', "lot 1/{}.png", "{} -1"])
def test_lines_of_voc_lists_with_blanks_quotes_and_marks(tmp_path, line):
    pictures(tmp_path / "JPEGImages" / "lot 1")
    for k in range(N):
        put(tmp_path / "Annotations" / "lot 1" / f"{k:03d}.xml", voc_xml(k))
    put(tmp_path / "ImageSets" / "Main" / "Train.txt", "".join(line.format(f"{k:03d}") + "\n" for k in range(N)))
    source = read(tmp_path)
    assert {i.split for i in source.items} == {"train"} and not source.notes


def test_labels_without_pictures_and_a_locked_zip_say_so(tmp_path):
    put(tmp_path / "a" / "instances_default.json", json.dumps(coco_sheet()))
    with pytest.raises(DfssdError, match=r"no image files found, but 1 files that may be labels.*instances_default"):
        read(tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", picture(0))
    locked = (tmp_path / "x.zip").read_bytes()
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flag of both headers
        at = locked.index(mark) + place
        locked = locked[:at] + b"\x01" + locked[at + 1 :]
    with pytest.raises(DfssdError, match="cannot be unpacked: it is encrypted"):
        resolve_zip(str(put(tmp_path / "x.zip", locked)), Storage(str(tmp_path / "run")))


def broken(root, name, content):
    pictures(root / "images")
    put(root / name, content if isinstance(content, str) else json.dumps(content))


CREATEML = [
    {
        "image": "000.png",
        "annotations": [{"label": "pit", "coordinates": {"x": 28, "y": 16, "width": 16, "height": 12}}],
    }
]
TASK = {"id": 1, "data": {"image": "000.png"}}
TRACK = '<track label="pit"><box frame="x" xtl="1" ytl="1" xbr="9" ybr="9"/></track>'
IMAGE = '<image name="000.png" width="wide"/>'
STRANGE = {
    "a null entry": ("a.json", [*CREATEML, None], "label_unreadable"),
    "ids in the place of annotations": ("a.json", [{**TASK, "annotations": [7]}], "label_unreadable"),
    "a task without data": ("a.json", [{**TASK, "annotations": []}, {"id": 2, "data": None}], "label_unreadable"),
    "a frame that is a word": ("a.xml", f"<annotations>{TRACK}</annotations>", "label_without_image"),
    "a width that is a word": ("a.xml", f"<annotations>{IMAGE}</annotations>", "label_unreadable"),
    "a size that is infinite": ("000.xml", voc_xml(0).replace("<width>64", "<width>inf"), "label_unreadable"),
}  # fmt: skip


@pytest.mark.parametrize("kind", STRANGE)
def test_what_no_program_should_write_is_a_bad_label_with_a_reason(tmp_path, kind):
    name, content, reason = STRANGE[kind]
    broken(tmp_path, name, content)
    try:
        assert tally(read(tmp_path))[1] == {reason: 1}
    except DfssdError as error:
        assert reason in str(error) or "no class names" in str(error)


def test_frames_of_a_video_without_a_shape_are_unlabelled_and_said(tmp_path):
    """CVAT writes no more of a frame than its shapes, so nobody can tell a clean one from one that nobody looked at."""
    pictures(tmp_path / "images", range(3), "frame_{:06d}.png")
    track = TRACK.replace('frame="x"', 'frame="1"')
    put(tmp_path / "annotations.xml", f"<annotations>{track}</annotations>")
    source = read(tmp_path)
    assert [item.label is None for item in sorted(source.items, key=lambda i: i.uri)] == [True, False, True]
    assert any(note.startswith("2 pictures have no shape in what cvat wrote") for note in source.notes)


PIT = {"label": "pit", "points": [[20, 10], [36, 22]]}
HUGE = {"shapes": [PIT], "imagePath": "000.png"}
BEYOND = {
    "a side of 400 digits": ("000.json", {**HUGE, "imageWidth": 10**400, "imageHeight": 48}, "size_mismatch"),
    "a box of 400 digits": ("a.json", coco_sheet([0], bbox=[1, 1, 10**400, 5]), "label_nan"),
    "half a letter in a name": ("a.json", [{**CREATEML[0], "image": "\ud800.png"}], "without_image"),
    "half a letter in a class": ("000.json", {**HUGE, "shapes": [{**PIT, "label": "p\ud800"}]}, "no line of text"),
    "two lines in a class": ("000.json", {**HUGE, "shapes": [{**PIT, "label": "p\nit"}]}, "no line of text"),
    "the home of nobody": ("data.yaml", "train: ~nobody-here/images\nnames: [pit]\n", "leads nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BEYOND)
def test_numbers_and_letters_beyond_what_a_machine_holds(tmp_path, kind):
    """Found by putting odd values into every place of each format."""
    name, content, said = BEYOND[kind]
    broken(tmp_path, name, content)
    try:
        assert any(said in reason for reason in tally(read(tmp_path))[1])
    except DfssdError as error:
        assert said in str(error)


@pytest.mark.parametrize("text", ['["remember the milk",', '["milk"]', '{"categories": [1]}'])
def test_notes_of_a_person_are_no_class_list(tmp_path, text):
    put(yolo(tmp_path, None) / "notes.json", text)
    with pytest.raises(DfssdError, match="no class names"):
        read(tmp_path)


def test_a_segmentation_without_sense_is_a_bad_label(tmp_path):
    for k, shape in enumerate(
        ([5, [1, 2]], {"counts": ["x"], "size": [48, 64]}, {"counts": [1, 2], "size": [None, 4]}, {"a": 1})
    ):
        sheet = coco_sheet(bbox=None, segmentation=shape)
        assert tally(read(coco(tmp_path / str(k), sheet))) == ({}, {"label_columns": N}, 0)


FOREIGN = {
    "FiftyOne's own JSON": ("labels.json", {"classes": ["pit"], "labels": {"000": [{"label": 0}]}}),
    "FiftyOne's own data set": ("samples.json", {"samples": [{"filepath": "data/000.png"}]}),
    "dicts of Detectron2": ("t.json", [{"file_name": "a.png", "annotations": [{"bbox": [1, 2, 3, 4], "bbox_mode": 0}]}]),
    "SageMaker": ("output.manifest", {"source-ref": "s3://b/000.png"}),
    "KITTI": ("label_2/000.txt", "pit 0.0 0 0.0 20.00 10.00 36.00 22.00 0 0 0 0 0 0 0\n"),
    "VoTT": ("0-asset.json", {"asset": {"name": "000.png"}, "regions": []}),
    "Darwin": ("000.json", {"item": {"name": "000.png"}, "annotations": []}),
    "SuperAnnotate": ("000.png.json", {"metadata": {"name": "000.png"}, "instances": []}),
    "makesense.ai": ("labels.csv", "pit,20,10,16,12,000.png,64,48\npit,20,10,16,12,001.png,64,48\n"),
    "MOT": ("gt/gt.txt", "1,1,20,10,16,12,1,1,1.0\n"),
    "keras-yolo3": ("train/_annotations.txt", "000.png 20,10,36,22,1 1,2,9,9,0\n001.png\n"),
}  # fmt: skip


@pytest.mark.parametrize("said", FOREIGN)
def test_further_formats_that_are_not_read_are_named(tmp_path, said):
    broken(tmp_path, *FOREIGN[said])
    with pytest.raises(DfssdError, match=f"the data looks like .*{said}"):
        read(tmp_path)


def test_a_hot_pixel_does_not_hide_that_the_camera_has_12_bits(tmp_path):
    tops = [4000.0, 4090.0, 4012.0, 65535.0]
    found = [Checked(str(k), ImageFacts(f"{k}" * 16, 64, 48, None, True, top), None, "") for k, top in enumerate(tops)]
    assert "--white-level 4095 keeps 16 times as many" in set_white_levels(found, Data())[1][0]
    assert "hot" not in set_white_levels(found[:3], Data())[1][0]
    assert "hot" not in set_white_levels(found, Data(white_level=4095))[1][0]


@pytest.mark.parametrize(
    ("top", "white"), [(0.3, 1), (1.0, 1), (1.004, 1), (2.0, 2), (20.0, 20), (200.0, 255), (258.0, 255), (4000.0, 4095)]
)
def test_white_of_float_pictures(top, white):
    assert white_level(top, True) == white


def test_what_resampling_leaves_below_black_is_black():
    assert top_value(np.array([[-0.002, 1.004]], np.float32)) == np.float32(1.004)
    assert to_uint8(np.array([[-0.002, 1.004]], np.float32), 1.0)[0, :, 0].tolist() == [0, 255]
    with pytest.raises(BadImage, match="negative"):
        top_value(np.array([[-0.5, 1.0]], np.float32))


def test_lines_of_a_list_have_folders_and_are_counted_where_they_name_nothing(tmp_path):
    def train(name):
        return Checked(f"/d/{name}", ImageFacts(name.rjust(16, "_"), 64, 48, None), np.zeros((0, 5), np.float32), "")

    images = [train(n) for n in ("cam1/0.png", "cam2/0.png", "cam1/1.png", "x.png")]
    put(tmp_path / "list.txt", "cam1\\0.png\r\nx.png\r\nnobody.png\r\n")
    config = Data(labelled_list=str(tmp_path / "list.txt"))
    chosen, why = choose_labelled(images, ["train"] * 4, config, 0, 2)
    assert chosen == {images[0].image_id, images[3].image_id}
    assert why == "--labelled-list; 1 of its lines name no labelled train image, such as 'nobody.png'"


def test_what_this_program_wrote_into_the_data_is_no_data(tmp_path):
    """`--data . --storage-path runs`: the second `prepare` finds the first one's pictures."""
    yolo(tmp_path, None)
    put(tmp_path / "classes.txt", "scratch\npit\n")
    pictures(tmp_path / "line3" / "suggest", range(20, 22))
    put(tmp_path / "line3" / "dataset" / "stage.json", "{}")
    pictures(tmp_path / "runs" / "line4" / "report", range(22, 24))
    put(tmp_path / "runs" / "mlflow.db", "")
    pictures(tmp_path / "mlartifacts" / "1", range(24, 26))
    source = read(tmp_path)
    assert (*tally(source), len(source.items)) == (BOTH, {}, 0, N)
    assert any("2 runs of this program" in note and "line3" in note for note in source.notes)
