"""Where a model file comes from: by the digest of its weights, and what follows from it."""

import hashlib

import numpy as np
import pytest

from dfssd.data.manifest import Row, read_manifest, write_manifest
from dfssd.data.preparation.versions import keep_version
from dfssd.evaluate import origin
from dfssd.evaluate.origin import in_words, origin_of
from dfssd.runtime.storage import Storage

POINT = {"score": 0.2, "thresholds": {"pit": 0.2}, "max_escape": 0.02}


def _sha(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def run(prepared):
    """A run with a label-only student and a student that learned from pseudo-labels, both measured."""
    store = Storage(str(prepared)).at("r")
    store.write_json("dataset/stage.json", {"digest": "d", "summary": {}})
    for model, inputs in (("label_only", {"dataset": "d"}), ("student", {"dataset": "d", "pseudo": "p"})):
        for name in ("best.pt", "last.pt"):
            store.write(f"{model}/{name}", f"{model} {name}".encode())
        outputs = {n: store.at(model).digest(n) for n in ("best.pt", "last.pt")}
        store.write_json(f"{model}/stage.json", {"inputs": inputs, "outputs": outputs, "digest": f"of {model}"})
    metrics = {m: {"operating_point": {**POINT, "score": s}} for m, s in (("label_only", 0.1), ("student", 0.2))}
    store.write_json("report/metrics.json", {**metrics, "environment": {"imgsz": 64}})
    made_from = {m: f"of {m}" for m in ("label_only", "student")}
    store.write_json("report/stage.json", {"inputs": {"dataset": "d", **made_from}})
    return store


def test_weights_in_a_run_have_the_point_that_its_report_chose_for_them(run):
    file = origin.Path(run.path("student", "best.pt"))
    found = origin_of(file)
    assert (found.model, found.point["score"], found.imgsz) == ("student", 0.2, 64)
    assert origin_of(origin.Path(run.path("label_only", "best.pt"))).point["score"] == 0.1
    assert origin_of(origin.Path(run.path("student", "last.pt"))).point is None, (
        "nothing was chosen for the last weights"
    )
    record = run.read_json("student/stage.json")
    run.write_json("student/stage.json", {**record, "digest": "trained again"})
    assert origin_of(file).point is None, "the report is of other weights"
    file.write_bytes(b"another file under the same name")
    assert origin_of(file) is None


def test_a_published_label_only_student_has_its_own_point(run):
    data = run.read("label_only/best.pt")
    run.write("student/best.pt", data)
    record = run.read_json("student/stage.json")
    record["outputs"]["best.pt"] = run.at("student").digest("best.pt")
    run.write_json("student/stage.json", {**record, "published": "label_only"})
    found = origin_of(origin.Path(run.path("student", "best.pt")))
    rows = found.manifest.rows
    assert found.point["score"] == 0.1 and found.seen(rows)["trained"] == len(found.manifest.labelled_rows())


def test_exported_files_find_their_run_beside_them_or_by_its_name(run, tmp_path):
    meta = {"trained": "r/student", "weights_sha256": _sha(b"student best.pt")}
    for place in ("export/student.onnx", "export/student_openvino", "export/student_openvino/model.xml"):
        assert origin_of(origin.Path(run.path(place)), meta).model == "student"
    away = tmp_path / "elsewhere" / "deep" / "er" / "m.onnx"
    assert origin_of(away, meta) is None
    assert origin_of(away, meta, Storage(str(origin.Path(run.path()).parent))).model == "student"
    assert origin_of(away, {**meta, "weights_sha256": "0"}, Storage(str(origin.Path(run.path()).parent))) is None


def test_pictures_that_a_model_knows_are_counted_by_their_content(run):
    student, labels = (origin_of(origin.Path(run.path(m, "best.pt"))) for m in ("student", "label_only"))
    rows = student.manifest.rows
    new = Row("0" * 16, "x.png", 4, 4, "train", True, 0, np.zeros((0, 5), np.float32))
    seen, fewer = student.seen([*rows, new]), labels.seen([*rows, new])
    labelled, unlabelled = (len(own) for own in (student.manifest.labelled_rows(), student.manifest.unlabelled_rows()))
    assert unlabelled and seen["trained"] == labelled + unlabelled and fewer["trained"] == labelled == seen["labels"]
    assert seen["chose"] == len(student.manifest.of_split("val"))
    said = in_words("m.pt", seen, len(rows) + 1)
    assert (
        f"{labelled + unlabelled} of these {len(rows) + 1} pictures trained it ({labelled} with their labels)" in said
    )
    assert in_words("m.pt", student.seen([new]), 1) == "" and "was not found" in in_words("m.pt", None, 1)


def test_predict_takes_the_point_and_size_of_the_run(run, monkeypatch, capsys):
    """Without --score and --imgsz; another size has other scores, and says so."""
    from dfssd.evaluate.open_model import open_model

    sides = []
    monkeypatch.setattr(
        "dfssd.models.families.ready_model", lambda data, name, side: sides.append(side) or (None, ["pit", "scratch"])
    )
    file = run.path("student", "best.pt")
    np.testing.assert_allclose(open_model(file).thresholds(), [0.2, 0.2])
    assert "WARNING" not in capsys.readouterr().out
    threads = []
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    np.testing.assert_allclose(open_model(file, 96, 3).thresholds(), [0.25, 0.25])
    assert threads == [3]
    assert sides == [64, 96] and "no operating point was chosen for this .pt at 96 px" in capsys.readouterr().out


def test_files_without_a_point_are_asked_for_the_rate_of_those_that_bring_one():
    """Unless --max-escape says which, or those that bring one do not agree."""
    from dfssd.config import Config, Evaluate
    from dfssd.evaluate.files import Opened, _rate

    def opened(rate):
        point = None if rate is None else {**POINT, "max_escape": rate}
        return Opened(lambda images: [], ["pit"], 64, point, lambda image: None, None)

    own, asked = Config(), Config(evaluate=Evaluate(max_escape=0.1))
    assert _rate(own, [opened(0.05), opened(None)], False) == 0.05
    assert _rate(own, [opened(0.05), opened(0.01), opened(None)], False) == _rate(own, [opened(None)], False) == 0.02
    assert _rate(asked, [opened(0.05), opened(None)], True) == 0.1
    assert _rate(own, [opened(0.05), opened(None)], True) == 0.02, "the default, typed, is asked for"


def test_deep_pictures_of_a_folder_are_seen_as_the_model_sees_them_at_the_line(tmp_path, monkeypatch):
    """A dim batch has a white level of its own, with which its pictures would be four times as bright as to `predict`."""
    import cv2

    from dfssd.config import Config
    from dfssd.data.images import open_image
    from dfssd.evaluate import files

    rng, seen = np.random.default_rng(0), []
    for k in range(3):
        cv2.imwrite(str(tmp_path / f"{k}.png"), rng.integers(0, 900, (32, 32), np.uint16))
        (tmp_path / f"{k}.txt").write_text("0 0.5 0.5 0.5 0.5\n")

    def detect(images):
        seen.extend(images)
        return [np.array([[8, 8, 24, 24, 0.9, 0]], np.float32)] * len(images)

    for white in (4095.0, None):
        opened = files.Opened(detect, ["pit"], 32, POINT, lambda image: None, None, white)
        monkeypatch.setattr(files, "_open", lambda *args, opened=opened: opened)
        files.measure_files(Config(), ["m.onnx"], str(tmp_path))
        pictures = sorted((tmp_path / f"{k}.png").read_bytes() for k in range(3))
        at_the_line = [open_image(data, white or 1023.0)[..., 0] for data in pictures]
        got = {np.round(image[0] * 255).astype(int).tobytes() for image in seen}
        assert got == {one.astype(int).tobytes() for one in at_the_line}
        seen.clear()


def test_a_pt_is_measured_at_the_size_of_its_run_unless_another_is_typed(run, monkeypatch):
    """Also where the pictures are those of a run of another size, and where what is typed is the default."""
    from dfssd.evaluate import files
    from dfssd.jobs import evaluate

    known, calls = origin_of(origin.Path(run.path("student", "best.pt"))), []
    monkeypatch.setattr(files, "measure_files", lambda *args: calls.append(args) or {})
    monkeypatch.setattr("dfssd.report.terminal.print_files", lambda *args: None)
    run.write_json("report/stage.json", {**run.read_json("report/stage.json"), "config": {"train": {"imgsz": 512}}})
    folder = origin.Path(run.path())
    place = ["--storage-path", str(folder.parent), "--run-name", folder.name, "--weights", "b.pt"]
    for words, side, other in (
        (["--on", "test"], 64, 512),
        (["--on", "test", "--imgsz", "640"], 640, 640),
        (["--on", "folder"], 64, 640),
        (["--on", "folder", "--imgsz=640", "--max_escape", "0.02"], 640, 640),
    ):
        evaluate.job([*place, *words])
        config, _, _, named = calls.pop()
        assert files.side_of(config.train.imgsz, known, files.SIDE in named) == side
        assert files.side_of(config.train.imgsz, None, files.SIDE in named) == other
        assert (files.RATE in named) == ("--max_escape" in words)


def test_pictures_that_were_labelled_since_did_not_train_it(run):
    """`dfssd review --corrected` and `--update` after the training: the version that trained it tells, or nothing does."""
    file = origin.Path(run.path("label_only", "best.pt"))
    before = origin_of(file)
    rows, first = before.manifest.rows, before.seen(before.manifest.rows)
    keep_version(run.at("dataset"))
    later = read_manifest(run.at("dataset"))
    for row in later.rows:
        row.labelled = row.split == "train"
    write_manifest(run.at("dataset"), later)
    run.write_json("dataset/stage.json", {"digest": "later", "summary": {}})
    now = origin_of(file)
    assert len(later.labelled_rows()) > first["labels"] and now.seen(rows) == first
    run.at("dataset").delete("versions")
    lost = origin_of(file)
    assert lost.seen(rows) is None and lost.manifest.rows
    assert "the data set that trained it was replaced" in in_words("m.pt", None, 9, found=True)
