"""Our numbers must be those of stock Ultralytics on the same weights and images."""

import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from small import make_job, tiny_config

from dfssd.config import Data
from dfssd.data.dataset import ManifestDataset
from dfssd.data.manifest import read_manifest
from dfssd.data.preparation.prepare import prepare
from dfssd.errors import DfssdError
from dfssd.evaluate.validation import summarise, validate
from dfssd.models.yolo.detector import build_detector, detector_bytes, load_detector
from dfssd.runtime.storage import Storage
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train.in_process import train_in_process


@pytest.fixture(scope="module")
def trained(strip, tmp_path_factory):
    """A detector that has learned its training images by heart, so that its mAP means something."""
    storage = tmp_path_factory.mktemp("trained")
    prepare(
        Data(data=str(strip), label_fraction=1.0, split_shares=(0.6, 0.2, 0.2)),
        0,
        Storage(str(storage)).at("r", "dataset"),
    )
    still = {"mosaic": 0.0, "scale": 0.0, "translate": 0.0, "fliplr": 0.0, "hsv": (0.0, 0.0, 0.0)}
    # One validation, at the end: val is so small that rounding decides which of two is better, and the first may win.
    often = {"val_every": 320, "log_every": 80}
    config = tiny_config(storage, steps=320, batch=8, lr=0.004, ema_decay=0.9, **often, **still)
    return storage, train_in_process(make_job("label_only", str(storage / "r"), config))


def _measure(storage, split, workers=None):
    run = Storage(str(storage / "r"))
    manifest = read_manifest(run.at("dataset"))
    rows = manifest.of_split(split)
    model = load_detector(run.read("label_only/best.pt"), "best.pt", 64)
    dataset = ManifestDataset(rows, [r.boxes for r in rows], manifest.names, 64)
    return validate(model, dataset, model.names, workers or WorkerGroup(), torch.device("cpu")), rows, manifest


def test_equal_to_yolo_val(trained, tmp_path):
    from ultralytics import YOLO

    storage, _ = trained
    for split in ("val", "train"):
        ours, rows, manifest = _measure(storage, split)
        root = tmp_path / split
        for sub in ("images", "labels"):
            (root / sub).mkdir(parents=True)
        for row in rows:
            shutil.copy(row.uri, root / "images" / f"{row.image_id}.png")
            lines = [f"{int(b[0])} " + " ".join(f"{v:.8f}" for v in b[1:]) for b in row.boxes]
            (root / "labels" / f"{row.image_id}.txt").write_text("\n".join(lines))
        (root / "data.yaml").write_text(f"path: {root}\ntrain: images\nval: images\nnames: {manifest.names}\n")
        stock = YOLO(str(storage / "r" / "label_only" / "best.pt"))
        theirs = stock.val(data=str(root / "data.yaml"), imgsz=64, batch=16, workers=0, plots=False, verbose=False)
        assert ours["map50"] == pytest.approx(theirs.box.map50, abs=1e-3)
        assert ours["map50_95"] == pytest.approx(theirs.box.map, abs=1e-3)
    assert ours["map50"] > 0.1  # on the images it was trained on; else the comparison says little


def test_training_has_measured_the_same_weights_nearly_the_same(trained):
    """`best.pt` is stored in half precision; what training measured in full must hold for it."""
    storage, result = trained
    ours, _, _ = _measure(storage, "val")
    assert ours["map50_95"] == pytest.approx(result["best"]["map50_95"], abs=5e-3)


def test_workers_share_the_images_and_agree(trained):
    storage, _ = trained
    alone, rows, _ = _measure(storage, "train")
    assert len(rows) > 16

    class Pair(WorkerGroup):
        """Runs as one of two workers; gather() is replaced by both workers' real parts."""

        parts: list = []  # noqa: RUF012

        def gather(self, value):
            Pair.parts.append(value)
            return list(Pair.parts)

    _measure(storage, "train", Pair(0, 2))
    together, _, _ = _measure(storage, "train", Pair(1, 2))
    assert len(Pair.parts[0]) + len(Pair.parts[1]) == len(rows)
    assert together["map50"] == pytest.approx(alone["map50"], abs=1e-9)


