"""Rounds: what each stage of a later round reads, that a teacher learns from its own labels, and when there is no next."""

import subprocess
import sys
from pathlib import Path

import pytest
from small import give_teacher_and_candidates, make_job, tiny_config

import dfssd.pipeline.stages as stages
from dfssd.config import Distill
from dfssd.data.manifest import read_table
from dfssd.errors import DfssdError
from dfssd.runtime.artefact_names import finished_models, improved, in_round, newest_round, split_round
from dfssd.runtime.storage import Storage
from dfssd.train.in_process import train_in_process
from dfssd.train.job import TrainJob, stage_config

ROOT = Path(__file__).parents[1]


def test_names():
    assert [in_round("teacher", n) for n in (1, 2, 3)] == ["teacher", "teacher_2", "teacher_3"]
    for name in ("teacher", "pseudo_2", "label_only", "student", "quality_10"):
        assert in_round(*split_round(name)) == name
    assert split_round("label_only") == ("label_only", 1)


def _finish(run, name, value=0.0):
    run.write_json(f"{name}/stage.json", {"digest": name, "summary": {"best": {"map50_95": value}}})


def test_the_student_reads_the_newest_round_that_has_labels(tmp_path):
    run = Storage(str(tmp_path)).at("r")
    config = tiny_config(tmp_path)
    for name in ("teacher", "pseudo"):
        _finish(run, name)
    assert stages.training_inputs(config, run, "student") == ("dataset", "teacher", "pseudo")
    _finish(run, "teacher_2")
    assert newest_round(run) == 1 and finished_models(run) == ["teacher", "teacher_2"]
    _finish(run, "pseudo_2")
    assert stages.training_inputs(config, run, "student") == ("dataset", "teacher_2", "pseudo_2")
    assert stages.training_inputs(config, run, "teacher_2") == ("dataset", "pseudo")
    assert stages.training_inputs(config, run, "label_only") == ("dataset",)
    alone = config.model_copy(update={"distill": Distill(lambda_p=0, lambda_l=0, lambda_f=0)})
    assert stages.training_inputs(alone, run, "student") == ("dataset", "pseudo_2")  # no teacher in the loop
    assert stages.make_stage(config, run, "pseudo_2").inputs == ("dataset", "teacher_2")
    assert stages.make_stage(config, run, "quality_2").inputs == ("dataset", "pseudo_2")


@pytest.mark.parametrize(
    ("scores", "ran", "used"),
    [
        ({"teacher": 0.2, "teacher_2": 0.3, "teacher_3": 0.4}, 3, 3),
        ({"teacher": 0.2, "teacher_2": 0.3, "teacher_3": 0.3}, 3, 2),
        ({"teacher": 0.2, "teacher_2": 0.1}, 2, 1),
    ],
)
def test_rounds_stop_where_validation_no_longer_improves(tmp_path, monkeypatch, capsys, scores, ran, used):
    config = tiny_config(tmp_path).model_copy(update={"rounds": 3})
    context = stages.Context(config)
    done = []

    def run_stage(context, name):
        done.append(name)
        _finish(context.run, name, scores.get(name, 0.0))

    monkeypatch.setattr(stages, "run_stage", run_stage)
    for name in ("teacher", "pseudo"):
        run_stage(context, name)
    stages.later_rounds(context)
    assert f"teacher_{ran}" in done and f"teacher_{ran + 1}" not in done
    assert newest_round(context.run) == used
    said = capsys.readouterr().out
    assert said.count("its labels are used") == used - 1 and said.count("no better") == ran - used
    if used == ran:
        assert improved(context.run, ran)


def test_a_later_teacher_learns_from_labels_and_pseudo_labels_but_is_not_distilled(prepared):
    give_teacher_and_candidates(prepared)
    job = TrainJob("teacher_2", str(prepared / "r"), tiny_config(prepared, steps=2, val_every=2), pseudo="pseudo")
    train_in_process(job)
    step = job.store.read_json("history.json")[0]
    terms = {k.split("/")[1] for k in step if k.startswith("loss/")}
    assert terms == {"sup", "pse", "total"} and step["pse/pseudo_labels"] > 0
    config = stage_config(job.config, "teacher_2")
    assert "distill" in config and "lambda_f" not in config["distill"] and "thresholds" in config
    assert "distill" not in stage_config(job.config, "teacher")


