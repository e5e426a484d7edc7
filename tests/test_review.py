"""The label loop: what goes out comes back the same, corrections are kept with who and when, and suggestions are sensible."""

import csv
import io
import itertools
import json
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
from small import give_teacher_and_candidates, tiny_config

from dfssd.config import Data
from dfssd.data.manifest import Manifest, Row, read_manifest, read_table
from dfssd.data.preparation.corrections import Correction, added_classes, read_corrections, write_corrections
from dfssd.data.preparation.prepare import prepare
from dfssd.errors import DfssdError
from dfssd.pseudo.calibration import calibrate
from dfssd.pseudo.scores import BINS
from dfssd.review import suggest
from dfssd.review.active_learning import (
    Labelled,
    data_settings,
    export_images,
    looked_at,
    suggest_images,
    take_back,
)
from dfssd.review.coverage import SHARPNESS, Coverage, choose
from dfssd.review.exports import Proposal, export
from dfssd.review.incoming import read_corrected
from dfssd.runtime.artefact_names import TEACHER
from dfssd.runtime.storage import Storage

NAMES = ["scratch", "划痕 & <pit>"]
_PERCENT = {"type": "number", "minimum": 0, "maximum": 100}
_SIDES = ("x", "y", "width", "height")
_VALUE = {
    "type": "object",
    "required": [*_SIDES, "rotation", "rectanglelabels"],
    "properties": {
        **dict.fromkeys(_SIDES, _PERCENT),
        "rectanglelabels": {"type": "array", "items": {"type": "string"}, "minItems": 1},
    },
}
_RESULT = {
    "type": "object",
    "required": ["id", "type", "from_name", "to_name", "value", "original_width", "original_height"],
    "properties": {
        "type": {"const": "rectanglelabels"},
        "from_name": {"const": "label"},
        "to_name": {"const": "image"},
        "value": _VALUE,
    },
}
_PREDICTION = {
    "type": "object",
    "required": ["result", "model_version", "score"],
    "properties": {
        "score": {"type": "number", "minimum": 0, "maximum": 1},
        "result": {"type": "array", "items": _RESULT},
    },
}
# Of labelstud.io/guide/predictions: what its importer asks of a task with predictions.
TASK_SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["data", "predictions"],
        "properties": {
            "data": {"type": "object", "required": ["image"], "properties": {"image": {"type": "string"}}},
            "predictions": {"type": "array", "items": _PREDICTION},
        },
    },
}


def _manifest(folder="/line", count=6):
    uris = [f"{folder}/cam {k % 2}/bild {k:03d}.png" for k in range(count)]
    rows = [Row(f"{k:016x}", u, 640, 480, "unlabelled-only", False, k, None) for k, u in enumerate(uris)]
    return Manifest(rows, list(NAMES), {})


def _proposals(manifest):
    rng = np.random.default_rng(0)
    found = []
    for k, row in enumerate(manifest.rows):
        n = k % 3
        columns = [rng.integers(0, 2, (n, 1)), rng.uniform(0.2, 0.8, (n, 2)), rng.uniform(0.05, 0.3, (n, 2))]
        found.append(Proposal(row, np.concatenate([*columns, rng.uniform(0.3, 1, (n, 1))], 1)))
    return found


def _back(corrections, proposals):
    """Boxes that came back are those that went out, to a thousandth of a pixel of the format."""
    by_id = {c.image_id: c for c in corrections}
    for p in proposals:
        got = sorted(by_id[p.row.image_id].boxes)
        want = sorted([NAMES[int(b[0])], *map(float, b[1:5])] for b in p.boxes)
        assert [b[0] for b in got] == [b[0] for b in want]
        assert np.allclose([b[1:] for b in got], [b[1:] for b in want], atol=2e-6) if want else got == []