def test_no_box_at_all_is_a_user_error():
    nothing = {"tp": np.zeros((0, 10), bool), "conf": np.zeros(0), "pred_cls": np.zeros(0), "target_cls": np.zeros(0)}
    with pytest.raises(DfssdError, match="no box at all"):
        summarise([nothing | {"target_img": np.zeros(0), "im_name": "x"}], {0: "a"})


def test_records_lie_where_the_manifest_has_them(trained):
    """Boxes of a record are in pixels of the picture: through the letterbox and back, the truth is the label."""
    from dfssd.evaluate.validation import collect, detecting

    storage, _ = trained
    run = Storage(str(storage / "r"))
    manifest = read_manifest(run.at("dataset"))
    rows = manifest.of_split("val")
    dataset = ManifestDataset(rows, [r.boxes for r in rows], manifest.names, 96)
    model = load_detector(run.read("label_only/best.pt"), "best.pt", 96)
    records = collect(detecting(model), dataset, WorkerGroup(), torch.device("cpu"))
    by_id = {r.image_id: r for r in rows}
    assert len(records) == len(rows)
    for one in records:
        row = by_id[one["image_id"]]
        centre, size = row.boxes[:, 1:3] * one["size"], row.boxes[:, 3:5] * one["size"]
        np.testing.assert_allclose(one["truth"], np.concatenate([centre - size / 2, centre + size / 2], 1), atol=1e-2)
        assert one["group"] == row.group and len(one["boxes"]) == len(one["conf"])


@pytest.fixture(scope="module")
def measured(trained, strip):
    """The whole measurement of that detector, in two roles."""
    from dfssd.evaluate.measure import measure

    storage, _ = trained
    again = Storage(str(storage / "again"))
    summary = prepare(Data(data=str(strip), label_fraction=1.0, split_shares=(0.6, 0.2, 0.2)), 0, again.at("dataset"))
    run = Storage(str(storage / "r"))
    run.write("student/best.pt", run.read("label_only/best.pt"))
    record = {"config": {}, "summary": summary, "duration_s": 1.0, "finished_utc": "2026-01-01T00:00:00Z"}
    for name in ("dataset", "label_only", "student"):
        run.write_json(f"{name}/stage.json", record)
    config = tiny_config(storage)
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"latency_repeats": 5})})
    return config, run, measure(config, run.uri, ["label_only", "student"], 1)


def test_a_measurement_holds_all_numbers_and_the_boxes_behind_them(measured):
    from dfssd.evaluate.detections import read_detections

    _, run, results = measured
    for split in ("val", "test"):
        one = results["student"][split]
        assert one["map50"] == results["label_only"][split]["map50"] and set(one["coco"]) >= {"all", "small"}
        assert np.sum(one["confusion"]["counts"]) > 0 and one["line"]["escape"]["pictures"] > 0
    point = results["student"]["operating_point"]
    assert point["max_escape"] == 0.02 and point["chosen_on"] == "val"
    assert results["gate"]["map50"]["difference"] == 0
    assert results["student"]["latency_p95_ms"] >= results["student"]["latency_ms"] > 0
    boxes = read_detections(run.at("report"))
    manifest = read_manifest(run.at("dataset"))
    tau = np.array([point["thresholds"][n] for n in manifest.names])
    test = [r for r in manifest.of_split("test") if r.boxes is not None]
    empty = np.zeros((0, 7))
    rejected = [
        (b[:, 4] >= tau[b[:, 5].astype(int)]).any()
        for b in (boxes["student", "test"].get(r.image_id, empty) for r in test)
    ]
    escaped = sum(len(r.boxes) > 0 and not hit for r, hit in zip(test, rejected, strict=True))
    assert results["student"]["test"]["line"]["escape"]["count"] == escaped


