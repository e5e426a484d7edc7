"""`dfssd predict`: what it writes, the watched folder, restarts, and what a user gets wrong."""

import csv
import json
import threading
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from dfssd.cli import run
from dfssd.errors import DfssdError
from dfssd.line import predict as line
from dfssd.line.drawing import drawn
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
    assert len(list((tmp_path / "out" / "drawn").glob("in_bad_*.jpg"))) == 1
    assert (
        any("cut.png" in s for s in said)
        and "2 pictures, 1 rejected, 1 unreadable" in said[-1]
        and "pictures/s" in said[-1]
    )


def test_a_second_run_replaces_the_lines_of_the_same_pictures(tmp_path):
    """Twice into one folder: a line a picture, what is new in it; other pictures' lines stay, and it is said."""
    (tmp_path / "in").mkdir()
    for name in ("1.png", "2.png"):
        _picture(tmp_path / "in" / name)
    _picture(tmp_path / "other.png", defect=False)

    def label(*places):
        said = []
        line.predict(
            line.Labelling(Bright(), tmp_path / "out", draw=False, say=said.append), line.find_pictures(places)
        )
        return said[-1], [json.loads(t) for t in (tmp_path / "out" / LINES).read_text().splitlines()]

    pictures = str(tmp_path / "in")
    assert "earlier" not in label(pictures)[0]
    _picture(tmp_path / "in" / "2.png", defect=False)
    said, lines = label(pictures)
    assert [(one["file"][-5:], one["verdict"]) for one in lines] == [("1.png", "reject"), ("2.png", "pass")]
    assert "earlier" not in said and "2 pictures, 1 rejected" in said
    assert len(list(csv.DictReader((tmp_path / "out" / "boxes.csv").open()))) == 2
    said, lines = label(str(tmp_path / "other.png"))
    assert "with 2 pictures of earlier runs" in said and len(lines) == 3
    with (tmp_path / "out" / LINES).open("a") as stream:  # a run that was killed before its end leaves two
        stream.write(json.dumps({**lines[0], "verdict": "pass", "boxes": []}) + "\n")
    again = Results(tmp_path / "out", ["a", "bright"])
    assert len((tmp_path / "out" / LINES).read_text().splitlines()) == 3 and next(again.lines())["verdict"] == "pass"