def test_label_studio_tasks_fit_its_schema_and_come_back_with_who_and_when(tmp_path):
    manifest = _manifest()
    proposals = _proposals(manifest)
    files = export("labelstudio", proposals, NAMES, "line3/teacher", "/line")
    tasks = json.loads(files["tasks.json"])
    jsonschema.validate(tasks, TASK_SCHEMA)
    assert tasks[1]["data"]["image"] == "/data/local-files/?d=cam%201/bild%20001.png"  # as its own storage quotes
    config = ElementTree.fromstring(files["labelling_config.xml"])
    assert [n.get("value") for n in config.iter("Label")] == NAMES and config.find("Image").get("value") == "$image"
    assert config.find("RectangleLabels").get("name") == "label" == tasks[1]["predictions"][0]["result"][0]["from_name"]
    for k, task in enumerate(tasks):  # as Label Studio exports them once somebody has pressed Submit
        (prediction,) = task.pop("predictions")
        task |= {"id": k + 1, "predictions": [], "inner_id": k + 1}
        task["annotations"] = [
            {
                "id": k,
                "completed_by": {"id": 3, "email": f"anna{k}@mill.example"},
                "result": prediction["result"],
                "was_cancelled": False,
                "updated_at": f"2026-11-2{k}T08:00:00Z",
                "created_at": "2026-11-01T00:00:00Z",
            }
        ]
    tasks[5]["annotations"] = []  # nobody has looked at it yet
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    corrections, bad = read_corrected(str(tmp_path / "export.json"), manifest)
    assert bad == [] and len(corrections) == 5
    _back(corrections, proposals[:5])
    by_id = {c.image_id: c for c in corrections}
    second = by_id[manifest.rows[1].image_id]
    assert (second.who, second.when) == ("anna1@mill.example", "2026-11-21T08:00:00Z")
    assert by_id[manifest.rows[0].image_id].boxes == []  # looked at, and free of defects


@pytest.mark.parametrize("kind", ["JSON", "JSON_MIN", "CSV"])
def test_what_a_label_studio_server_exported_comes_back(tmp_path, kind):
    """Recorded from a server that had been given our tasks and predictions; see "from" in the file."""
    content = json.loads(Path(__file__).with_name("label_studio_export.json").read_text())[kind]
    path = tmp_path / f"project-1{'.csv' if kind == 'CSV' else '.json'}"
    path.write_text(content if kind == "CSV" else json.dumps(content))
    rows = [
        Row(f"{k:016x}", f"/line/cam {k % 2}/bild ü{k:03d}.png", 640, 480, "train", False, k, None) for k in range(9)
    ]
    corrections, bad = read_corrected(str(path), Manifest(rows, ["scratch", "划痕 & <pit>", "rust, red"], {}))
    found = {int(c.image_id, 16): c for c in corrections}
    assert bad == [] and sorted(found) == [1, 3, 5] and found[3].boxes == []
    assert found[1].boxes == [["rust, red", 0.361872, 0.224584, 0.054132, 0.253318]]
    assert found[5].boxes == [["scratch", 0.272604, 0.569231, 0.295209, 0.221385]]  # moved by hand
    assert found[1].who == "user 1 of Label Studio" and found[1].when == "2026-11-26T09:54:36.399247Z"


def test_label_studios_own_code_accepts_config_tasks_and_predictions():
    interface = pytest.importorskip("label_studio_sdk.label_interface", reason="needs label-studio-sdk")
    files = export("labelstudio", _proposals(_manifest()), NAMES, "line3/teacher", "/line")
    config = interface.LabelInterface(files["labelling_config.xml"].decode())
    config.validate()
    for task in json.loads(files["tasks.json"]):
        assert config.validate_task({"data": task["data"]})
        assert all(config.validate_prediction(p, return_errors=True) == [] for p in task["predictions"])