def test_last_weights_are_measured_beside_the_best(measured):
    """What val did not choose: on test anew, on val as the training saw it; where the last step was the best, not again."""
    from dfssd.evaluate.measure import images_of, last_weights
    from dfssd.evaluate.verdict import on_test

    config, run, results = measured
    manifest, best = read_manifest(run.at("dataset")), results["label_only"]
    kept = run.read("label_only/stage.json") if run.exists("label_only/stage.json") else None
    test, seen = images_of(manifest, "test", config.train.imgsz), {"map50": 0.25, "map50_95": 0.125, "recall": 0.5}
    torch.manual_seed(5)
    run.write("label_only/last.pt", detector_bytes(build_detector("yolov8n.yaml", manifest.names, 96), {}))

    def found(step):
        run.write_json("label_only/stage.json", {"summary": {"best": {"step": step}, "steps": 40, "last": seen}})
        return last_weights(config, run, "label_only", best, test, torch.device("cpu"))

    early, same = found(10), found(40)
    assert same["step"] == 40 and same["test"] == {k: best["test"][k] for k in ("map50", "map50_95")}
    assert best["test"]["map50"] > 0 and early["test"]["map50"] != best["test"]["map50"]
    assert early["val"] == {"map50": 0.25, "map50_95": 0.125}
    run.at("label_only").delete("stage.json")
    if kept is not None:
        run.write("label_only/stage.json", kept)
    two = {"label_only": {**best, "last": early}, "student": {**results["student"], "last": same}}
    gained = 100 * (best["test"]["map50"] - early["test"]["map50"])
    assert f"; with the weights of the last step, which nothing chose, mAP50 {gained:+.1f} points" in on_test(two)


def _in_a_bucket(opened, path):
    """Opens storages below a path as if they lay in a bucket."""

    def opens(self, uri):
        opened(self, uri.removeprefix("s3://bucket"))
        if self.root.startswith(path):
            self.is_local, self.uri = False, f"s3://bucket{self.root}"

    return opens


def test_what_a_user_sees_last(measured, capsys, tmp_path, monkeypatch):
    """Verdict on val and test, escapes and rejects, and commands that name only files that are there."""
    from dfssd.report.terminal import print_results

    config, run, results = measured
    run.write_json("report/metrics.json", results)
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "1.png").touch()
    strange = config.model_copy(update={"data": config.data.model_copy(update={"data": str(tmp_path / "a b")})})
    print_results(strange)
    text = capsys.readouterr().out
    for words in ("val mAP50", "Val chose weights and scores", "On test, which chose nothing",
                  "measured on val and test; labels used: ", "Labels used: those of ", "Labels of test only measure",
                  "defective pictures pass",
                  "clean test picture", "THE MACHINE WAS BUSY" if results["latency"]["busy"] else "interleaved rounds",
                  f"conf={results['student']['operating_point']['score']}", f"source='{tmp_path}/a b'",
                  "dfssd export --storage-path"):  # fmt: skip
        assert words in text, words
    assert "…" not in text
    kept = run.read("student/best.pt")
    run.at("student").delete("best.pt")
    run.write_json("report/metrics.json", {k: v for k, v in results.items() if k not in ("student", "gate")})
    print_results(config)
    run.write("student/best.pt", kept)
    text = capsys.readouterr().out
    assert "label_only/best.pt" in text and "student/best.pt" not in text
    folder = str(Path(read_manifest(run.at("dataset")).of_split("test")[0].uri).parent)
    assert f"source={folder} " in text and "PICTURES" not in text  # the pictures' own folder: yolo looks no deeper
    run.write_json("export/stage.json", {"inputs": {"report": "of before"}})
    run.write_json("export/export.json", {"model": "label_only"})
    run.write_json("report/stage.json", {"digest": "of now"})
    print_results(config)
    text = capsys.readouterr().out
    assert "carries the scores of an earlier report" in text and "  dfssd predict" not in text
    assert re.search(r"dfssd export --storage-path \S+ --run-name r --imgsz 64 --overwrite", text)
    run.write_json("report/metrics.json", results)
    print_results(config)  # the better one is at the line: the command does not put the other one there
    text = capsys.readouterr().out
    assert "--imgsz 64 --publish-best --overwrite" in text and "label_only/best.pt" in text.split("next:")[1]
    export = {"model": "student", "files": {"student.onnx": 2**20}, "parity": {}, "speedup": None}
    run.write_json("export/export.json", {**export, "latency": {"timings": {}, "note": "quiet"}})
    run.write_json("export/stage.json", {"inputs": {"report": "of now"}})
    print_results(config)
    assert f"dfssd predict {run.path('export/student.onnx')} " in capsys.readouterr().out
    monkeypatch.setattr(Storage, "__init__", _in_a_bucket(Storage.__init__, config.run.storage_path))
    print_results(config)  # what lies in a bucket is named by its address, and no command names it as a file
    text = capsys.readouterr().out
    assert f"report    s3://bucket{run.path('report/report.html')}\n" in text
    assert f"fetch s3://bucket{run.path('export/student.onnx')}, then dfssd predict student.onnx PICTURES" in text
    assert not re.search(r"^  (dfssd|yolo) predict", text, re.M) and "yolo takes" not in text
    assert "no MLflow" not in text, "it was said when the run began"
    monkeypatch.undo()
    run.at("export").delete()
    run.at("report").delete("stage.json")


