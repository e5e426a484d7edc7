"""What programs' exports hold beside the labels that were asked for, and names as other systems spell them."""

import base64
import csv
import io
import json
import unicodedata
import zipfile
import zlib

import cv2
import numpy as np
import pytest
from layouts import BOTH, BOX, HEIGHT, NAMES, WIDTH, N, coco_sheet, picture, pictures, put, tally, texts, voc_xml, yolo

from dfssd.data.formats.read import read_source
from dfssd.data.formats.unpack import resolve_zip
from dfssd.errors import DfssdError
from dfssd.runtime.storage import Storage

COMPOSED, APART = (unicodedata.normalize(form, "Prüfung Größe {:03d}") for form in ("NFC", "NFD"))
LISTED = "path: .\ntrain: train.txt\nval: train.txt\nnames: [scratch, pit]\n"


def studio_shape(k):
    x, y, w, h = BOX
    percent = {"x": 100 * x / WIDTH, "y": 100 * y / HEIGHT, "width": 100 * w / WIDTH, "height": 100 * h / HEIGHT}
    return {
        **percent,
        "rotation": 0,
        "rectanglelabels": [NAMES[k % 2]],
        "original_width": WIDTH,
        "original_height": HEIGHT,
    }


def studio_tasks(address, key="image"):
    tasks = []
    for k in range(N):
        shape = studio_shape(k)
        size = {key: shape.pop(key) for key in ("original_width", "original_height")}
        result = {**size, "type": "rectanglelabels", "from_name": "label", "to_name": "image", "value": shape}
        tasks.append(
            {"id": k, "data": {"note": "front", key: address.format(k)}, "annotations": [{"result": [result]}]}
        )
    return json.dumps(tasks)


def studio_csv(tag="label"):
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["annotation_id", "annotator", "id", "image", tag, "note"])
    for k in range(N):
        writer.writerow([k, "anna", k, f"/data/upload/1/{k:08x}-{k:03d}.png", json.dumps([studio_shape(k)]), "[seen]"])
    return text.getvalue()


def tensorflow_csv(delimiter=","):
    x, y, w, h = (int(v) for v in BOX)
    head = "filename,width,height,class,xmin,ymin,xmax,ymax\n"
    lines = [f"{k:03d}.png,{WIDTH},{HEIGHT},{NAMES[k % 2]},{x},{y},{x + w},{y + h}\n" for k in range(N)]
    return (head + "".join(lines)).replace(",", delimiter)


def mask(k):
    return bytes(cv2.imencode(".png", np.eye(HEIGHT, WIDTH, k, np.uint8) * 255)[1])


def names_apart_in_coco(root):
    pictures(root / "images", pattern=APART + ".png")
    put(root / "a.json", json.dumps(coco_sheet(pattern=COMPOSED + ".png"), ensure_ascii=False))


def names_apart_in_labels(root):
    pictures(root / "images", pattern=APART + ".png")
    texts(root / "labels", pattern=COMPOSED + ".txt")
    put(root / "classes.txt", "scratch\npit\n")


def names_apart_in_a_list(root):
    pictures(root / "images", pattern=APART + ".png")
    texts(root / "labels", pattern=APART + ".txt")
    put(root / "data.yaml", LISTED)
    put(root / "train.txt", "".join(f"./images/{COMPOSED.format(k)}.png\n" for k in range(N)))


def percent_in_coco(root):
    pictures(root / "images", pattern="p {:03d}#1.png")
    put(root / "a.json", json.dumps(coco_sheet(pattern="p%20{:03d}%231.png")))


def captions_and_keypoints_beside_instances(root):
    """The annotations of COCO 2017 as they are downloaded."""
    pictures(root / "train2017", pattern="{:012d}.jpg")
    sheet = coco_sheet(pattern="{:012d}.jpg")
    notes = [{"id": k, "image_id": k + 1, "caption": "a scratch"} for k in range(N)]
    put(root / "annotations" / "instances_train2017.json", json.dumps(sheet))
    put(root / "annotations" / "captions_train2017.json", json.dumps({"images": sheet["images"], "annotations": notes}))
    pits = [{**a, "keypoints": [1, 1, 2]} for a in sheet["annotations"] if a["category_id"] == 2]
    put(root / "annotations" / "person_keypoints_train2017.json", json.dumps({**sheet, "annotations": pits}))