def test_a_teacher_without_patience_stops_early_and_the_student_never_does(prepared):
    """With a learning rate of next to nothing validation cannot improve after the first time."""
    still = {"steps": 8, "val_every": 1, "lr": 1e-12, "teacher_patience": 2}
    give_teacher_and_candidates(prepared)
    result = train_in_process(make_job("teacher", str(prepared / "r"), tiny_config(prepared, **still)))
    assert result["steps"] < 8
    history = Storage(str(prepared / "r")).read_json("teacher/history.json")
    curve = [h["val/map50_95"] for h in history if "val/map50_95" in h]
    assert max(curve[-2:]) <= max(curve[:-2])  # two validations in a row without a better one
    result = train_in_process(make_job("label_only", str(prepared / "r"), tiny_config(prepared, **still)))
    assert result["steps"] == 8


def test_label_teachers_are_part_of_what_a_labelling_depends_on(tmp_path):
    from dfssd.models.detector import build_detector, detector_bytes

    run = Storage(str(tmp_path)).at("r")
    for k in range(2):
        (tmp_path / f"{k}.pt").write_bytes(detector_bytes(build_detector("yolov8n.yaml", ["pit"], 64), {"k": k}))
    one, two, other = (
        stages.make_stage(tiny_config(tmp_path, label_teachers=files), run, "pseudo")
        for files in ((f"{tmp_path}/0.pt",), (f"{tmp_path}/0.pt", f"{tmp_path}/1.pt"), (f"{tmp_path}/1.pt",))
    )
    assert one.inputs == ("dataset",) and len(two.config["teachers"]) == 2 and one.config != other.config
    own = stages.make_stage(tiny_config(tmp_path), run, "pseudo")
    assert own.inputs == ("dataset", "teacher") and "teachers" not in own.config
    with pytest.raises(DfssdError, match="has no weights, so it cannot label"):
        stages.make_stage(tiny_config(tmp_path, label_teachers=("yolov8n.yaml",)), run, "pseudo")


WITH_BETTER_TEACHERS = """
import sys
import dfssd.pipeline.stages as stages
stages.improved = lambda run, number: True  # eight steps teach nothing: pretend that they did
from dfssd.cli import main
sys.path.insert(0, "jobs")
import pipeline
main(pipeline.job)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_whole_rounds_leave_their_artefacts_and_the_student_learns_from_the_second(strip, tmp_path):
    flags = "--run-name p --label-fraction 0.4 --imgsz 64 --batch 4 --steps 8 --val-every 4 --rounds 2 --no-baseline"
    more = "--teacher yolov8s.yaml --gpu never --latency-repeats 3 --tta none"
    args = ["--data", str(strip), "--storage-path", str(tmp_path), *flags.split(), *more.split()]
    done = subprocess.run([sys.executable, "-c", WITH_BETTER_TEACHERS, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    run = Storage(str(tmp_path)).at("p")
    assert finished_models(run) == ["teacher", "teacher_2", "student"] and newest_round(run) == 2
    assert set(run.read_json("student/stage.json")["inputs"]) == {"dataset", "teacher_2", "pseudo_2"}
    assert set(run.read_json("pseudo_2/stage.json")["inputs"]) == {"dataset", "teacher_2"}
    digests = [run.read_json(f"{name}/stage.json")["outputs"]["best.pt"]["sha256"] for name in ("teacher", "teacher_2")]
    assert digests[0] != digests[1]
    shards = [f for f in run.at("pseudo_2").files() if f.startswith("shard")]
    used = {t for f in shards for t in read_table(run.at("pseudo_2"), f)["teacher"].to_pylist()}
    assert used == {digests[1][:16]}
    page = run.read("report/report.html").decode()
    assert "Pseudo-labels, round 2" in page and "teacher, round 2" in page
    assert "no gate: there is no label-only student" in done.stdout
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("dfssd")
    stages_run = {r.data.tags.get("stage") for r in client.search_runs([experiment.experiment_id])}
    assert {"teacher", "pseudo", "quality", "teacher_2", "pseudo_2", "quality_2", "student"} <= stages_run