def test_the_row_of_labels_stands_under_its_classes():
    """stage.json sorts its keys; class names are in order of their id, splits and models in that of the work."""
    from dfssd.report.tables import models_in, split_rows

    boxes = {"scratch": 1, "pit": 7}
    split = {"images": 9, "labelled": 3, "boxes": boxes}
    summary = {"names": ["scratch", "pit"], "splits": {"train": split, "val": {**split, "labelled": 0}},
               "labelled_images": 3, "labelled_boxes": {"pit": 7, "scratch": 1}}  # fmt: skip
    header, rows = split_rows(summary)
    assert header[3:] == ["scratch", "pit"] and rows[-1][3:] == ["1", "7"] and rows[1][2] == "-"
    summary["splits"] = {name: {**split, "labelled": 0} for name in ("test", "train", "unlabelled-only", "val")}
    assert [row[0] for row in split_rows(summary)[1][:-1]] == ["train", "val", "test", "unlabelled-only"]
    models = ("label_only", "mean_teacher", "student", "teacher", "teacher_2")
    assert list(models_in({m: {"test": {}} for m in models})) == [
        "teacher",
        "mean_teacher",
        "teacher_2",
        "label_only",
        "student",
    ]


PROBE = """
<script>%s</script><script>
addEventListener("load", async () => {
  const out = document.createElement("pre"); out.id = "probe";
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const bad = window.axe ? (await axe.run()).violations.filter(v => ["serious", "critical"].includes(v.impact)) : [];
  const broken = [...document.images].filter(i => i.complete && !i.naturalWidth).length;
  const box = document.querySelector(".scroll"), heads = [...box.querySelectorAll("thead th")];
  const edge = box.getBoundingClientRect().right;
  const seen = heads.filter(h => h.getBoundingClientRect().right <= edge).map(h => h.textContent);
  box.scrollLeft = 9999;
  const first = heads[0].getBoundingClientRect(), stays = Math.abs(first.left - box.getBoundingClientRect().left) < 2;
  const table = {seen, stays, first: first.width, edge: getComputedStyle(box).backgroundImage.includes("gradient"),
                 lines: heads[0].parentNode.clientHeight / 24};
  const said = {wide, broken, table, dark: matchMedia("(prefers-color-scheme: dark)").matches, axe: !!window.axe,
                bad: bad.map(v => v.id + ": " + v.nodes.slice(0, 2).map(n => n.html.slice(0, 90)).join(" | "))};
  out.textContent = JSON.stringify(said); document.body.append(out);
});
</script>"""


@pytest.fixture(scope="module")
def page(measured):
    from dfssd.report.html import render
    from dfssd.report.pictures import write_detection_sheet

    config, run, results = measured
    write_detection_sheet(config, run, results, {"student": "student"})
    return render(config, run, results)


