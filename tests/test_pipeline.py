"""The whole path as a user types it, killed in the middle and started again."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from held import MARK, end_all, held
from small import narrow_layout

from dfssd.config.file import read_config

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(1200)  # the first test waits for three starts of the pipeline


def _command(strip, storage, *more):
    settings = (
        "--label-fraction 0.4 --imgsz 64 --batch 4 --steps 8 --val-every 4 --log-every 1 --num-workers 1 --gpu never"
    )
    models = f"--teacher yolov8n.yaml --student {narrow_layout(storage)} --latency-repeats 3"
    args = ["--data", str(strip), "--storage-path", str(storage), "--run-name", "p", *settings.split(), *models.split()]
    return [sys.executable, str(ROOT / "jobs" / "pipeline.py"), *args, *more]


def _start(command, log):
    env = {**os.environ, "PYTHONUNBUFFERED": "1", MARK: str(log.parent)}
    return subprocess.Popen(
        command, cwd=ROOT, stdout=log.open("w"), stderr=subprocess.STDOUT, env=env, start_new_session=True
    )


def _wait_for(log, process, text, limit_s=240):
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if text in log.read_text():
            return
        assert process.poll() is None, f"ended before {text!r}:\n{log.read_text()[-3000:]}"
        time.sleep(0.2)
    raise AssertionError(f"{text!r} did not come:\n{log.read_text()[-3000:]}")


STAGES = ("dataset", "teacher", "mean_teacher", "label_only", "pseudo", "quality", "student", "report", "export")


@pytest.fixture(scope="module")
def finished(strip, tmp_path_factory):
    """A pipeline killed inside the teacher's training, interrupted inside the student's, then finished."""
    storage = tmp_path_factory.mktemp("pipeline")
    logs = []
    for number, (stage, reached) in enumerate(
        [("teacher", "teacher: step 5/8"), ("student", "student: step 3/8"), ("", "")]
    ):
        log, record = storage / f"log{number}", storage / "p" / stage / "stage.json"
        with (
            held(record) if stage else nullcontext()
        ):  # the stage cannot finish before its fault, however late that comes
            process = _start(_command(strip, storage), log)
            try:
                _meet_its_end(process, log, stage, reached)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        assert not stage or not record.exists()
        end_all(str(storage))
        logs.append(log.read_text())
    return storage, logs


def _meet_its_end(process, log, stage, reached):
    if stage:
        _wait_for(log, process, reached)
    if stage == "teacher":
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    elif stage:  # Ctrl-C: an orderly end, which must not be taken for success
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=200) == 130, log.read_text()[-3000:]
        assert "the same command goes on from here" in log.read_text()
    else:
        assert process.wait(timeout=600) == 0, log.read_text()[-4000:]


def test_finished_stages_are_skipped_and_the_interrupted_one_goes_on(finished):
    _, (first, second, third) = finished
    assert "dataset: starts" in first and "dataset: finished" in second and "skipped" in second
    # The workers of a killed driver live for a moment longer, so a later checkpoint may be there than the log told.
    assert "teacher: goes on" in second and re.search(r"teacher: resumed at step [48] of 8", second)
    assert "student: goes on" in third and re.search(r"student: resumed at step [3-8] of 8", third)
    for stage in ("teacher", "label_only", "pseudo"):
        assert f"{stage}: starts" not in third and f"{stage}: goes on" not in third
    # Ray's clean-up actor complains where another Ray runs on the same machine; that is not ours to test.
    ours = [line for line in third.splitlines() if "PlacementGroupCleaner" not in line]
    assert not [ours[k : k + 40] for k, line in enumerate(ours) if "Traceback" in line]


def test_every_stage_leaves_its_artefact(finished):
    storage, _ = finished
    whole = read_config(str(storage / "p" / "settings.json"))  # which --config takes for another run
    assert (whole.run.run_name, whole.data.label_fraction, whole.train.batch) == ("p", 0.4, 4)
    run = storage / "p"
    for stage in STAGES:
        record = json.loads((run / stage / "stage.json").read_text())
        assert record["outputs"] and record["code_version"] and record["config"]
        for name, entry in record["outputs"].items():
            assert (run / stage / name).stat().st_size == entry["bytes"]
    for name in ("manifest.parquet", "withheld.parquet", "bad_files.parquet", "groups.png", "split.csv"):
        assert (run / "dataset" / name).exists()
    page = (run / "report" / "report.html").read_text()
    assert page.count("data:image/") >= 5 and "mAP50" in page


def test_metrics_json(finished):
    storage, logs = finished
    metrics = json.loads((storage / "p" / "report" / "metrics.json").read_text())
    for model in ("teacher", "label_only", "student"):
        one = metrics[model]
        assert 0 <= one["test"]["map50_95"] <= one["test"]["map50"] <= 1
        assert one["latency_ms"] > 0
    assert metrics["student"]["params"] == metrics["label_only"]["params"] < metrics["teacher"]["params"]
    gate = metrics["gate"]["map50_95"]
    assert gate["difference"] == pytest.approx(gate["student"] - gate["label_only"]) and gate["low"] <= gate["high"]
    assert "The unlabelled images" in logs[2] and "policy 'gmm'" in logs[1]
    for word in ("student, distilled", "report.html", "mlflow ui --backend-store-uri", "yolo predict model="):
        assert word in logs[2]


def test_one_loss_curve_per_stage_however_often_it_was_killed(finished):
    storage, _ = finished
    for stage in ("teacher", "student", "label_only"):
        history = json.loads((storage / "p" / stage / "history.json").read_text())
        assert [h["step"] for h in history if "loss/total" in h] == list(range(1, 9))
    student = [h for h in history if "loss/total" in h]
    assert student
    history = json.loads((storage / "p" / "student" / "history.json").read_text())
    want = {
        "loss/sup/box",
        "loss/pred/cls",
        "loss/feat/pkd",
        "lr",
        "speed (img/s)",
        "time/data wait (s)",
        "threshold/pit",
    }
    assert want <= set(history[0])


def test_mlflow_has_one_nested_run_a_stage(finished):
    from mlflow import MlflowClient

    storage, _ = finished
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("dfssd")
    runs = client.search_runs([experiment.experiment_id])
    parent = json.loads((storage / "p" / "run.json").read_text())["mlflow_run_id"]
    children = {r.data.tags["stage"]: r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent}
    assert set(children) == set(STAGES)
    assert len(runs) == len(STAGES) + 1
    assert all(r.info.status == "FINISHED" for r in runs)
    assert client.get_run(parent).data.params["train.imgsz"] == "64"
    student = children["student"]
    assert "loss/feat/pkd" in student.data.metrics and "val/map50" in student.data.metrics
    assert student.data.params["distill.lambda_f"] == "1.0" and student.inputs.dataset_inputs
    table = [line for line in (ROOT / "docs" / "runs.md").read_text().splitlines() if line.startswith("| `")]
    documented = set(re.findall(r"`([a-z]+)[/ `]", "\n".join(table)))
    for one in runs:
        assert {key.split("/")[0].split(" ")[0] for key in one.data.metrics} <= documented, one.info.run_name
        assert {"run_name", "code", "mlflow.user", "mlflow.source.name"} <= set(one.data.tags)
        assert [i.dataset.name for i in one.inputs.dataset_inputs] == ["manifest"], one.info.run_name
    names = {a.path for a in client.list_artifacts(children["report"].info.run_id)}
    assert {"report.html", "detections.png", "metrics.json", "stage.json"} <= names


def test_again_is_instant_and_other_settings_are_refused(finished, strip):
    storage, _ = finished
    before = _work_of_children()
    again = subprocess.run(_command(strip, storage), capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert again.returncode == 0 and again.stdout.count("skipped") == len(STAGES), again.stdout + again.stderr[-3000:]
    assert _work_of_children() - before < 60
    other = subprocess.run(
        _command(strip, storage, "--lr", "0.01"), capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert other.returncode == 2 and "config.train.lr: 0.002 -> 0.01" in other.stderr and "--overwrite" in other.stderr


def _work_of_children():
    """Seconds of a processor, whatever else runs beside."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def test_pseudo_labels_are_whole_and_resumable(finished, local_ray):
    """A lost shard is labelled again, to the same boxes; the others are not touched."""
    import numpy as np
    from small import tiny_config

    from dfssd.data.manifest import read_manifest, read_pseudo
    from dfssd.pseudo import labeller
    from dfssd.runtime.storage import Storage

    storage, _ = finished
    run = Storage(str(storage / "p"))
    manifest = read_manifest(run.at("dataset"))
    before = read_pseudo(run.at("pseudo"))
    assert set(before) == {r.image_id for r in manifest.unlabelled_rows()}
    run.at("pseudo").delete("shard-00000.parquet")
    labeller.label(
        tiny_config(storage, amp="auto"), run, "pseudo", manifest, ["teacher/best.pt"], lambda metrics, step: None
    )
    after = read_pseudo(run.at("pseudo"))
    assert set(after) == set(before)
    for key in before:
        np.testing.assert_allclose(after[key], before[key], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_fully_labelled_data_take_the_shorter_way_to_the_end(strip, tmp_path):
    """Every image labelled, two rounds asked for: the plan and the run leave the same out, and the report stands."""
    words = [w for w in _command(strip, tmp_path, "--rounds", "2") if w not in ("--label-fraction", "0.4")]
    log = tmp_path / "log"

    def run(*more):
        assert _start([*words, *more], log).wait(timeout=600) == 0, log.read_text()[-4000:]
        return log.read_text()

    left_out = {"mean_teacher", "pseudo", "quality", "teacher_2", "pseudo_2", "quality_2"}
    planned = re.findall(r"^\W*(\w+)\W+new\b", run("--dry-run"), re.M)
    assert planned == ["dataset", "teacher", "label_only", "student", "report", "export"]
    said = run()
    assert set(re.findall(r"^(\w+): left out, for no batch holds an unlabelled image$", said, re.M)) == left_out
    made = {f.parent.name for f in (tmp_path / "p").glob("*/stage.json")}
    assert made == set(planned)
    summary = json.loads((tmp_path / "p" / "student" / "stage.json").read_text())
    assert "pseudo" not in summary["inputs"] and "teacher" in summary["inputs"]
    losses = json.loads((tmp_path / "p" / "student" / "history.json").read_text())
    assert any("loss/feat/pkd" in row for row in losses) and not any("loss/pse/cls" in row for row in losses)
    assert 'id="pseudo"' not in (tmp_path / "p" / "report" / "report.html").read_text()
    assert run().count("skipped") == len(planned)