@pytest.mark.parametrize("fmt", ["cvat", "coco", "yolo"])
def test_other_formats_come_back_as_they_went(tmp_path, fmt):
    manifest = _manifest()
    proposals = _proposals(manifest)
    files = export(fmt, proposals, NAMES, "x")
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    path = tmp_path / {"cvat": "annotations.xml", "coco": "annotations.json", "yolo": "yolo.zip"}[fmt]
    corrections, bad = read_corrected(str(path), manifest, "bob")
    assert bad == [] and len(corrections) == len(proposals) and {c.who for c in corrections} == {"bob"}
    _back(corrections, proposals)
    if fmt == "yolo":
        assert set(zipfile.ZipFile(path).namelist()) >= {"classes.txt", "labels/bild 000.txt"}
    if fmt == "cvat":
        root = ElementTree.parse(path).getroot()
        assert root.findtext("version") == "1.1" and [n.text for n in root.iter("name")] == NAMES
        task = root.find("meta/task")
        ElementTree.SubElement(ElementTree.SubElement(task, "assignee"), "username").text = "carla"
        ElementTree.SubElement(task, "updated").text = "2026-11-20 10:00:00"
        path.write_bytes(ElementTree.tostring(root))
        corrections, _ = read_corrected(str(path), manifest)
        assert {(c.who, c.when) for c in corrections} == {("carla", "2026-11-20 10:00:00")}


TOLD_APART = [
    "/line/cam1/0.png", "/line/cam2/0.png", "/line/0.png", "/other/0.png", "/line/x.png", "/line/a.png", "/line/a.jpg",
    *(f"/line/odd/{n}.png" for n in ("b 1", "b#2", "b+3", "b&c=4", "b%20", "b?q", "划痕 1", "it's \"q\"", "50%")),
]  # fmt: skip


@pytest.mark.parametrize("fmt", ["labelstudio", "cvat", "coco", "yolo"])
def test_images_of_one_name_and_of_odd_names_come_back_as_themselves(tmp_path, fmt):
    rows = [Row(f"{k:016x}", uri, 640, 480, "train", False, k, None) for k, uri in enumerate(TOLD_APART)]
    manifest = Manifest(rows, list(NAMES), {})
    proposals = [Proposal(r, np.array([[k % 2, 0.5, 0.5, 0.02 * (k + 1), 0.2, 0.9]])) for k, r in enumerate(rows)]
    files = export(fmt, proposals[::2], NAMES, "x", "/line", rows) | export(fmt, proposals, NAMES, "x", "/line", rows)
    if fmt == "labelstudio":
        tasks = json.loads(files["tasks.json"])
        done = [{**t, "annotations": [{"result": t.pop("predictions")[0]["result"]}]} for t in tasks]
        files["tasks.json"] = json.dumps(done).encode()
    name = next(n for n in files if n not in ("images.txt", "labelling_config.xml"))
    (tmp_path / name).write_bytes(files[name])
    corrections, bad = read_corrected(str(tmp_path / name), manifest)
    assert bad == [] and len(corrections) == len(rows)
    _back(corrections, proposals)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"images": [], "annotations": [], "categories": []}, "no corrected label"),
        ("unknown", "classes that the data has not: 'dent'"),
        ("other", "no corrected label"),
    ],
)
def test_files_that_say_nothing_of_this_data_are_refused(tmp_path, content, said):
    sheet = {
        "images": [{"id": 1, "file_name": "bild 000.png"}],
        "categories": [{"id": 1, "name": "dent"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}],
    }
    if content == "other":
        sheet["images"][0]["file_name"], sheet["categories"][0]["name"] = "nobody.png", "scratch"
    (tmp_path / "x.json").write_text(json.dumps(content if isinstance(content, dict) else sheet))
    with pytest.raises(DfssdError, match=said):
        read_corrected(str(tmp_path / "x.json"), _manifest())


def test_corrections_win_over_the_data_and_later_ones_over_earlier(strip, tmp_path):
    run = Storage(str(tmp_path / "r"))
    data = Data(data=str(strip), label_fraction=0.5)
    prepare(data, 0, run.at("dataset"))
    manifest = read_manifest(run.at("dataset"))
    row = manifest.labelled_rows()[0]
    name = manifest.names[0]
    write_corrections(run, [Correction(row.image_id, [[name, 0.5, 0.5, 0.1, 0.1]], "anna", "2026-01-01", "a.json")])
    write_corrections(run, [Correction(row.image_id, [[name, 0.4, 0.4, 0.2, 0.2]], "bob", "2026-02-01", "b.json")])
    summary = prepare(data, 0, run.at("dataset"))
    after = {r.image_id: r for r in read_manifest(run.at("dataset")).rows}
    assert summary["corrected_images"] == 1 and np.allclose(after[row.image_id].boxes, [[0, 0.4, 0.4, 0.2, 0.2]])
    (kept,) = read_table(run.at("dataset"), "corrections.parquet").to_pylist()
    assert (kept["who"], kept["when"], kept["source"], kept["boxes"]) == ("bob", "2026-02-01", "b.json", 1)
    assert len(read_corrections(run)) == 1
    write_corrections(run, [Correction(row.image_id, [["crack", 0.5, 0.5, 0.1, 0.1]], "eve", "", "c.json")])
    with pytest.raises(DfssdError, match="'crack'") as caught:
        prepare(data, 0, run.at("dataset"))
    assert "--add-classes" in caught.value.todo
    write_corrections(run, [], ["crack"])  # as `review --corrected ... --add-classes crack` does
    assert prepare(data, 0, run.at("dataset"))["names"] == [*manifest.names, "crack"]
    assert len(read_corrections(run)) == 1