def test_the_report_is_one_file_with_all_sections(page, tmp_path):
    import re
    from html.parser import HTMLParser

    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", page) and "url(" not in page and "@import" not in page
    for words in ('lang="en"', "viewport", "Operating point", "Worst misses", "Side by side", "--max-escape", "Confusion",
                  "Calibration", "Time a stage", "near-duplicate", "All settings", "prefers-color-scheme", "@media print",
                  "Val chose weights and scores"):  # fmt: skip
        assert words in page, words
    ids = re.findall(r'id="(\w+)"', page)
    links = re.findall(r'href="#(\w+)"', page)
    assert len(ids) == len(set(ids)) and set(links) <= set(ids) and len(links) >= 9
    HTMLParser().feed(page)


@pytest.mark.parametrize("dark", [False, True])
def test_the_report_in_a_browser(page, tmp_path, dark):
    """Headless Chromium, two widths: no console error, no request outside, nothing wider than the page, axe (where it is)."""
    import json
    import os
    import re
    import subprocess
    from html import unescape

    browser = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), "")
    if not browser:
        pytest.skip("no Chromium")
    axe = Path(os.environ.get("AXE_JS", "node_modules/axe-core/axe.min.js"))
    code = axe.read_text() if axe.exists() else ""
    file = tmp_path / "report.html"
    file.write_text(page.replace("</body>", PROBE % code.replace("%", "%%").replace("%%", "%") + "</body>"))
    for width in (1280, 500):
        done = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=20000",
             f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
             "--host-resolver-rules=MAP * ~NOTFOUND", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
             "--disable-dev-shm-usage", "--dump-dom", file.as_uri()],
            capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        probe = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
        assert probe, (done.returncode, done.stdout[-500:], done.stderr[-3000:])
        said = json.loads(unescape(probe[1]))
        assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert said["dark"] == dark and said["wide"] <= 0 and said["broken"] == 0 and not said["bad"], said
        table = said["table"]  # scrolls under its first column, and shows that; what the line asks for comes first
        assert table["seen"][:3] == ["model", "escapes", "rejects"] and table["edge"] and table["stays"], table
        assert table["first"] > 80 and table["lines"] < 5, table


def _the_point_is_that_of_the_line(file, manifest, measured):
    """The exported file, asked picture by picture as `dfssd predict` asks it, decides what the report counted; and its own
    scores on val give the report's score. Scores of the rectangular batches of `yolo val` are others."""

    from dfssd.data.images import open_image
    from dfssd.line.detector import LineDetector

    line, point = LineDetector(file, 1), measured["operating_point"]
    for split in ("val", "test"):
        rows = [r for r in manifest.of_split(split) if r.boxes is not None]
        pictures = [open_image(Path(r.uri).read_bytes()) for r in rows]
        rejected = [len(line([p])[0]) > 0 for p in pictures]
        for kind, wrong in (("escape", False), ("overkill", True)):
            counted = [
                r for r, hit in zip(rows, rejected, strict=True) if hit is wrong and (len(r.boxes) > 0) is not wrong
            ]
            assert measured[split]["line"][kind]["count"] == len(counted), (split, kind)
        if split == "val":
            low = np.full(len(manifest.names), 0.01)
            best = sorted(
                line([p], low)[0][:, 4].max(initial=0) for p, r in zip(pictures, rows, strict=True) if len(r.boxes)
            )
            allowed = int(point["max_escape"] * len(best))
            assert point["score"] == pytest.approx(max(best[allowed], 0.01), abs=1.1e-3)


def _a_pt_brings_the_point_of_its_run(config, weights, results, folder):
    """Once its run has a report, best.pt has a size and an operating point, and it is said which pictures it knows."""
    from dfssd.evaluate.files import measure_files

    run = Storage(str(weights.parents[1]))
    digest = run.at("label_only").digest("best.pt")
    run.write_json("dataset/stage.json", {**run.read_json("dataset/stage.json"), "digest": "0"})
    record = {"inputs": {"dataset": "0"}, "outputs": {"best.pt": digest}, "digest": "1", "summary": {}}
    run.write_json("label_only/stage.json", record)
    run.write_json("report/metrics.json", results)
    run.write_json("report/stage.json", {"inputs": {"label_only": "1"}})
    other = config.model_copy(update={"train": config.train.model_copy(update={"imgsz": 640})})
    [one] = measure_files(other, [str(weights)], folder).values()
    assert one["operating_point"] == results["label_only"]["operating_point"] and one["imgsz"] == 64
    train, val = (len(read_manifest(run.at("dataset")).of_split(split)) for split in ("train", "val"))
    assert one["seen"] == {"trained": train, "labels": train, "chose": val}
    assert any(f"{train} of these" in note and "its numbers flatter" in note for note in one["remarks"])