def masks_of_voc(root):
    """VOC 2012: jpg pictures, and png masks of the same names."""
    for k in range(N):
        put(root / "VOC2012" / "JPEGImages" / f"{k:03d}.jpg", picture(k, ".jpg"))
        put(root / "VOC2012" / "Annotations" / f"{k:03d}.xml", voc_xml(k).replace(".png", ".jpg"))
        for folder in ("SegmentationClass", "SegmentationObject"):
            put(root / "VOC2012" / folder / f"{k:03d}.png", mask(k))


def masks_beside_images(root):
    yolo(root, None)
    put(root / "classes.txt", "scratch\npit\n")
    for k in range(N):
        put(root / "masks" / f"{k:03d}_mask.png", mask(k))


def uploads_of_label_studio(root):
    pictures(root)
    put(root / "export.json", studio_tasks("/data/upload/1/0a1b2c3d-{:03d}.png"))


def another_variable_of_label_studio(root):
    pictures(root)
    put(root / "export.json", studio_tasks("s3://bucket/line/{:03d}.png", "scan"))


def another_control_of_label_studio(root):
    """JSON-MIN has the shapes under the name of the control."""
    pictures(root)
    entries = [
        {"scan": f"/data/upload/1/{k:03d}.png", "annotation_id": k, "defect": [studio_shape(k)]} for k in range(N)
    ]
    put(root / "min.json", json.dumps(entries))


def table_of_label_studio(root):
    pictures(root)
    put(root / "export.csv", studio_csv())


def table_of_label_studio_with_another_control(root):
    pictures(root)
    put(root / "export.csv", studio_csv("defect"))


def table_of_excel(root):
    pictures(root)
    put(root / "labels.csv", b"\xef\xbb\xbf" + tensorflow_csv(";").encode())


def project_of_supervisely(root):
    """A rectangle, a polygon, a packed mask by turns; two datasets with pictures of the same names."""
    x, y, w, h = (int(v) for v in BOX)
    ring = [[x, y], [x + w, y], [x + w, y + h], [x, y + h]]
    bitmap = cv2.imencode(".png", np.full((h, w), 255, np.uint8))[1].tobytes()
    packed = {"origin": [x, y], "data": base64.b64encode(zlib.compress(bitmap)).decode()}
    put(root / "meta.json", json.dumps({"classes": [{"title": n} for n in NAMES], "tags": []}))
    for k in range(N):
        kind = ("rectangle", "polygon", "bitmap")[k % 3]
        own = {"bitmap": packed} if kind == "bitmap" else {"points": {"exterior": ring[:: 2 if k % 3 == 0 else 1]}}
        place, name = root / f"ds{k % 2}", f"{k // 2:03d}.png"
        put(place / "img" / name, picture(k))
        size = {"height": HEIGHT, "width": WIDTH}
        line = {"classTitle": "line", "geometryType": "line", "points": {"exterior": ring[:2], "interior": []}}
        objects = [{"classTitle": NAMES[k % 2], "geometryType": kind, **own}, line]
        put(place / "ann" / f"{name}.json", json.dumps({"tags": [], "size": size, "objects": objects}))


def via_pictures(more=False):
    """Rectangle, polygon, circle-like shapes by turns; the class in an attribute of some name, or as a checkbox."""
    x, y, w, h = (int(v) for v in BOX)
    found = {}
    for k in range(N):
        corners = {"all_points_x": [x, x + w, x + w, x], "all_points_y": [y, y, y + h, y + h]}
        ellipse = {"cx": x + w / 2, "cy": y + h / 2, "rx": h / 2, "ry": w / 2, "theta": np.pi / 2}
        shape = ({"x": x, "y": y, "width": w, "height": h}, corners, ellipse)[k % 3]
        about = {"note": "deep", "type": {NAMES[k % 2]: True}} if more else {"kind of fault": NAMES[k % 2]}
        region = {
            "shape_attributes": {"name": ("rect", "polygon", "ellipse")[k % 3], **shape},
            "region_attributes": about,
        }
        regions = {"0": region} if more and k % 2 else [region]
        found[f"{k:03d}.png123"] = {"filename": f"{k:03d}.png", "size": 123, "regions": regions, "file_attributes": {}}
    return found


def export_of_via(root):
    pictures(root)
    put(root / "via_region_data.json", json.dumps(via_pictures()))


def project_of_via(root):
    pictures(root / "images")
    put(root / "via_project.json", json.dumps({"_via_settings": {}, "_via_img_metadata": via_pictures(more=True)}))