@pytest.fixture
def labelled_run(strip, tmp_path):
    """A prepared run with a made-up teacher and made-up candidates."""
    config = tiny_config(tmp_path)
    run = Storage(str(tmp_path / "r"))
    data = Data(data=str(strip), label_fraction=0.4)
    summary = prepare(data, 0, run.at("dataset"))
    recorded = {"summary": summary, "digest": "d", "config": {"data": {"data": "before"}}, "inputs": {}}
    run.write_json("dataset/stage.json", recorded)
    give_teacher_and_candidates(tmp_path)
    for stage in ("teacher", "pseudo"):
        run.write_json(f"{stage}/stage.json", {"digest": stage, "summary": {"best": {"map50_95": 0.5}}})
    return config.model_copy(update={"data": data}), run


def test_suggest_leaves_a_table_a_sheet_and_tasks(labelled_run):
    config, run = labelled_run
    written = suggest_images(config, run, TEACHER, 5, "labelstudio", "")
    names = ["suggest.csv", "scores.csv", "suggest.png", "tasks.json", "labelling_config.xml"]
    assert [p.rsplit("/", 1)[1] for p in written] == names
    rows = list(csv.DictReader(io.StringIO(run.read("suggest/suggest.csv").decode())))
    assert [r["rank"] for r in rows] == list("12345") and len({r["group"] for r in rows}) == 5
    unlabelled = {r.image_id for r in read_manifest(run.at("dataset")).unlabelled_rows()}
    assert {r["image_id"] for r in rows} <= unlabelled
    tasks = json.loads(run.read("suggest/tasks.json"))
    assert [t["data"]["file"] for t in tasks] == [r["file"] for r in rows]
    jsonschema.validate(tasks, TASK_SCHEMA)
    run.write("student/best.pt", run.read("teacher/best.pt"))  # a student: teacher and student are compared
    run.write_json("student/stage.json", {"digest": "s"})
    suggest_images(config, run, TEACHER, 5, None, "")
    rows = list(csv.DictReader(io.StringIO(run.read("suggest/scores.csv").decode())))
    assert len(rows) == len(unlabelled) and max(float(r["disagreement"]) for r in rows) > 0
    assert [r["rank"] for r in rows[:6]] == [*"12345", ""] and float(rows[0]["gain"]) == 1
    assert export_images(config, run, "doubtful", "cvat", 3, "")[0].endswith("annotations.xml")
    assert len(ElementTree.fromstring(run.read("review/annotations.xml")).findall("image")) == 3