def _labels_without_names_have_those_of_the_models(config, files, folder, capsys):
    """A new batch, labelled as text files: nothing says what its classes are called but the models."""
    from dfssd.evaluate.files import measure_files, plan_files

    manifest = read_manifest(Storage(config.run.storage_path).at("r", "dataset"))
    rows = [row for row in manifest.rows if row.boxes is not None][:5]  # too few for splits, which nobody asks for
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for row in rows:
        name = Path(shutil.copy(row.uri, folder / "images")).stem
        lines = (f"{int(b[0])} {b[1]} {b[2]} {b[3]} {b[4]}\n" for b in row.boxes)
        (folder / "labels" / f"{name}.txt").write_text("".join(lines))
    measured = measure_files(config, files, str(folder))
    assert "the labels have no class names: their numbers are taken for " in capsys.readouterr().out
    names = {manifest.names[int(box[0])] for row in rows for box in row.boxes}
    assert names and all(names <= set(one["by_class"]) for one in measured.values())
    assert all("called as the model's" in line for line in plan_files(config, files, str(folder)))
    packed = shutil.make_archive(str(folder.parent / "new"), "zip", folder)
    settings = {"split": "given", "val_from_labels": True, "unlabelled": ("none",)}  # of a run, by --config
    of_run = config.model_copy(update={"data": config.data.model_copy(update=settings)})
    own = folder.parent / "temporary"
    own.mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tempfile, "tempdir", str(own))
        again = measure_files(of_run, files[1:], packed)[files[1]]
    assert again["line"] == measured[files[1]]["line"] and not list(own.iterdir()), "a .zip is unpacked and taken away"
    given = config.model_copy(update={"data": config.data.model_copy(update={"names": ("x", "y", "z", "u", "v", "w")})})
    with pytest.raises(DfssdError, match="no class of the model is among the labels"):
        measure_files(given, files, str(folder))


def test_model_files_on_a_split_and_on_a_folder(trained, measured, strip, tmp_path, capsys):
    """A .pt and its .onnx give the same numbers; a folder in another format is read as prepare reads it."""
    from dfssd.evaluate.files import measure_files
    from dfssd.export.onnx_model import onnx_bytes
    from dfssd.report.terminal import print_files

    config, _, results = measured
    storage, _ = trained
    weights = storage / "r" / "label_only" / "best.pt"
    net = load_detector(weights.read_bytes(), "best.pt", 64).fuse(verbose=False)
    names = [net.names[k] for k in sorted(net.names)]
    point = results["label_only"]["operating_point"]
    file = tmp_path / "m.onnx"
    file.write_bytes(onnx_bytes(net, 64, {"names": names, "imgsz": 64, "operating_point": point}))
    found = measure_files(config, [str(weights), str(file)], "test")
    one, two = found.values()
    assert one["map50_95"] == pytest.approx(two["map50_95"], abs=1e-3)
    assert any("nobody knows whether its training pictures are among these" in note for note in two["remarks"])
    assert two["operating_point"] == point and one["operating_point"]["chosen_on"] == "val"
    _the_point_is_that_of_the_line(
        file, read_manifest(Storage(str(storage / "r")).at("dataset")), results["label_only"]
    )
    wide = config.model_copy(update={"train": config.train.model_copy(update={"imgsz": 96})})
    everything = measure_files(wide, [str(file)], str(strip), ("train.imgsz",))[str(file)]
    assert any("takes 64 px: --imgsz 96 has no effect on it" in note for note in everything["remarks"])
    assert everything["imgsz"] == 64
    assert sum(c["boxes"] for c in everything["by_class"].values()) > sum(c["boxes"] for c in two["by_class"].values())
    print_files(found, "test")
    assert "chosen on val" in capsys.readouterr().out
    _labels_without_names_have_those_of_the_models(config, [str(weights), str(file)], tmp_path / "new", capsys)
    _a_pt_brings_the_point_of_its_run(config, weights, results, str(strip))
    for files, on, said in (
        (["none.pt"], "test", "no such model"),
        ([str(file)], "tets", "did you mean 'test'"),
        ([str(file)], str(tmp_path / "none"), "no split and no folder"),
    ):
        with pytest.raises(DfssdError, match=said):
            measure_files(config, files, on)
