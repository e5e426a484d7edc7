"""The table of stages: order, what counts, what is asked before anything is begun or deleted, and the dry run."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from small import give_teacher_and_candidates, tiny_config

from dfssd.config import SECTIONS, Config, Section
from dfssd.errors import DfssdError
from dfssd.pipeline import stages
from dfssd.pipeline.context import Context
from dfssd.pipeline.dry_run import dry_run
from dfssd.pipeline.run import run_stage, run_stages
from dfssd.pipeline.settings import FREE
from dfssd.pipeline.stages import ROWS, STAGES, make_stage, plan, resolve, settings_of, wanted
from dfssd.pipeline.training import train_job
from dfssd.runtime.artefact_names import (
    DATASET,
    EXPORT,
    LABEL_ONLY,
    MEAN_TEACHER,
    PSEUDO,
    QUALITY,
    REPORT,
    STUDENT,
    TEACHER,
    ArtefactName,
)
from dfssd.runtime.storage import Storage
from dfssd.train.in_process import train_in_process

KEYS = [f"{name}.{field}" for name, section in SECTIONS.items() for field in section.model_fields]
NAMES = [*(ArtefactName(row.role) for row in STAGES), *(ArtefactName(r.role, 2) for r in STAGES if r.in_rounds)]


def changed(config: Config, key: str) -> Config:
    """The config with another value of one setting, unchecked: only what counts is asked."""
    name, field = key.split(".")
    section = getattr(config, name)
    value = getattr(section, field)
    more = "x" if "str" in str(SECTIONS[name].model_fields[field].annotation) else 7
    other = {bool: lambda: not value, tuple: lambda: (*value, more)}.get(type(value), lambda: value * 2 + 1)
    new = f"{value}x" if isinstance(value, str) else other()
    return config.model_copy(update={name: section.model_copy(update={field: new})})


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
@pytest.mark.parametrize("name", NAMES, ids=str)
def test_what_counts_is_what_a_stage_reads_but_for_what_only_changes_speed(name, monkeypatch):
    monkeypatch.setattr("dfssd.pipeline.settings.given_weights", lambda spec: spec.encode())
    monkeypatch.setattr("dfssd.pipeline.data.content", lambda config: config.data.data)
    steps = {"train": {"teacher_steps": 5}, "mean_teacher": {"mean_teacher_steps": 5}}  # given, and so not --steps
    config = Config.model_validate(steps)
    row = ROWS[name.role]
    before = settings_of(config, name)
    counts = {key for key in KEYS if settings_of(changed(config, key), name) != before}
    assert counts == set(row.reads_in(name.round)) - FREE - set(row.free)


# Settings of terms that need a teacher in the loop: a teacher of a later round asks for them, and has none.
_NEED_A_TEACHER = {
    "lambda_p",
    "lambda_l",
    "lambda_f",
    "share_p",
    "share_f",
    "teacher_mode",
    "teacher_amp",
    "prediction",
}
IDLE = {f"distill.{k}" for k in (*_NEED_A_TEACHER, "teacher_lr_factor", "divergence", "taps", "teacher_taps")}
IDLE |= {
    f"distill.{k}" for k in ("feature_tau", "feature_schedule", "off_last", "loc_tau", "loc_top", "distill_teacher")
}
SET_BY_MEAN_TEACHER = {"train.lr", "train.ema_decay"} | {
    f"distill.{k}" for k in ("score_power", "lambda_u", "agreement_min")
}  # from settings of its own


@pytest.mark.parametrize("name", [TEACHER, TEACHER.of_round(2), MEAN_TEACHER, LABEL_ONLY, STUDENT], ids=str)
def test_a_training_reads_no_setting_that_its_row_does_not_name(name, prepared, monkeypatch):
    """Every read of a setting is recorded while the stage trains: what a result depends on is in its key."""
    give_teacher_and_candidates(prepared)
    config = tiny_config(prepared, steps=2, val_every=2)
    inputs = {STUDENT: {"teacher": TEACHER, "pseudo": PSEUDO}, TEACHER.of_round(2): {"pseudo": PSEUDO}}.get(name, {})
    run = Storage(str(prepared / "r"))
    job, read = train_job(config, run, name, **inputs), set()
    if job.labels_itself:
        job.store.write("init.pt", run.read("teacher/best.pt"))
    sections = {section: key for key, section in SECTIONS.items()}

    def record(self, attribute):
        key = f"{sections.get(type(self))}.{attribute}"
        if key in KEYS:
            read.add(key)
        return BaseModel.__getattribute__(self, attribute)

    monkeypatch.setattr(Section, "__getattribute__", record, raising=False)
    train_in_process(job)
    monkeypatch.undo()
    assert {"train.lr", "train.imgsz", "run.seed"} <= read
    idle = set() if name == STUDENT else IDLE
    if job.labels_itself:
        idle = IDLE | SET_BY_MEAN_TEACHER
    assert read <= set(ROWS[name.role].reads_in(name.round)) | idle, read - set(ROWS[name.role].reads_in(name.round))


def test_a_later_teacher_depends_on_the_balance_of_its_pseudo_label_loss():
    later, config = TEACHER.of_round(2), Config()
    for key in ("distill.balance", "distill.share_u"):
        assert settings_of(changed(config, key), later) != settings_of(config, later)
        assert settings_of(changed(config, key), TEACHER) == settings_of(config, TEACHER)


def test_every_row_can_be_run_and_reads_what_comes_before_it(tmp_path):
    run, config = Storage(str(tmp_path)), Config()
    seen = []
    for name in plan(config, wanted(config)):
        row = ROWS[name.role]
        assert callable(resolve(row.body)) and (not row.needs or callable(resolve(row.needs)))
        assert set(row.reads) <= {*KEYS, *Config.model_fields} and set(make_stage(config, run, name).inputs) <= set(
            seen
        )
        seen.append(name)
    assert len(ROWS) == len(STAGES)


def test_later_rounds_come_after_the_first():
    config = Config(rounds=2, baseline=False)
    names = list(plan(config, wanted(config)))
    later = [name for name in names if name.round > 1]
    ours = [TEACHER.of_round(2), PSEUDO.of_round(2), QUALITY.of_round(2)]
    assert [name for name in later if name in ours] == ours, "each in its order"
    assert [name for name in names if name.round == 1] == wanted(config) and LABEL_ONLY not in names
    at = names.index(later[0])
    assert names[at : at + len(later)] == later and names.index(QUALITY) < at < names.index(STUDENT)
    assert list(plan(config, [STUDENT])) == [STUDENT]


def test_the_better_teacher_on_val_labels_and_teaches(tmp_path, monkeypatch):
    """A second row that leaves a teacher: its labels are used where it is better, and it teaches the student."""
    import dataclasses

    other = ArtefactName("other")
    rows = (*STAGES, dataclasses.replace(ROWS["teacher"], role="other"))
    monkeypatch.setattr(stages, "STAGES", rows)
    run, config = Storage(str(tmp_path)), Config()

    def finish(name, value):
        run.write_json(f"{name}/stage.json", {"digest": "d", "summary": {"best": {"map50_95": value}}})

    assert make_stage(config, run, PSEUDO).inputs == (DATASET, TEACHER)
    finish(TEACHER, 0.3)
    finish(other, 0.3)
    assert make_stage(config, run, PSEUDO).inputs == (DATASET, TEACHER)
    finish(other, 0.4)
    assert make_stage(config, run, PSEUDO).inputs == (DATASET, other)
    assert make_stage(config, run, STUDENT).inputs == (DATASET, other, PSEUDO)
    assert stages.finished_models(run) == [TEACHER, other]


def run_of(config: Config) -> Storage:
    return Storage(config.run.storage_path).at(config.run.run_name)


def with_run(config: Config, **changes: object) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update=changes)})


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (DATASET, {"data": {"data": "/nowhere"}}, "the data is not there"),
        (TEACHER, {"models": {"teacher": "gone.pt"}}, "could not be fetched"),
    ],
    ids=str,
)
def test_overwrite_deletes_nothing_before_what_a_stage_needs_is_there(prepared, stage, changes, message):
    config = with_run(tiny_config(prepared), overwrite=True)
    run = run_of(config)
    if stage != DATASET:
        _finished(run, DATASET)
    _finished(run, stage, {"old": {"a": 1}})
    for name, values in changes.items():
        config = config.model_copy(update={name: getattr(config, name).model_copy(update=values)})
    before = run.files(str(stage))
    with pytest.raises(DfssdError, match=message):
        run_stage(Context(config), stage)
    assert run.files(str(stage)) == before and f"{stage}/stage.json" in before


@pytest.mark.parametrize("stage", [TEACHER, PSEUDO], ids=str)
def test_nothing_of_a_damaged_artefact_is_deleted_before_what_its_stage_needs_is_there(tmp_path, stage, monkeypatch):
    """The settings are the same, so that it was finished; --overwrite, or a damaged shard, makes it again."""
    monkeypatch.setattr("dfssd.pipeline.timing.time_step", lambda *args, **more: ("here", 0.1))
    config = with_run(tiny_config(tmp_path), overwrite=stage == TEACHER)
    run = run_of(config)
    for name in (DATASET, TEACHER):
        _finished(run, name)
    same = make_stage(config, run, stage)
    there, damaged = {TEACHER: ("last.pt", "best.pt"), PSEUDO: ("shard-0.parquet", "shard-1.parquet")}[stage]
    run.write(f"{stage}/{there}", b"whole")
    run.write(f"{stage}/{damaged}", b"cut")
    outputs = {name: {**run.digest(f"{stage}/{name}"), "bytes": 5} for name in (there, damaged)}
    record = (
        run.read_json(f"{stage}/stage.json") if run.exists(f"{stage}/stage.json") else {"digest": "d", "summary": {}}
    )
    run.write_json(f"{stage}/stage.json", {**record, **same.key(), "outputs": outputs})

    def missing(*asked):
        raise DfssdError("what it needs is not there")

    monkeypatch.setattr(f"{ROWS[stage.role].needs.replace(':', '.')}", missing)
    before = run.files(str(stage))
    for one in (config, with_run(config, dry_run=True)):
        with pytest.raises(DfssdError, match="what it needs is not there"):
            run_stages(one, [stage])
        assert run.files(str(stage)) == before and f"{stage}/stage.json" in before
    with pytest.raises(DfssdError, match="what it needs is not there"):
        run_stages(with_run(config, overwrite=True), [stage])
    assert run.files(str(stage)) == before
    if stage == TEACHER:
        with pytest.raises(DfssdError, match="it has 3 bytes, 5 were written"):
            run_stages(with_run(config, overwrite=False), [stage])


@pytest.fixture
def exporting(tmp_path, monkeypatch):
    """A run with a measured student, whose export writes a file a format without a network; and how to ask for it."""
    config = tiny_config(tmp_path)
    run, made, killed = run_of(config), [], []
    for name in (DATASET, STUDENT):
        _finished(run, name)
    run.write_json("report/metrics.json", {"environment": {"imgsz": config.train.imgsz}})
    _finished(run, REPORT)
    for name in ("check_settings", "check_formats"):
        monkeypatch.setattr(f"dfssd.pipeline.exporting.{name}", lambda *asked: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    registered = []
    monkeypatch.setattr("dfssd.pipeline.exporting.register_finished", lambda c, s: registered.append(c))

    def body(context, stage, run_id):
        asked = exporting_module._asked(context, stage).export
        names = [*asked.formats, *(["int8"] if asked.int8 else [])]
        made.append(names)
        if "tensorrt" in names:
            raise DfssdError("no parity")
        stage.store.delete("stage.json")  # as `export_model`: what it says is replaced from here on
        for name in names:
            stage.store.write(f"student.{name}", b"x")
            if killed:
                raise killed.pop()
        files = [f"student.{name}" for name in names]
        return {"model": "student"}, exporting_module._outputs(stage.store, {"model": "student", "files": files})[:-1]

    from dfssd.pipeline import exporting as exporting_module

    monkeypatch.setattr("dfssd.pipeline.exporting.export_stage", body)

    def ask(*formats, int8=False, overwrite=False, **more):
        export = config.export.model_copy(update={"formats": formats, "int8": int8, **more})
        context = Context(with_run(config.model_copy(update={"export": export}), overwrite=overwrite))
        context.runs.uri, context.log_dataset = "", lambda run_id: None
        return run_stage(context, EXPORT)

    ask.killed = killed  # errors, one of which ends the next attempt after its first file
    return ask, made, run, registered


def test_an_export_is_added_to_and_nothing_of_it_is_lost(exporting, capsys):
    """`dfssd export --formats openvino` after a pipeline that wrote ONNX, and the pipeline again after that."""
    ask, made, run, registered = exporting
    with pytest.raises(DfssdError, match="no parity"):
        ask("onnx", "tensorrt")
    ask("onnx")  # what failed is not asked for again in silence, and a first export has nothing to lose
    assert made == [["onnx", "tensorrt"], ["onnx"]]
    made.clear()
    ask("onnx")
    ask("openvino", int8=True)
    assert made[-1] == ["onnx", "openvino", "int8"] and "adds to what is there" in capsys.readouterr().out
    ask("onnx")  # the pipeline's own command, typed again
    assert len(made) == 1 and "skipped" in capsys.readouterr().out and len(registered) == 2
    with pytest.raises(DfssdError, match="no parity"):
        ask("tensorrt")
    assert {"student.onnx", "student.openvino", "student.int8", "stage.json"} <= set(run.at("export").files()), (
        "a failure loses nothing"
    )
    assert run.read_json("export/stage.json")["config"]["export"]["formats"] == ["onnx", "openvino"]
    ask("onnx")
    assert len(made) == 2, "and what was there is still finished"
    with pytest.raises(DfssdError, match=r"nms_inside: False -> True(?!.*formats)"):
        ask("onnx", nms_inside=True)
    ask("onnx", overwrite=True)
    assert made[-1] == ["onnx"] and not run.exists("export/student.openvino"), (
        "--overwrite makes what is asked for, no more"
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=repr)
def test_an_addition_that_was_killed_among_its_files_goes_on(exporting, error):
    """Its `stage.json` is gone then: what was finished before is known from where the addition began."""
    ask, made, run, _ = exporting
    ask("onnx", "openvino")
    for again in (["int8"], []):
        ask.killed.append(error)
        with pytest.raises(type(error)):
            ask("onnx", int8=True)
        assert not run.exists("export/stage.json"), "files are replaced"
        run.write("export/student.int8", b"half")
        ask("onnx", int8=bool(again))  # the same command, and the pipeline's
        assert made[-1] == ["onnx", "openvino", *again]
        assert run.exists("export/student.int8") == bool(again), "what an interrupted attempt left is no output"
        made.clear()
        ask("openvino", int8=bool(again))
        assert not made and run.read_json("export/stage.json")["config"]["export"]["formats"] == ["onnx", "openvino"]
        ask("onnx", "openvino", overwrite=True)
    ask.killed.append(error)
    with pytest.raises(type(error)):
        ask("onnx", nms_inside=True, overwrite=True)
    with pytest.raises(DfssdError, match=r"nms_inside: True -> False(?!.*formats)"):
        ask("onnx")
    assert made[-1] == ["onnx"], "other settings are still refused"


def test_export_again_with_overwrite_keeps_the_formats_that_are_there(exporting, monkeypatch, capsys):
    """As docs/line.md says it after another --max-escape; the export there may have been interrupted, too."""
    from dfssd.jobs import export, pipeline

    ask, _, run, _ = exporting
    asked = []
    monkeypatch.setattr("dfssd.pipeline.run.run_stages", lambda config, names: asked.append(config.export))
    for module in ("print_export", "print_results"):
        monkeypatch.setattr(f"dfssd.report.terminal.{module}", lambda config: None)

    def formats(*words, job=export.job):
        place = Path(run.path())
        job(["--storage-path", str(place.parent), "--run-name", place.name, *words])
        return [*asked[-1].formats, *(["int8"] if asked[-1].int8 else [])]

    assert formats("--overwrite") == ["onnx"], "there is none"
    ask("onnx", "openvino", int8=True)
    assert formats("--overwrite") == ["onnx", "openvino", "int8"]
    assert "formats: onnx, openvino, int8, with those of this export" in capsys.readouterr().out
    assert formats("--overwrite", "--data", "x", job=pipeline.job) == ["onnx", "openvino", "int8"]
    assert formats("--overwrite", "--no-int8") == ["onnx", "openvino"]
    assert formats("--overwrite", "--formats", "onnx") == formats() == ["onnx"], "exactly what is named"
    ask.killed.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        ask("tensor", overwrite=False, nms_inside=False)
    assert formats("--overwrite") == ["onnx", "openvino", "int8"]
    ask("onnx", "openvino", int8=True, overwrite=True, nms_inside=True)
    assert formats("--overwrite") == ["onnx", "openvino", "int8"] and asked[-1].nms_inside
    assert not (formats("--overwrite", "--no-nms-inside") and asked[-1].nms_inside)
    ask.killed.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):  # once what was there has been deleted
        ask("onnx", "openvino", int8=True, overwrite=True)
    assert formats("--overwrite") == ["onnx", "openvino", "int8"]
    run.write("export/stage.json", b"")
    assert formats("--overwrite") == ["onnx"] and "is lost" in capsys.readouterr().out


def test_a_format_that_is_there_is_not_said_to_be_asked_for(exporting, monkeypatch):
    """`dfssd export --int8` where the export holds OpenVINO, which is not installed here."""
    from dfssd.export.formats import check_formats

    ask, made, _, _ = exporting
    ask("onnx", "openvino")
    there = "dfssd.pipeline.exporting.check_settings"
    monkeypatch.setattr(there, lambda settings, there=(): check_formats(settings.formats, there))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        DfssdError, match=r"has openvino already.* needs openvino, which is not installed here"
    ) as error:
        ask("onnx", int8=True)
    assert "where openvino is installed" in error.value.todo and "leave" not in error.value.todo
    with pytest.raises(DfssdError, match="--formats openvino needs openvino") as error:
        ask("openvino", int8=True)
    assert "leave openvino out" in error.value.todo and len(made) == 1


def test_a_dry_run_sees_an_export_that_is_added_to_and_refuses_nothing(exporting):
    ask, _, run, _ = exporting
    ask("onnx")
    config = tiny_config(Path(run.path()).parent)
    stage = make_stage(
        config.model_copy(update={"export": config.export.model_copy(update={"int8": True})}), run, EXPORT
    )
    assert stage.state() == "added to" and stage.config["export"] == {**stage.config["export"], "formats": ["onnx"]}


def test_what_cannot_be_done_is_not_begun(tmp_path):
    """A stage that is begun remembers its inputs: one that could not work would refuse the next, right command."""
    config = tiny_config(tmp_path)
    _finished(run_of(config), DATASET)
    with pytest.raises(DfssdError, match="no finished model to measure"):
        run_stages(config, [REPORT])
    assert not run_of(config).files("report")


def _finished(run: Storage, name: ArtefactName, config: dict | None = None) -> None:
    record = {"config": config or {}, "inputs": {}, "digest": str(name), "outputs": {}}
    run.write_json(f"{name}/stage.json", {**record, "summary": {"images": 60, "best": {"map50_95": 0.1}}})


@pytest.mark.parametrize(
    ("stage", "there", "message"),
    [
        (REPORT, [DATASET], "no finished model to measure"),
        (REPORT, [], "needs the artefact 'dataset'"),
        (STUDENT, [DATASET], "needs the artefact 'teacher'"),
        (PSEUDO, [DATASET], "needs the artefact 'teacher'"),
        (PSEUDO, [TEACHER], "needs the artefact 'dataset'"),
    ],
    ids=str,
)
def test_the_dry_run_refuses_what_the_command_refuses(tmp_path, stage, there, message):
    config = tiny_config(tmp_path)
    for name in there:
        _finished(run_of(config), name)
    for one in (config, with_run(config, dry_run=True)):
        with pytest.raises(DfssdError, match=message):
            run_stages(one, [stage])


def test_the_dry_run_says_what_will_be_made_again(prepared, capsys, monkeypatch):
    monkeypatch.setattr("dfssd.pipeline.timing.time_step", lambda *args, **more: ("here", 0.1))
    config = with_run(tiny_config(prepared), dry_run=True, overwrite=True)
    run = run_of(config)
    _finished(run, DATASET)
    for name in (TEACHER, PSEUDO):
        _finished(run, name, {"old": {"a": 1}})
    dry_run(Context(config), [TEACHER, PSEUDO])
    said = capsys.readouterr().out
    assert re.search(r"teacher\W+overwritten", said) and re.search(r"pseudo\W+overwritten", said)
    assert run.exists("teacher/stage.json")


def test_the_dry_run_times_only_what_is_to_run_and_says_things_once(prepared, capsys, monkeypatch):
    timed = []
    monkeypatch.setattr("dfssd.pipeline.timing.time_step", lambda *args, **more: timed.append(args) or ("here", 0.1))
    config = with_run(tiny_config(prepared), dry_run=True)
    config = config.model_copy(update={"models": config.models.model_copy(update={"teacher": config.models.student})})
    _finished(run_of(config), DATASET)
    dry_run(Context(config), [TEACHER, LABEL_ONLY])
    assert len(timed) == 1 and capsys.readouterr().out.count(f"model: {config.models.student} ") == 1
    timed.clear()
    monkeypatch.setattr("dfssd.pipeline.dry_run._states", lambda context, names: dict.fromkeys(names, "finished"))
    dry_run(Context(config), [TEACHER, LABEL_ONLY, PSEUDO])
    said = capsys.readouterr().out
    assert (
        not timed
        and re.search(rf"teacher\W+finished\W+{config.train.steps}\W+0:00", said)
        and "no step to time" in said
    )


def test_publish_best_exports_the_better_student_by_its_own_name_and_replaces_nothing(tmp_path):
    """Also after the report has been made again and says the opposite; what was exported is then out of date, and says so."""
    config = tiny_config(tmp_path)
    publishing, run = config.model_copy(update={"publish_best": True}), run_of(config)
    for name in (DATASET, LABEL_ONLY, STUDENT, REPORT):
        _finished(run, name)
    weights = {name: run.at(str(name)).listing() for name in (LABEL_ONLY, STUDENT)}
    for difference, model in ((-0.1, LABEL_ONLY), (0.1, STUDENT), (-0.1, LABEL_ONLY)):
        run.write_json("report/metrics.json", {"gate": {"map50_95": {"difference": difference}}})
        stage = stages.make_stage(publishing, run, EXPORT)
        assert stage.inputs == (DATASET, model, REPORT)
        assert stages.make_stage(config, run, EXPORT).inputs == (DATASET, STUDENT, REPORT)
    assert weights == {name: run.at(str(name)).listing() for name in (LABEL_ONLY, STUDENT)}
    assert stage.config == stages.make_stage(config, run, EXPORT).config


def test_where_an_earlier_version_put_the_label_only_student_in_its_place_the_distilled_one_is_measured(prepared):
    from dfssd.config import Evaluate
    from dfssd.evaluate.measure import measure
    from dfssd.models.yolo.detector import build_detector, detector_bytes

    config = tiny_config(prepared).model_copy(update={"evaluate": Evaluate(latency_repeats=3, sample_images=0)})
    run = run_of(config)
    for name, spec in ((LABEL_ONLY, "yolov8n.yaml"), (STUDENT, "yolo11n.yaml")):
        run.write(f"{name}/best.pt", detector_bytes(build_detector(spec, ["a", "b", "c"], 64), {}))
        _finished(run, name)
    before = measure(config, run.uri, ["label_only", "student"], 1)
    run.write("student/distilled.pt", run.read("student/best.pt"))
    run.write("student/best.pt", run.read("label_only/best.pt"))
    run.write_json("student/stage.json", {**run.read_json("student/stage.json"), "published": "label_only"})
    after = measure(config, run.uri, ["label_only", "student"], 1)
    assert after["student"]["params"] == before["student"]["params"] != after["label_only"]["params"]