def test_corrected_labels_come_back_into_the_next_version(labelled_run, tmp_path, monkeypatch, capsys):
    from dfssd.jobs.review import job

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:/nonexistent")
    config, run = labelled_run
    (path, *_) = export_images(config, run, "all", "coco", 4, "")
    sheet = json.loads((tmp_path / path).read_text())
    ids = {i["dfssd_id"] for i in sheet["images"]}
    before = {r.image_id: r.split for r in read_manifest(run.at("dataset")).rows}
    recorded = run.read_json("dataset/stage.json")
    from dfssd.pipeline.stages import settings_of
    from dfssd.runtime.artefact_names import DATASET

    run.write_json("dataset/stage.json", {**recorded, "config": settings_of(config, DATASET)})
    job(["--corrected", path, "--reviewer", "dora", "--storage-path", str(tmp_path), "--run-name", "r"])
    said = capsys.readouterr().out
    assert "4 images corrected by dora" in said and "dataset: version 2" in said and "made again" in said
    after = read_manifest(run.at("dataset"))
    assert after.meta["version"] == 2 and {r.image_id: r.split for r in after.rows} == before
    assert ids <= {r.image_id for r in after.labelled_rows()}  # a person labelled them: nothing about them is hidden
    assert {c["who"] for c in read_table(run.at("dataset"), "corrections.parquet").to_pylist()} == {"dora"}
    assert data_settings(run).update and take_back(config, run, path, "eve").startswith("4 images corrected by eve")
    sheet["categories"][0]["name"] = "crack"
    (tmp_path / path).write_text(json.dumps(sheet))
    with pytest.raises(DfssdError, match="'crack'"):
        take_back(config, run, path, "eve")
    take_back(config, run, path, "eve", ("crack",))
    assert added_classes(run) == ["crack"]


def test_scores_tell_torn_and_disputed_images_and_what_is_likely_to_be_on_them():
    tau = np.array([0.5, 0.5])

    def box(c, score, x=0.5):
        return np.array([[c, x, 0.5, 0.2, 0.2, score, 1.0]], np.float32)

    teacher = [box(0, 0.99), box(0, 0.5), np.concatenate([box(1, 0.8), box(1, 0.5, 0.1)]), box(0, 0.99)]
    student = [box(0, 0.9), box(0, 0.5), teacher[2], box(0, 0.9, 0.9)]
    scores = suggest.score(teacher, student, tau, None)
    assert scores.uncertainty.argmax() == 1 and scores.disagreement.argmax() == 3
    assert suggest.score(teacher, None, tau, None).disagreement.max() == 0
    np.testing.assert_allclose(scores.shows[2], [0, 1 - 0.2 * 0.5], atol=1e-6)
    np.testing.assert_allclose(scores.boxes[2], [0, 1.3], atol=1e-6)
    asked = suggest.demand(scores.shows) * scores.shows.sum(0)
    assert asked[0] == pytest.approx(asked[1]), "every class asks for as much"
    found = np.zeros((2, BINS))
    found[0, 990], found[1, 500] = 40, 3
    calibrated = suggest.score(teacher, None, tau, calibrate(found, found * 0.25))
    assert calibrated.shows[0, 0] == pytest.approx(0.25) and calibrated.shows[2, 1] == pytest.approx(0.9), (
        "3 are too few"
    )
    assert suggest.shown([teacher[2], None, teacher[0]], 2).tolist() == [[0, 1], [0, 0], [1, 0]]


def scene(seed, n=60, m=5, classes=3):
    """Features, what images show, labelled ones, weights, worth and groups of a made-up set."""
    rng = np.random.default_rng(seed)
    every = rng.normal(size=(n + m, 8)) + 2 * rng.normal(size=(4, 8))[rng.integers(4, size=n + m)]
    every /= np.linalg.norm(every, axis=1, keepdims=True)
    shows = rng.random((n, classes)) * (rng.random((n, classes)) < 0.5)
    known_shows = (rng.random((m, classes)) < 0.4).astype(float)
    return every[:n], shows, every[n:], known_shows, rng.random(classes) + 0.1, rng.random(n) + 0.5, np.arange(n) // 2


def value(chosen, features, shows, known, known_shows, weights):
    """F(S) of `coverage.py`, as it is written there, in float64."""
    others, own = np.concatenate([known, features[chosen]]), np.concatenate([known_shows, shows[chosen]])
    likeness = (features @ others.T).clip(0, 1) ** SHARPNESS
    return sum(w * (shows[:, c] * (likeness * own[:, c]).max(1)).sum() for c, w in enumerate(weights))


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_the_greedy_one_and_near_the_best(seed):
    *parts, worth, groups = scene(seed)
    chosen, gain = choose(Coverage(*parts), worth, groups, {3}, 8)
    slow: list[int] = []
    for _ in range(8):  # every gain computed anew, from the value itself
        before = value(slow, *parts)
        free = [i for i in range(60) if groups[i] != 3 and groups[i] not in groups[slow]]
        slow.append(max(free, key=lambda i: (value([*slow, i], *parts) - before) * worth[i]))
    assert chosen == slow
    assert (np.diff(gain[chosen]) <= 1e-6).all() and gain[chosen[0]] == 1 and gain.max() == 1
    *parts, _, groups = scene(seed, n=14)
    base, (pair, _) = value([], *parts), choose(Coverage(*parts), np.ones(14), np.arange(14), set(), 3)
    best = max(value(list(s), *parts) for s in itertools.combinations(range(14), 3))
    assert value(pair, *parts) - base >= (1 - 1 / np.e) * (best - base)