def test_what_was_drawn_before_is_no_picture(tmp_path, monkeypatch):
    """`dfssd predict MODEL .` twice: its results lie below the folder that it reads."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "drawn").mkdir()
    pictures = [_picture(tmp_path / place) for place in ("x.png", "drawn/y.png")]
    for place in (".", str(tmp_path), f"../{tmp_path.name}"):
        line.predict(line.Labelling(Bright(), line.Path("predictions"), say=lambda text: None), pictures)
        found = line.find_pictures([place], line.Path("predictions"))
        assert sorted(p.name for p in found) == ["x.png", "y.png"], place


def test_another_model_into_the_same_folder(tmp_path):
    """Lines say which model found what; classes that only the earlier one knew are no crash at the end."""
    first = Results(tmp_path, ["crack"], "1" * 12)
    first.add(tmp_path / "x.png", "1", (60, 40), np.array([[1, 2, 11, 12, 0.7, 0]], np.float32))
    second = Results(tmp_path, ["pit"], "2" * 12)
    second.add(tmp_path / "y.png", "1", (60, 40), np.array([[1, 2, 11, 12, 0.7, 0]], np.float32))
    found = json.loads(second.finish()[2].read_text())
    assert [c["name"] for c in found["categories"]] == ["pit", "crack"]
    assert [a["category_id"] for a in found["annotations"]] == [2, 1]
    assert [one["model"][0] for one in second.lines()] == ["1", "2"]


def test_small_pictures_are_drawn_so_large_that_one_can_read_them(tmp_path):
    for place in ("a/x.png", "b/a/x.png", "a/x.jpg"):  # three files whose folder and name are called the same
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        _picture(tmp_path / place)
    labelling = line.Labelling(Bright(), tmp_path / "out", say=lambda text: None)
    line.predict(labelling, line.find_pictures([str(tmp_path / "a"), str(tmp_path / "b")]))
    pictures = [cv2.imread(str(p)) for p in (tmp_path / "out" / "drawn").iterdir()]
    assert len(pictures) == 3 and {p.shape for p in pictures} == {(440, 660, 3)}
    coloured = np.ptp(pictures[0].astype(int), 2) > 60
    rows, columns = np.nonzero(coloured)
    assert rows.min() < 10 * 11 - 15 and abs(columns.min() - 30 * 11) < 4, "a label stands above the box"
    assert drawn(np.zeros((700, 20, 3), np.uint8), np.zeros((0, 6)), []).shape == (700, 20, 3)
    wide = drawn(np.zeros((20, 20, 3), np.uint8), np.array([[18, 0, 20, 20, 0.5, 0]]), ["a_class_of_a_long_name"])
    assert (wide[:, 450:570].min(2) > 200).any(), "a label that begins at the right edge is moved into the picture"


def test_every_picture_has_a_drawing_of_its_own_and_the_same_again(tmp_path):
    """Two runs, and a restart, know nothing of each other's pictures: a name follows from the path alone."""
    for place in ("m/pics/x.png", "t/pics/x.png", "m/pics/x.jpg"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        _picture(tmp_path / place)
        for _ in range(2):
            assert line.Labelling(Bright(), tmp_path / "out", say=lambda text: None).label(tmp_path / place)
    drawings = [p.name for p in (tmp_path / "out" / "drawn").iterdir()]
    assert len(drawings) == 3 and all(name.startswith("pics_x_") for name in drawings)


def test_a_second_run_into_the_folder_of_a_watcher_loses_no_line(tmp_path, monkeypatch):
    """It takes out a line that a newer one has replaced, while the watcher appends the next picture's."""
    watcher, boxes, waiting = Results(tmp_path, ["a"]), np.zeros((0, 6)), []
    for stamp in "12":
        watcher.add(tmp_path / "0.png", stamp, (1, 1), boxes)
    read = Results._newest

    def read_and_then(own):
        found = read(own)
        if not waiting:
            waiting.append(threading.Thread(target=watcher.add, args=(tmp_path / "new.png", "1", (1, 1), boxes)))
            waiting[0].start()
            waiting[0].join(0.2)
        return found

    monkeypatch.setattr(Results, "_newest", read_and_then)
    other = Results(tmp_path, ["a"])
    waiting[0].join()
    lines = [json.loads(text) for text in (tmp_path / LINES).read_text().splitlines()]
    assert [(one["file"][-5:], one["stamp"]) for one in lines] == [("0.png", "2"), ("w.png", "1")]
    assert len(list(other.lines())) == 2


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
    first = line.Labelling(Bright(), tmp_path / "out", draw=False, say=said.append)
    line.watch(first, folder, poll_s=0.0, rounds=6)
    assert first.pictures == 1 and (folder / "unreadable" / "half.png").exists() and (folder / "note.txt").exists()
    with (tmp_path / "out" / LINES).open("a") as stream:  # killed in the middle of a line
        stream.write('{"file": "cut')
    _picture(folder / "2.png", defect=False)
    second = line.Labelling(Bright(), tmp_path / "out", draw=False, say=said.append)
    line.watch(second, folder, poll_s=0.0, rounds=3)
    assert second.pictures == 1  # the first one is not labelled again
    assert [one["verdict"] for one in second.results.lines()] == ["reject", "pass"]
    _picture(folder / "1.png", defect=False)  # another picture under the same name
    third = line.Labelling(Bright(), tmp_path / "out", draw=False, say=said.append)
    line.watch(third, folder, poll_s=0.0, rounds=3)
    assert third.pictures == 1 and [one["verdict"] for one in third.results.lines()] == ["pass", "pass"]


@pytest.mark.parametrize("damage", [b'{"file": "cut\n', b"\x00\x00\xff\n", b"[1]\n", b'{"file": "x.png"}\n'])
def test_a_damaged_line_stops_no_watcher(tmp_path, damage):
    """A power cut, or a line that another process has written behind an unfinished one: its picture is labelled again."""
    (tmp_path / "in").mkdir()
    for name in "123":
        _picture(tmp_path / "in" / f"{name}.png")

    def watched():
        labelling = line.Labelling(Bright(), tmp_path / "out", draw=False, say=said.append)
        line.watch(labelling, tmp_path / "in", poll_s=0.0, rounds=2)
        return labelling.pictures

    said = []
    assert watched() == 3
    file = tmp_path / "out" / LINES
    first, _, last = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + damage + last)
    assert watched() == 1 and any("1 line(s) of " in text for text in said)
    assert len(file.read_text().splitlines()) == 3 == len(json.loads((tmp_path / "out" / "boxes.json").read_text()))
    said.clear()
    assert watched() == 0 and not any("line(s)" in text for text in said)


