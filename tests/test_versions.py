"""Corrected labels count: the data set follows the content of labels, says what has changed, and grows in versions."""

import json
import shutil
import zipfile

import cv2
import numpy as np
import pytest
from layouts import BOTH, N, pictures, put, tally, voc, yolo, yolo_line

from dfssd.config import Config, Data, Run
from dfssd.data.formats.read import read_source
from dfssd.data.formats.source import unlabelled_items
from dfssd.data.formats.unpack import resolve_zip
from dfssd.data.manifest import read_manifest
from dfssd.data.preparation.prepare import prepare
from dfssd.data.preparation.versions import as_previous, changes, content_digest, keep_version
from dfssd.errors import DfssdError
from dfssd.pipeline import data as data_stage
from dfssd.pipeline.context import Context
from dfssd.pipeline.run import run_stage
from dfssd.pipeline.stages import make_stage
from dfssd.runtime.artefact_names import DATASET
from dfssd.runtime.storage import Storage


def _digest(folder, **settings):
    config = Data(data=str(folder), **settings)
    return content_digest(read_source(config.data, "auto", ()), unlabelled_items(config)[0])


def test_content_counts_and_not_the_path(tmp_path):
    root = yolo(tmp_path / "a")
    first = _digest(root)
    shutil.copytree(root, tmp_path / "b")
    assert _digest(tmp_path / "b") == first
    line = (root / "labels" / "000.txt").read_text()
    for text in (line + line.replace("0.25", "0.125"), line.replace("0 ", "1 ", 1), "", "0 .1 .2"):
        put(root / "labels" / "000.txt", text)
        assert _digest(root) != first
    put(root / "labels" / "000.txt", line.rstrip() + "\r\n\n")  # the same boxes in other bytes
    assert _digest(root) == first
    pictures(root / "images", [50])
    assert _digest(root) != first
    assert _digest(tmp_path / "b", unlabelled=(str(pictures(tmp_path / "c", [60])[0].parent),)) != first


@pytest.fixture
def stage_of(strip, tmp_path):
    """A copy of a data set, and a function that runs its dataset stage."""
    shutil.copytree(strip, tmp_path / "data")

    def run(**data):
        run = Run(storage_path=str(tmp_path / "runs"), run_name="r")
        data_stage._read.cache_clear()  # of another command
        context = Context(Config(run=run, data=Data(**{"data": str(tmp_path / "data"), **data})))
        run_stage(context, DATASET)
        return context.run.at("dataset")

    return tmp_path / "data", run