def table_of_via(root):
    pictures(root)
    text = io.StringIO()
    writer = csv.writer(text)
    parts = ("shape_attributes", "region_attributes")
    writer.writerow(["#filename", "file_size", "region_count", "region_id", "region_shape_attributes", parts[1]])
    for one in via_pictures().values():
        writer.writerow([one["filename"], 123, 1, 0, *(json.dumps(one["regions"][0][part]) for part in parts)])
    put(root / "via_region_data.csv", text.getvalue())


def corners_with_a_comma(root):
    pictures(root / "images")
    for k in range(N):
        put(root / "annotations" / f"{k:03d}.xml", voc_xml(k).replace("<xmin>20.0", "<xmin>20,0"))


def masks_beside_pictures(root):
    """Kolektor's way, and somebody has drawn boxes since."""
    yolo(root)
    put(root / "classes.txt", "scratch\npit\n")
    for k in range(N):
        put(root / "images" / f"{k:03d}_label.bmp", picture(40 + k, ".bmp"))


@pytest.mark.parametrize(
    "make",
    [
        names_apart_in_coco,
        names_apart_in_labels,
        names_apart_in_a_list,
        percent_in_coco,
        captions_and_keypoints_beside_instances,
        masks_of_voc,
        masks_beside_images,
        uploads_of_label_studio,
        another_variable_of_label_studio,
        another_control_of_label_studio,
        table_of_label_studio,
        table_of_label_studio_with_another_control,
        table_of_excel,
        project_of_supervisely,
        export_of_via,
        project_of_via,
        table_of_via,
        corners_with_a_comma,
        masks_beside_pictures,
    ],
    ids=lambda make: make.__name__,
)
def test_every_picture_has_its_box_and_nothing_else_is_a_picture(tmp_path, make):
    make(tmp_path)
    source = read_source(str(tmp_path), "auto", ())
    assert (*tally(source), len(source.items)) == (BOTH, {}, 0, N)


@pytest.mark.parametrize("kind", ["yolo", "coco"])
def test_a_picture_that_is_called_like_a_mask_and_has_a_label_is_a_picture(tmp_path, kind):
    """The front label of a bottle beside its front."""
    pictures(tmp_path / "images")
    put(tmp_path / "images" / "000_label.png", picture(50))
    if kind == "yolo":
        yolo(tmp_path)
        put(tmp_path / "classes.txt", "scratch\npit\n")
        put(tmp_path / "labels" / "000_label.txt", "1 0.5 0.5 0.2 0.2\n")
    else:
        sheet = coco_sheet()
        sheet["images"].append({**sheet["images"][0], "id": 99, "file_name": "000_label.png"})
        sheet["annotations"].append({**sheet["annotations"][0], "id": 99, "image_id": 99})
        put(tmp_path / "a.json", json.dumps(sheet))
    source = read_source(str(tmp_path), "auto", ())
    assert len(source.items) == N + 1 and not source.bad and all(i.label is not None for i in source.items)
    assert not [n for n in source.notes if "masks" in n]


@pytest.mark.parametrize("make", [project_of_supervisely, export_of_via, project_of_via, table_of_via])
def test_a_picture_that_nobody_has_touched_is_not_free_of_defects(tmp_path, make):
    make(tmp_path)
    if make is project_of_supervisely:
        path = tmp_path / "ds0" / "ann" / "000.png.json"
        put(path, json.dumps({**json.loads(path.read_text()), "objects": []}))
    elif make is table_of_via:
        path = tmp_path / "via_region_data.csv"
        lines = path.read_text().splitlines()
        put(path, "\n".join([lines[0], "000.png,123,0,0,{},{}", *lines[2:]]))
    else:
        path = next(tmp_path.glob("via_*.json"))
        content = json.loads(path.read_text())
        found = content.get("_via_img_metadata", content)
        found["000.png123"]["regions"] = {} if make is project_of_via else []
        put(path, json.dumps(content))
    source = read_source(str(tmp_path), "auto", ())
    assert len(source.items) == N and not source.bad
    assert [i.uri.rpartition("/")[2] for i in source.items if i.label is None] == ["000.png"]
    assert any("1 pictures have no shape" in n for n in source.notes)


def test_regions_of_via_that_are_a_number_are_a_bad_label_with_a_reason(tmp_path):
    pictures(tmp_path)
    found = via_pictures()
    found["000.png123"]["regions"] = 5
    put(tmp_path / "via.json", json.dumps(found))
    (bad,) = read_source(str(tmp_path), "auto", ()).bad or [
        next(
            (i.uri, i.label.problem)
            for i in read_source(str(tmp_path), "auto", ()).items
            if i.label and i.label.problem
        )
    ]
    assert bad[1].reason == "label_unreadable"