def test_deep_pictures_are_read_with_the_white_level_of_the_model(tmp_path):
    """12 bits in a 16-bit file: without it a defect of value 4000 would be as dark as 15 of 255, and pass."""
    image = np.full((40, 60), 1400, np.uint16)
    image[10:20, 30:45] = 4000
    cv2.imwrite(str(tmp_path / "x.png"), image)
    for metadata, verdict in (({"white": 4095.0}, "reject"), ({}, "pass")):
        detector = Bright()
        detector.metadata = metadata
        labelling = line.Labelling(detector, tmp_path / verdict, draw=False, say=lambda text: None)
        assert labelling.label(tmp_path / "x.png")
        assert [one["verdict"] for one in labelling.results.lines()] == [verdict]


def test_a_file_that_still_grows_is_left_alone(tmp_path, monkeypatch):
    folder = tmp_path / "line"
    folder.mkdir()
    whole = _picture(tmp_path / "whole.png").read_bytes()
    labelling = line.Labelling(Bright(), tmp_path / "out", draw=False, say=lambda text: None)
    sizes = iter([*range(10, len(whole), max(1, len(whole) // 8)), len(whole)])

    def grow(_):
        size = next(sizes, None)
        if size is not None:
            (folder / "x.png").write_bytes(whole[:size])

    own = SimpleNamespace(sleep=grow, monotonic=time.monotonic, perf_counter=time.perf_counter)
    monkeypatch.setattr(line, "time", own)  # not that of other threads
    line.watch(labelling, folder, poll_s=1.0, rounds=16)
    assert labelling.pictures == 1 and not (folder / "unreadable").exists()


def test_a_picture_that_is_taken_away_before_it_is_put_aside_ends_nothing(tmp_path):
    said = []
    labelling = line.Labelling(Bright(), tmp_path / "out", draw=False, say=said.append)
    line._aside(labelling, tmp_path / "gone.png", tmp_path)
    assert labelling.bad == 0 and not said


def test_user_errors_end_with_2(tmp_path, capsys):
    _picture(tmp_path / "x.png")
    for words, said in (
        (["no.onnx", str(tmp_path / "x.png")], "no such model"),
        (["no.onnx", str(tmp_path / "y.png")], "no such picture"),
        (["no.onnx"], "--watch"),
        (["no.onnx", str(tmp_path / "x.png"), "--score", "3"], "--score 3.0: must be from 0 to 1"),
        (["no.onnx", str(tmp_path / "x.png"), "--poll-s", "1"], "--poll-s has no effect without --watch"),
    ):
        with pytest.raises(SystemExit) as error:
            run("predict", words)
        assert error.value.code == 2 and said in capsys.readouterr().err
    for out in (tmp_path / "x.png", tmp_path / "x.png" / "below"):
        with pytest.raises(DfssdError, match="results cannot be written there"):
            Results(out, ["a"])
    with pytest.raises(DfssdError, match="there is no picture"):
        (tmp_path / "empty").mkdir()
        line.find_pictures([str(tmp_path / "empty")])