def test_the_choice_spreads_shares_between_classes_and_takes_one_of_each_group():
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.normal(size=(8, 8)))[0][:4]
    features = np.repeat(centres, 25, 0) + 0.02 * rng.normal(size=(100, 8))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    shows, worth, groups = np.ones((100, 1)), np.ones(100), np.arange(100) // 2
    worth[:25] = 1.3  # all the best ones are of one kind

    def run(k, taken=(), shows=shows, features=features):
        coverage = Coverage(features, shows, centres[:1], np.ones((1, shows.shape[1])) * 0, suggest.demand(shows))
        return choose(coverage, worth, groups, set(taken), k)[0]

    assert {c // 25 for c in run(4)} == {0, 1, 2, 3}
    known = Coverage(features, shows, centres[:1], np.ones((1, 1)), np.ones(1))
    assert {c // 25 for c in choose(known, worth, groups, set(), 3)[0]} == {
        1,
        2,
        3,
    }  # the kind that is labelled comes last
    assert len(run(80)) == 50 and min(run(5, range(12))) >= 24  # one a group; groups that are labelled already
    rare = np.zeros((100, 2))
    rare[:, 0], rare[90:] = 1, [0, 1]
    noise = rng.normal(size=(100, 8)) / 3  # pictures that do not look alike
    chosen = run(10, shows=rare, features=noise)
    assert 3 <= sum(c >= 90 for c in chosen) <= 5, "a tenth of the pictures, and half of the choice as far as groups go"
    assert len(run(3, range(50))) == 3, "all resemble something labelled: better that than nothing"
    nothing = choose(Coverage(features, rare * 0, centres[:1], np.zeros((1, 2)), np.zeros(2)), worth, groups, set(), 3)
    assert len(nothing[0]) == 3, "a teacher that sees nothing"


def test_of_a_large_set_the_best_are_looked_at_and_as_many_others():
    rows = [Row(f"{(7919 * k) % 1000:04d}", f"/{k}", 10, 10, "train", False, k, None) for k in range(1000)]
    order = looked_at(Labelled(None, rows, [], None), np.arange(1000.0), 100)
    assert len(set(order)) == 100 and order[:50] == list(range(999, 949, -1))
    assert 300 < np.mean(order[50:]) < 650, "spread over the others"
    assert looked_at(Labelled(None, rows, [], None), np.arange(1000.0), 2000) == list(range(1000))


def test_the_most_doubtful_images_come_with_names_a_table_and_tasks(labelled_run):
    from dfssd.pipeline.labelling import _write_doubtful
    from dfssd.pseudo.quality import measure
    from dfssd.runtime.artefact import Stage
    from dfssd.runtime.artefact_names import QUALITY

    config, run = labelled_run
    stage = Stage(run, QUALITY, {})
    names = _write_doubtful(stage, measure(config, run, "pseudo"), read_manifest(run.at("dataset")))
    assert names == ["doubtful.png", "doubtful.csv", "doubtful_tasks.json"]
    rows = list(csv.DictReader(io.StringIO(stage.store.read("doubtful.csv").decode())))
    tasks = json.loads(stage.store.read("doubtful_tasks.json"))
    jsonschema.validate(tasks, TASK_SCHEMA)
    assert rows and [r["file"] for r in rows] == [t["data"]["file"] for t in tasks]
    doubts = [float(r["doubt"]) for r in rows]
    assert doubts == sorted(doubts, reverse=True)