def test_a_comma_that_may_part_thousands_is_no_decimal_comma(tmp_path):
    pictures(tmp_path / "images")
    for k in range(N):
        put(tmp_path / "annotations" / f"{k:03d}.xml", voc_xml(k).replace("<xmin>20.0", "<xmin>1,234"))
    with pytest.raises(DfssdError, match="could not convert string to float: '1,234'"):
        read_source(str(tmp_path), "auto", ())


def test_masks_are_counted_and_said(tmp_path):
    masks_of_voc(tmp_path)
    assert any(
        f"{2 * N} masks of other pictures are left out" in n for n in read_source(str(tmp_path), "auto", ()).notes
    )


def test_a_folder_called_masks_whose_pictures_have_no_partner_holds_pictures(tmp_path):
    yolo(tmp_path, None)
    put(tmp_path / "classes.txt", "scratch\npit\n")
    pictures(tmp_path / "masks", range(20, 24))
    assert len(read_source(str(tmp_path), "auto", ()).items) == N + 4


@pytest.mark.parametrize("notes", [None, []])
def test_images_of_a_coco_file_without_any_annotation_are_unlabelled(tmp_path, notes):
    """As COCO's image_info_test2017.json, or an export of a task that nobody has begun: they are not free of defects."""
    pictures(tmp_path / "train")
    pictures(tmp_path / "test", range(20, 24))
    put(tmp_path / "annotations" / "instances_train.json", json.dumps(coco_sheet()))
    sheet = {**coco_sheet(range(20, 24)), "annotations": notes}
    put(
        tmp_path / "annotations" / "image_info_test.json", json.dumps({k: v for k, v in sheet.items() if v is not None})
    )
    source = read_source(str(tmp_path), "auto", ())
    assert tally(source) == (BOTH, {}, 0) and sum(i.label is None for i in source.items) == 4
    assert any("lists 4 images and holds no annotation: they are unlabelled" in n for n in source.notes)


def test_one_label_file_for_two_pictures_names_both(tmp_path):
    yolo(tmp_path)
    put(tmp_path / "images" / "003.jpg", picture(77, ".jpg"))
    with pytest.raises(DfssdError, match=r"003\.jpg.*003\.png"):
        read_source(str(tmp_path), "auto", ())


@pytest.mark.parametrize("name", ["set.tar.gz", "train.tfrecord", "inner.zip"])
def test_archives_of_other_kinds_are_named(tmp_path, name):
    put(tmp_path / "d" / name, b"x")
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.write(tmp_path / "d" / name, name)
    data = resolve_zip(str(tmp_path / "outer.zip"), Storage(str(tmp_path / "run")))
    with pytest.raises(DfssdError, match=f"{name}' is of a kind that is not unpacked"):
        read_source(data, "auto", ())


def test_where_no_label_can_be_read_the_first_one_is_named_not_the_missing_classes(tmp_path):
    pictures(tmp_path / "images")
    for k in range(N):
        put(tmp_path / "annotations" / f"{k:03d}.xml", voc_xml(k).replace("<xmin>20.0", "<xmin>20;5"))
    with pytest.raises(DfssdError, match=r"no label could be read: 8 cannot be used.*000\.png.*'20;5'"):
        read_source(str(tmp_path), "auto", ())


def test_labels_in_two_formats_are_an_error_where_one_says_nothing_about_pictures_of_the_other(tmp_path):
    pictures(tmp_path / "images")
    put(tmp_path / "classes.txt", "scratch\npit\n")
    texts(tmp_path / "labels", range(4))
    for k in range(4, N):
        put(tmp_path / "annotations" / f"{k:03d}.xml", voc_xml(k))
    with pytest.raises(DfssdError, match=r"two formats: 4 pictures that have no label as voc have a \.txt file"):
        read_source(str(tmp_path), "auto", ())
    source = read_source(str(tmp_path), "yolo", ())
    assert any("4 pictures that have no label as yolo have a .xml file" in note for note in source.notes)
    texts(tmp_path / "labels")
    for k in range(4):
        put(tmp_path / "annotations" / f"{k:03d}.xml", voc_xml(k))
    assert tally(read_source(str(tmp_path), "auto", ())) == (BOTH, {}, 0)  # the same said twice


