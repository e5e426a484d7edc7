"""The audit finds what was planted, proposes what would help, and is one file without a reference outside of itself."""

import re
import shutil
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from dfssd.config import Data
from dfssd.data.manifest import Row, read_manifest, read_withheld
from dfssd.data.preparation.prepare import prepare
from dfssd.report import audit
from dfssd.report.audit_page import write_audit
from dfssd.runtime.storage import Storage


def _row(k=0, width=2048, height=1024, split="train"):
    return Row(f"id{k}", f"/x/{k}.png", width, height, split, True, k, None)


def _boxes(*rows):
    return np.array(rows, np.float32).reshape(-1, 5)


def test_sizes_at_the_training_resolution_and_what_to_do_about_them():
    """A 30 px defect of a 2048 px picture is 9 px at 640."""
    labels = [(_row(k), _boxes([0, 0.5, 0.5, 30 / 2048, 40 / 1024])) for k in range(20)]
    (size,) = audit.class_sizes(labels, ["pit"], 640)
    assert size.low == pytest.approx(30 * 640 / 2048) and size.original_low == pytest.approx(30) and size.small == 1
    said = audit.proposal([size], labels, 640)
    assert "30 px in the image, 9 px in training" in said and "--imgsz 1120" in said  # 16 px at 1092, a multiple of 32
    tiny = [(_row(k, 8192), _boxes([0, 0.5, 0.5, 20 / 8192, 30 / 1024])) for k in range(20)]
    assert "tiles of 800 px" in audit.proposal(audit.class_sizes(tiny, ["pit"], 640), tiny, 640)
    large = [(_row(k), _boxes([0, 0.5, 0.5, 0.2, 0.2])) for k in range(20)]
    assert audit.proposal(audit.class_sizes(large, ["pit"], 640), large, 640) == ""


def test_planted_slips_are_found_and_good_boxes_are_not():
    rng = np.random.default_rng(0)
    good = [(_row(k), _boxes([k % 2, *rng.uniform(0.3, 0.7, 2), *rng.uniform(0.1, 0.2, 2)])) for k in range(60)]
    assert audit.suspects(good, ["a", "b"], 640) == []
    slips = {
        "px at the training": [0, 0.5, 0.5, 0.001, 0.1],
        "as large as": [0, 0.5, 0.5, 1, 1],
        "times as long": [0, 0.5, 0.5, 0.9, 0.02],
        "far from those": [0, 0.5, 0.5, 0.02, 0.04],
    }
    for k, (why, box) in enumerate(slips.items()):
        (found,) = audit.suspects([*good, (_row(100 + k), _boxes(box))], ["a", "b"], 640)
        assert why in found.why and found.row.image_id == f"id{100 + k}"
    for c, why in ((0, "nearly the same"), (1, "also labelled 'b'")):
        twice = _boxes([0, 0.5, 0.5, 0.15, 0.15], [c, 0.501, 0.5, 0.15, 0.15])
        (found,) = audit.suspects([*good, (_row(200), twice)], ["a", "b"], 640)
        assert why in found.why


def test_near_duplicates_with_other_labels_whatever_their_mirroring():
    a = _boxes([0, 0.3, 0.4, 0.1, 0.1], [1, 0.7, 0.2, 0.2, 0.1])
    mirrored = a.copy()
    mirrored[:, 1] = 1 - mirrored[:, 1]
    labels = [(_row(0), a), (_row(1), mirrored), (_row(2), a[:1]), (_row(3), a[::-1] * [1, 1, 1, 1.1, 1])]
    found = audit.contradictions(labels, [("id0", "id1"), ("id0", "id2"), ("id1", "id3"), ("id0", "unlabelled")])
    assert [(c.a.image_id, c.b.image_id, c.differing) for c in found] == [("id0", "id2", 1)]


class _Outside(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.found += [v for k, v in attributes if k in ("src", "href") and not v.startswith(("data:", "#"))]
        if tag not in ("meta", "img", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag == "rect" or self.open.pop() == tag


def test_the_page_is_one_file_and_says_what_matters(strip, tmp_path):
    data = tmp_path / "d"
    shutil.copytree(strip, data)
    first = sorted((data / "images").glob("*.png"))[0]
    cv2.imwrite(str(data / "images" / "twin.png"), cv2.imread(str(first), 0)[:, ::-1])
    (data / "labels" / "twin.txt").write_text("0 .5 .5 .9 .01\n")
    text = (data / "data.yaml").read_text().replace("patch", "<patch> & {{ 7 * 7 }}")
    (data / "data.yaml").write_text(text)
    store = Storage(str(tmp_path / "o"))
    summary = prepare(Data(data=str(data), label_fraction=0.5), 0, store)
    write_audit(store, summary, 640)
    page = store.read("audit.html").decode()
    parser = _Outside()
    parser.feed(page)
    assert parser.found == [] and parser.open == []
    assert "&lt;patch&gt; &amp; {{ 7 * 7 }}" in page and "<patch>" not in page
    assert "twin.png" in page and "times as long as wide" in page
    assert re.search(r"are hidden \(--label-fraction 0.5\)", page) and page.count("data:image/jpeg") >= 3
    labels = audit.labels_of(read_manifest(store), read_withheld(store))
    assert len(labels) == 61 and sum(n for _, n in audit.clean_images(labels).values()) == 61
