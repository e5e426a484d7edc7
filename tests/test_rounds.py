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
from dfssd.pipeline import run as runner
from dfssd.pipeline.labelling import who_labels
from dfssd.pipeline.stages import finished_models
from dfssd.pipeline.training import train_job
from dfssd.runtime.artefact_names import (
    DATASET,
    LABEL_ONLY,
    MEAN_TEACHER,
    PSEUDO,
    QUALITY,
    STUDENT,
    TEACHER,
    ArtefactName,
    newest_round,
)
from dfssd.runtime.storage import Storage
from dfssd.train.in_process import train_in_process

ROOT = Path(__file__).parents[1]


def test_names():
    assert [str(TEACHER.of_round(n)) for n in (1, 2, 3)] == ["teacher", "teacher_2", "teacher_3"]
    for folder in ("teacher", "pseudo_2", "label_only", "student", "quality_10", "mean_teacher_2"):
        assert str(ArtefactName.parse(folder)) == folder
    assert ArtefactName.parse("label_only") == LABEL_ONLY and ArtefactName.parse("teacher_2") == TEACHER.of_round(2)


def _finish(run, name, value=0.0):
    run.write_json(f"{name}/stage.json", {"digest": name, "summary": {"best": {"map50_95": value}}})


def inputs_of(config, run, name):
    return stages.make_stage(config, run, name).inputs


def test_the_student_reads_the_newest_round_that_has_labels(tmp_path):
    run = Storage(str(tmp_path)).at("r")
    config = tiny_config(tmp_path)
    two = [name.of_round(2) for name in (TEACHER, PSEUDO, QUALITY)]
    for name in (TEACHER, PSEUDO):
        _finish(run, name)
    assert inputs_of(config, run, STUDENT) == (DATASET, TEACHER, PSEUDO)
    _finish(run, two[0])
    assert newest_round(run) == 1 and finished_models(run) == [TEACHER, two[0]]
    _finish(run, two[1])
    assert inputs_of(config, run, STUDENT) == (DATASET, two[0], two[1])
    assert inputs_of(config, run, two[0]) == (DATASET, PSEUDO)
    assert inputs_of(config, run, LABEL_ONLY) == (DATASET,)
    alone = config.model_copy(update={"distill": Distill(lambda_p=0, lambda_l=0, lambda_f=0)})
    assert inputs_of(alone, run, STUDENT) == (DATASET, two[1])  # no teacher in the loop
    assert inputs_of(config, run, two[1]) == (DATASET, two[0])
    assert inputs_of(config, run, two[2]) == (DATASET, two[1])


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
    run, done = Storage(str(tmp_path)).at("r"), []

    def run_stage(context, name):
        done.append(str(name))
        _finish(context.run, name, scores.get(str(name), 0.0))

    monkeypatch.setattr(runner, "_run_settled", run_stage)
    runner.run_stages(config, [DATASET, TEACHER, PSEUDO, QUALITY, STUDENT])
    assert f"teacher_{ran}" in done and f"teacher_{ran + 1}" not in done and done[-1] == "student"
    assert newest_round(run) == used
    said = capsys.readouterr().out
    assert said.count("its labels are used") == used - 1 and said.count("no better") == ran - used


@pytest.mark.parametrize(("after", "used", "other"), [(0.31, MEAN_TEACHER, TEACHER), (0.3, TEACHER, MEAN_TEACHER)])
def test_it_is_said_which_teacher_labels_and_why(tmp_path, after, used, other):
    run = Storage(str(tmp_path)).at("r")
    run.write_json(f"{TEACHER}/stage.json", {"digest": "t", "summary": {}})
    assert who_labels(run, 1) == "", "one alone is asked for nothing"
    _finish(run, TEACHER, 0.3)
    assert who_labels(run, 1) == ""
    _finish(run, MEAN_TEACHER, after)
    said = who_labels(run, 1)
    assert said.startswith(f"{used} labels and teaches") and f"; {other} 0.3000" in said
    assert stages.best_teacher(run, 1) == used


def test_a_later_teacher_learns_from_labels_and_pseudo_labels_but_is_not_distilled(prepared):
    give_teacher_and_candidates(prepared)
    run, config = Storage(str(prepared / "r")), tiny_config(prepared, steps=2, val_every=2)
    job = train_job(config, run, TEACHER.of_round(2), pseudo=PSEUDO)
    train_in_process(job)
    step = job.store.read_json("history.json")[0]
    terms = {k.split("/")[1] for k in step if k.startswith("loss/")}
    assert terms == {"sup", "pse", "total"} and step["pse/pseudo_labels"] > 0
    counts = stages.settings_of(config, TEACHER.of_round(2))
    assert "lambda_f" not in counts["distill"] and "thresholds" in counts
    assert "distill" not in stages.settings_of(config, TEACHER)


def test_a_teacher_without_patience_stops_early_and_the_student_never_does(prepared):
    """With a learning rate of next to nothing validation cannot improve after the first time."""
    still = {"steps": 8, "val_every": 2, "lr": 1e-12, "teacher_patience": 2}
    give_teacher_and_candidates(prepared)
    result = train_in_process(make_job("teacher", str(prepared / "r"), tiny_config(prepared, **still)))
    assert result["steps"] < 8
    history = Storage(str(prepared / "r")).read_json("teacher/history.json")
    curve = [h["val/map50_95"] for h in history if "val/map50_95" in h]
    assert max(curve[-2:]) <= max(curve[:-2])  # two validations in a row without a better one
    result = train_in_process(make_job("label_only", str(prepared / "r"), tiny_config(prepared, **still)))
    assert result["steps"] == 8


def test_label_teachers_are_part_of_what_a_labelling_depends_on(tmp_path):
    from dfssd.models.yolo.detector import build_detector, detector_bytes

    run = Storage(str(tmp_path)).at("r")
    for k in range(2):
        (tmp_path / f"{k}.pt").write_bytes(detector_bytes(build_detector("yolov8n.yaml", ["pit"], 64), {"k": k}))
    one, two, other = (
        stages.make_stage(tiny_config(tmp_path, label_teachers=files), run, PSEUDO)
        for files in ((f"{tmp_path}/0.pt",), (f"{tmp_path}/0.pt", f"{tmp_path}/1.pt"), (f"{tmp_path}/1.pt",))
    )
    assert one.inputs == (DATASET,) and len(two.config["pseudo"]["label_teachers"]) == 2 and one.config != other.config
    own = stages.make_stage(tiny_config(tmp_path), run, PSEUDO)
    assert own.inputs == (DATASET, TEACHER) and own.config["pseudo"]["label_teachers"] == []
    with pytest.raises(DfssdError, match="has no weights, so it cannot label"):
        stages.make_stage(tiny_config(tmp_path, label_teachers=("yolov8n.yaml",)), run, PSEUDO)


WITH_BETTER_TEACHERS = """
import sys
import dfssd.pipeline.stages as stages
stages.val_score = lambda run, name: name.round  # eight steps teach nothing: pretend that they did
from dfssd.cli import run
run("pipeline")
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
    assert [str(m) for m in finished_models(run)] == ["teacher", "teacher_2", "student"] and newest_round(run) == 2
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