def test_what_lies_one_step_away_is_named(tmp_path):
    root = yolo(tmp_path / "set", None)
    put(root / "classes.txt", "scratch\npit\n")
    with pytest.raises(DfssdError) as caught:
        read_source(str(root / "images"), "auto", ())
    assert f"the folder above, '{root}'" in caught.value.todo
    pictures(tmp_path / "task")
    put(tmp_path / "task" / "annotations.zip", b"x")
    with pytest.raises(DfssdError) as caught:
        read_source(str(tmp_path / "task"), "auto", ())
    assert "annotations.zip" in caught.value.todo


def test_label_files_that_keep_the_ending_of_the_picture(tmp_path):
    pictures(tmp_path / "y")
    texts(tmp_path / "y", pattern="{:03d}.png.txt")
    put(tmp_path / "y" / "classes.txt", "scratch\npit\n")
    pictures(tmp_path / "v" / "images")
    for k in range(N):
        put(tmp_path / "v" / "annotations" / f"{k:03d}.png.xml", voc_xml(k))
    for folder in ("y", "v"):
        assert tally(read_source(str(tmp_path / folder), "auto", ())) == (BOTH, {}, 0)


def test_attributes_of_via_none_of_which_is_called_as_a_class_are_named(tmp_path):
    pictures(tmp_path)
    found = via_pictures()
    found["000.png123"]["regions"][0]["region_attributes"]["depth"] = "3"
    put(tmp_path / "via.json", json.dumps(found))
    with pytest.raises(DfssdError, match="several attributes \\('kind of fault', 'depth'\\)"):
        read_source(str(tmp_path), "auto", ())


FOREIGN = {  # file -> content, and what the error says
    "COCO results": ("r.json", [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.9}]),
    "COCO captions": ("c.json", {"images": [], "annotations": [{"image_id": 1, "caption": "a strip"}]}),
    "VoTT": ("p.json", {"tags": [{"name": "pit"}], "assets": {"a": {"asset": {}, "regions": []}}}),
    "Scalabel": ("l.json", [{"name": "000.png", "labels": [{"category": "pit", "box2d": {"x1": 1}}]}]),
    "Datumaro": ("d.json", {"info": {}, "categories": {}, "items": [{"id": "000"}]}),
    "JSON by lines": ("e.ndjson", {"data_row": {}}),
    "EncodedPixels": ("train.csv", "ImageId,ClassId,EncodedPixels\n000.png,1,29 12 30 4\n"),
    "Open Images": ("b.csv", "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax\n0,x,/m/0,1,0,1,0,1\n"),
    r"columns \(image_id, label, x_min": ("t.csv", "image_id,label,x_min,y_min,x_max,y_max\n000.png,pit,1,2,3,4\n"),
    "without a line of column names": ("a.csv", "images/000.png,1,2,30,40,pit\nimages/001.png,1,2,30,40,pit\n"),
    "corners in px": ("x_not/000.txt", "20 10 52 34 1\n"),
}


@pytest.mark.parametrize("said", FOREIGN)
def test_formats_that_are_not_read_are_named_with_a_way_out(tmp_path, said):
    name, content = FOREIGN[said]
    pictures(tmp_path / "images")
    put(tmp_path / name, content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DfssdError, match=f"the data looks like .*{said}") as caught:
        read_source(str(tmp_path), "auto", ())
    assert name in caught.value.where and caught.value.todo


def test_masks_and_folders_of_classes_are_named_where_there_is_no_box(tmp_path):
    for place, mask in (("mvtec", "ground_truth/broken/{:03d}_mask.png"), ("kolektor", "good/{:03d}_label.png")):
        pictures(tmp_path / place / "good")
        for k in range(2):
            put(tmp_path / place / mask.format(k), picture(20 + k))
        with pytest.raises(DfssdError, match=r"looks like pictures with masks .*not read"):
            read_source(str(tmp_path / place), "auto", ())
    for split in ("train", "test"):
        pictures(tmp_path / "split" / split)
        for c in NAMES:
            pictures(tmp_path / "classes" / split / c, range(2))
    with pytest.raises(DfssdError, match=r"a set for classification .*'pit', 'scratch'"):
        read_source(str(tmp_path / "classes"), "auto", ())
    with pytest.raises(DfssdError, match=r"there are no labels: all \d+ files are pictures"):
        read_source(str(tmp_path / "split"), "auto", ())
    put(tmp_path / "split" / "notes.dat", "1 2 3")
    with pytest.raises(DfssdError, match="was not recognised"):
        read_source(str(tmp_path / "split"), "auto", ())