def test_the_same_command_after_a_correction_says_what_changed_and_update_keeps_splits(stage_of, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:/nonexistent")  # this test is about the artefact
    data, run = stage_of
    store = run(label_fraction=1.0)
    before = read_manifest(store)
    run(label_fraction=1.0)
    assert "skipped" in capsys.readouterr().out
    train = next(r for r in before.of_split("train") if len(r.boxes))
    name = train.uri.rsplit("/", 1)[1].replace(".png", ".txt")
    (data / "labels" / name).write_text("0 .5 .5 .25 .25\n1 .3 .3 .1 .1\n")
    shutil.copy(
        data / "images" / "strip_00000.png", data / "images" / "copy.png"
    )  # byte for byte: no new image in the end
    rng = np.random.default_rng(5)
    for k in range(6):
        cv2.imwrite(str(data / "images" / f"new{k}.png"), rng.integers(0, 255, (64, 64), np.uint8))
        (data / "labels" / f"new{k}.txt").write_text("0 .5 .5 .25 .25\n")
    Storage(str(data.parent / "runs" / "r")).write_json("teacher/stage.json", {"digest": "x"})
    with pytest.raises(DfssdError, match="1 images have other boxes") as caught:
        run(label_fraction=1.0)
    said = str(caught.value)
    assert name.replace(".txt", ".png") in said and "7 images are new" in said and "made again: teacher" in said
    assert "--update" in caught.value.todo and read_manifest(store).meta["version"] == 1
    with pytest.raises(DfssdError, match="label_fraction"):  # another setting is another thing
        run(label_fraction=0.5)
    run(label_fraction=1.0, update=True)
    after = read_manifest(store)
    assert after.meta["version"] == 2
    splits = {r.image_id: r.split for r in after.rows}
    assert all(splits[r.image_id] == r.split for r in before.rows)
    assert len(after.rows) == len(before.rows) + 6
    corrected = next(r for r in after.rows if r.image_id == train.image_id)
    assert len(corrected.boxes) == 2 and corrected.labelled
    assert as_previous(store.at("versions", "1"), 1).rows[train.image_id].boxes is not None
    run(label_fraction=1.0, update=True)
    assert "skipped" in capsys.readouterr().out


def test_an_image_that_was_trained_on_is_never_measured_on_later(tmp_path):
    """300 labelled and 500 unlabelled images: all labels are used; those labelled later join the train split."""
    root = yolo(tmp_path / "d", None)
    put(root / "classes.txt", "scratch\npit\n")
    pictures(root / "images", range(N, 60))
    for k in range(N, 30):
        put(root / "labels" / f"{k:03d}.txt", yolo_line(k))
    store = Storage(str(tmp_path / "o"))
    summary = prepare(Data(data=str(root)), 0, store)
    first = read_manifest(store)
    assert summary["labelled_images"] == summary["splits"]["train"]["images"] > 20
    assert not any("hidden" in note for note in summary["notes"])
    keep_version(store)
    for k in range(30, 60):
        put(root / "labels" / f"{k:03d}.txt", yolo_line(k))
    summary = prepare(Data(data=str(root)), 0, store)
    second = {r.image_id: r for r in read_manifest(store).rows}
    for row in first.rows:
        if row.split == "unlabelled-only":
            assert second[row.image_id].split == "train" and second[row.image_id].labelled
        else:
            assert second[row.image_id].split == row.split
    assert not any("hidden" in note for note in summary["notes"])  # nothing was hidden before, nothing is now
    assert any("nothing to pseudo-label" in note for note in summary["notes"])


def test_hiding_is_said_with_its_reason(strip, tmp_path):
    for settings, reason in (
        ({"label_fraction": 0.3}, "--label-fraction 0.3"),
        ({"labels_per_class": 2}, "--labels-per-class"),
    ):
        summary = prepare(Data(data=str(strip), **settings), 0, Storage(str(tmp_path / reason[:9])))
        assert any("are hidden" in note and reason in note for note in summary["notes"])


def test_changes_in_words(tmp_path):
    root = yolo(tmp_path / "d", None)
    put(root / "classes.txt", "scratch\npit\n")
    pictures(root / "images", range(N, 14))
    for k in range(N, 13):
        put(root / "labels" / f"{k:03d}.txt", yolo_line(k))
    store = Storage(str(tmp_path / "o"))
    prepare(Data(data=str(root)), 0, store)
    (root / "images" / "003.png").unlink()
    (root / "labels" / "003.txt").unlink()
    (root / "labels" / "004.txt").unlink()
    put(root / "labels" / "013.txt", "")
    put(root / "labels" / "000.txt", yolo_line(1))
    found = changes(as_previous(store, 1), read_source(str(root), "auto", ()), [])
    assert (len(found.corrected), found.added, found.removed) == (1, 1, 1)
    assert (found.labelled, found.cleared, found.new, found.gone) == (1, 1, 0, 1)
    put(root / "classes.txt", "scratch\npit\ndent\n")
    assert "dent" in "\n".join(changes(as_previous(store, 1), read_source(str(root), "auto", ()), []).lines())


def _zip(folder, path, names=str, flag=True):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.writestr(names(str(file.relative_to(folder))), file.read_bytes())
    return path


@pytest.mark.parametrize("write", [yolo, voc])
def test_exports_as_they_are_downloaded(tmp_path, write):
    root = write(tmp_path / "d")
    put(root / "__MACOSX" / "images" / "._000.png", b"\0")
    run = Storage(str(tmp_path / "run"))
    first = _zip(root, tmp_path / "export.zip")
    alone = put(tmp_path / "alone" / "export.zip", first.read_bytes()).parent
    for given in (
        first,
        alone,
        _zip(root, tmp_path / "deep.zip", lambda n: f"export v1/{n}"),
    ):
        boxes, bad, _ = tally(read_source(resolve_zip(str(given), run), "auto", ()))
        assert (boxes, dict(bad)) == (BOTH, {})
    done = json.loads((tmp_path / "run" / "unpacked").glob("*/unpacked.json").__next__().read_text())
    assert done["files"] in (16, 17)
    assert len(list((tmp_path / "run" / "unpacked").iterdir())) == 2  # the same file twice is one folder


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\x03\x04 cut", "cannot be unpacked"),
        ({"../../evil.png": b""}, "outside of itself"),
        ({"/etc/x.png": b""}, "outside of itself"),
        ({"C:/x.png": b""}, "outside of itself"),
    ],
)
def test_zips_that_are_none_or_reach_outside_are_refused(tmp_path, content, said):
    path = tmp_path / "x.zip"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data)
    with pytest.raises(DfssdError, match=said):
        resolve_zip(str(path), Storage(str(tmp_path / "run")))


def test_the_key_of_the_stage_is_the_content(tmp_path):
    root = yolo(tmp_path / "d")

    def make(folder):
        data_stage._read.cache_clear()  # of another command
        config = Config(run=Run(storage_path=str(tmp_path)), data=Data(data=str(folder)))
        return make_stage(config, Storage(str(tmp_path / "run")), DATASET)

    first = make(root).config
    shutil.copytree(root, tmp_path / "moved")
    assert make(tmp_path / "moved").config == first
    put(tmp_path / "moved" / "labels" / "000.txt", "")
    assert make(tmp_path / "moved").config != first
