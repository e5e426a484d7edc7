"""`dfssd predict`: what it writes, the watched folder, restarts, and what a user gets wrong."""

import csv
import json

import cv2
import numpy as np
import pytest

from dfssd.cli import run
from dfssd.errors import DfssdError
from dfssd.line import predict as line
from dfssd.line.results import LINES, Results


class Bright:
    """A detector for tests: one box round what is brighter than 200."""

    names = ["a", "bright"]  # noqa: RUF012
    metadata = {}  # noqa: RUF012

    def thresholds(self, score=None):
        return np.full(2, 0.5 if score is None else score, np.float32)

    def __call__(self, pictures, tau_c=None):
        found = []
        for picture in pictures:
            y, x = np.nonzero(picture[..., 0] > 200)
            rows = [[x.min(), y.min(), x.max() + 1, y.max() + 1, 0.9, 1]] if len(x) else []
            found.append(np.array(rows, np.float32).reshape(-1, 6))
        return found


def _picture(place, defect=True):
    image = np.full((40, 60, 3), 90, np.uint8)
    if defect:
        image[10:20, 30:45] = 255
    cv2.imwrite(str(place), image)
    return place


def test_files_of_a_labelling(tmp_path):
    (tmp_path / "in").mkdir()
    _picture(tmp_path / "in" / "bad.png")
    _picture(tmp_path / "in" / "good.png", defect=False)
    (tmp_path / "in" / "cut.png").write_bytes(b"\x89PNG")
    said = []
    labelling = line.Labelling(Bright(), tmp_path / "out", say=said.append)
    line.predict(labelling, line.find_pictures([str(tmp_path / "in")]))
    rows = list(csv.DictReader((tmp_path / "out" / "boxes.csv").open()))
    assert [(r["verdict"], r["name"]) for r in rows] == [("reject", "bright"), ("pass", "")]
    assert [float(rows[0][k]) for k in ("x1", "y1", "x2", "y2")] == [30, 10, 45, 20]
    found = json.loads((tmp_path / "out" / "coco.json").read_text())
    assert found["annotations"][0]["bbox"] == [30, 10, 15, 10] and found["annotations"][0]["category_id"] == 2
    assert len(found["images"]) == 2 and json.loads((tmp_path / "out" / "boxes.json").read_text())[1]["boxes"] == []
    assert (tmp_path / "out" / "drawn" / "in_bad.jpg").exists()
    assert (
        any("cut.png" in s for s in said)
        and "2 pictures, 1 rejected, 1 unreadable" in said[-1]
        and "pictures/s" in said[-1]
    )


def test_coco_output_opens_in_a_coco_reader(tmp_path):
    faster = pytest.importorskip("faster_coco_eval")
    results = Results(tmp_path, ["a"])
    results.add(tmp_path / "x.png", "1", (60, 40), np.array([[1, 2, 11, 12, 0.7, 0]], np.float32))
    places = results.finish()
    assert faster.COCO(str(places[2])).getAnnIds() == [1]


def test_a_watched_folder_and_a_restart(tmp_path):
    folder = tmp_path / "line"
    folder.mkdir()
    _picture(folder / "1.png")
    (folder / "half.png").write_bytes((folder / "1.png").read_bytes()[:60])
    (folder / "note.txt").write_text("no picture")
    said = []
    first = line.Labelling(Bright(), tmp_path / "out", drawn=False, say=said.append)
    line.watch(first, folder, poll_s=0.0, rounds=6)
    assert first.pictures == 1 and (folder / "unreadable" / "half.png").exists() and (folder / "note.txt").exists()
    with (tmp_path / "out" / LINES).open("a") as stream:  # killed in the middle of a line
        stream.write('{"file": "cut')
    _picture(folder / "2.png", defect=False)
    second = line.Labelling(Bright(), tmp_path / "out", drawn=False, say=said.append)
    line.watch(second, folder, poll_s=0.0, rounds=3)
    assert second.pictures == 1  # the first one is not labelled again
    assert [one["verdict"] for one in second.results.lines()] == ["reject", "pass"]
    _picture(folder / "1.png", defect=False)  # another picture under the same name
    third = line.Labelling(Bright(), tmp_path / "out", drawn=False, say=said.append)
    line.watch(third, folder, poll_s=0.0, rounds=3)
    assert third.pictures == 1 and [one["verdict"] for one in third.results.lines()] == ["pass", "pass"]


def test_deep_pictures_are_read_with_the_white_level_of_the_model(tmp_path):
    """12 bits in a 16-bit file: without it a defect of value 4000 would be as dark as 15 of 255, and pass."""
    image = np.full((40, 60), 1400, np.uint16)
    image[10:20, 30:45] = 4000
    cv2.imwrite(str(tmp_path / "x.png"), image)
    for metadata, verdict in (({"white": 4095.0}, "reject"), ({}, "pass")):
        detector = Bright()
        detector.metadata = metadata
        labelling = line.Labelling(detector, tmp_path / verdict, drawn=False, say=lambda text: None)
        assert labelling.label(tmp_path / "x.png")
        assert [one["verdict"] for one in labelling.results.lines()] == [verdict]


def test_a_file_that_still_grows_is_left_alone(tmp_path, monkeypatch):
    folder = tmp_path / "line"
    folder.mkdir()
    whole = _picture(tmp_path / "whole.png").read_bytes()
    labelling = line.Labelling(Bright(), tmp_path / "out", drawn=False, say=lambda text: None)
    sizes = iter([*range(10, len(whole), max(1, len(whole) // 8)), len(whole)])

    def grow(_):
        size = next(sizes, None)
        if size is not None:
            (folder / "x.png").write_bytes(whole[:size])

    monkeypatch.setattr(line.time, "sleep", grow)
    line.watch(labelling, folder, poll_s=1.0, rounds=16)
    assert labelling.pictures == 1 and not (folder / "unreadable").exists()


def test_user_errors_end_with_2(tmp_path, capsys):
    _picture(tmp_path / "x.png")
    for words, said in (
        (["no.onnx", str(tmp_path / "x.png")], "no such model"),
        (["no.onnx", str(tmp_path / "y.png")], "no such picture"),
        (["no.onnx"], "--watch"),
        (["no.onnx", str(tmp_path / "x.png"), "--score", "3"], "--score 3.0: must be from 0 to 1"),
    ):
        with pytest.raises(SystemExit) as error:
            run("predict", words)
        assert error.value.code == 2 and said in capsys.readouterr().err
    with pytest.raises(DfssdError, match="there is no picture"):
        (tmp_path / "empty").mkdir()
        line.find_pictures([str(tmp_path / "empty")])
