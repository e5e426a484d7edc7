"""The command line is a contract: names, defaults and units are frozen here."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dfssd.cli import COMMANDS, job_of, run
from dfssd.config import SECTIONS, Config, Data, Distill, Pseudo, Run, Thresholds, Train, all_keys
from dfssd.config.checks import refuse_relative_paths_in_a_job, settings_without_effect
from dfssd.config.file import whole as whole_settings
from dfssd.config.flags import parse
from dfssd.config.free import UNRECORDED
from dfssd.errors import DfssdError
from dfssd.pipeline.stages import STAGES

ROOT = Path(__file__).parents[1]
JOBS = sorted(p.stem for p in (ROOT / "jobs").glob("*.py"))
FLAGS = [
    "agreement-min",
    "amp",
    "bad-limit",
    "balance",
    "baseline",
    "batch",
    "box-loss",
    "cache-dir",
    "cache-dir-gib",
    "cache-gib",
    "checkpoint-min",
    "calibration-pictures",
    "close-mosaic",
    "compile",
    "config",
    "cpus-per-worker",
    "data",
    "decoded-dir",
    "distill-teacher",
    "divergence",
    "dry-run",
    "ema-decay",
    "epochs-unlabelled",
    "experiment",
    "fade",
    "feature-schedule",
    "feature-tau",
    "fliplr",
    "flipud",
    "floor",
    "format",
    "formats",
    "fuse-iou",
    "gpu",
    "grad-clip",
    "hsv",
    "imgsz",
    "int8",
    "label-batch",
    "label-fraction",
    "label-teachers",
    "labelled-list",
    "labels-per-class",
    "lambda-f",
    "lambda-l",
    "lambda-p",
    "lambda-u",
    "latency-repeats",
    "loader-workers",
    "loc-tau",
    "loc-top",
    "log-every",
    "lr",
    "lr-final",
    "max-candidates",
    "max-escape",
    "max-group-share",
    "max-side",
    "micro-batch",
    "mean-teacher",
    "mean-teacher-decay",
    "mean-teacher-lr",
    "mean-teacher-policy",
    "mean-teacher-power",
    "mean-teacher-steps",
    "mean-teacher-weight",
    "missing-labels",
    "mixup",
    "mosaic",
    "names",
    "near-duplicate",
    "nms-inside",
    "nms-iou",
    "num-actors",
    "num-workers",
    "off-last",
    "overwrite",
    "parity-pictures",
    "precision",
    "prediction",
    "profile-steps",
    "print-config",
    "publish-best",
    "register",
    "repeat-threshold",
    "rounds",
    "run-name",
    "sample-images",
    "scale",
    "score-power",
    "seed",
    "share-f",
    "share-p",
    "share-u",
    "silent",
    "split",
    "split-shares",
    "steps",
    "storage-path",
    "strong-view",
    "student",
    "student-view",
    "taps",
    "tau",
    "tau-decay",
    "tau-max",
    "tau-min",
    "teacher",
    "teacher-amp",
    "teacher-lr-factor",
    "teacher-mode",
    "teacher-patience",
    "teacher-steps",
    "teacher-taps",
    "tf32",
    "threshold-policy",
    "translate",
    "tta",
    "uncertain",
    "unlabelled",
    "unlabelled-ratio",
    "unreadable-limit",
    "update",
    "val-every",
    "val-from-labels",
    "version",
    "wait-min",
    "warmup-steps",
    "weight-decay",
    "white-level",
]


def _job(name, *args):
    """jobs/NAME.py as a user starts it."""
    script = str(ROOT / "jobs" / f"{name}.py")
    return subprocess.run([sys.executable, script, *args], capture_output=True, text=True, timeout=300, cwd=ROOT)


def _ends(capsys, name, *words):
    """Exit code of a command, and what it said; in this process, which has imported what takes seconds."""
    with pytest.raises(SystemExit) as ended:
        run(name, words)
    said = capsys.readouterr()
    return ended.value.code, said.err, said.out


def shown_by(capsys, *sections):
    """Flags that the help lists, each at the beginning of its line."""
    with pytest.raises(SystemExit):
        parse("", sections, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    return {m[1] for line in lines if (m := re.match(r"\s{1,4}(?:-h, )?--([a-z][a-z0-9-]+)", line))} - {"help"}


def test_the_pipeline_has_these_flags_and_no_others(capsys):
    shown = shown_by(capsys, *all_keys())
    assert shown == set(FLAGS), sorted(shown ^ set(FLAGS))


def test_field_names_are_unique_and_described():
    names = [name for s in SECTIONS.values() for name in s.model_fields]
    assert len(names) == len(set(names))
    assert all(f.description for s in SECTIONS.values() for f in s.model_fields.values())


HELP = """import atexit, runpy, sys
atexit.register(lambda: print("IMPORTED", *sorted({m.split(".")[0] for m in sys.modules})))
name, script = sys.argv[1:]
sys.argv = [script or "dfssd", *([] if script else [name]), "--help"]
if script:
    runpy.run_path(script, run_name="__main__")
else:
    from dfssd.cli import console
    console()
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_defaults_and_an_example_and_imports_nothing_slow(name):
    """Of jobs/NAME.py where there is one, else of `dfssd NAME`. Half a second, where torch and Ray alone take two."""
    script = str(ROOT / "jobs" / f"{name}.py") if name in JOBS else ""
    done = subprocess.run([sys.executable, "-c", HELP, name, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said, _, imported = done.stdout.rpartition("IMPORTED")
    slow = {"torch", "ray", "numpy", "pyarrow", "ultralytics", "mlflow", "matplotlib", "scipy"}
    assert "dfssd" in imported.split() and not slow & set(imported.split())
    if name in JOBS:
        assert "--storage-path" in said and "(default:" in said
        assert f"  dfssd {name} " in said, "an example"
        for remark in ("docs/design.md", "As everywhere", "pydantic"):
            assert remark not in said


def _console(*words):
    code = "from dfssd.cli import console; console()"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=300)


def test_the_console_lists_commands_and_names_the_nearest():
    from dfssd import __version__

    said = _console("--help").stdout
    assert all(f"  {name} " in said for name in COMMANDS)
    assert _console("--version").stdout == _console("prepare", "--version").stdout == f"dfssd {__version__}\n"
    wrong = _console("pipelin")
    assert wrong.returncode == 2 and "did you mean 'pipeline'?" in wrong.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_its_version(name, capsys, monkeypatch):
    """`dfssd NAME --version` and jobs/NAME.py --version, whatever else the command asks for."""
    from dfssd import __version__

    run(name, ["--version"])
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--version"])
    run(name)
    assert capsys.readouterr().out == f"dfssd {__version__}\n" * 2
    with pytest.raises(SystemExit):
        run(name, ["--help"])
    assert "--version" in capsys.readouterr().out


def test_the_commands_of_the_table_are_there():
    assert all(callable(job_of(name)) for name in COMMANDS)
    lacking = sorted({row.command_name for row in STAGES} - set(JOBS))
    assert not lacking and set(JOBS) <= set(COMMANDS), f"copy jobs/distill.py to {lacking}, with their name in run()"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("evaluate", ["--lr", "5"]),
        ("prepare", ["--num-workers", "2"]),
        ("distill", ["--label-fraction", "0.5"]),
        ("pseudo_label", ["--teacher", "a.pt"]),
        ("teacher", ["--role", "label_only", "--teacher-patience", "3"]),
    ],
)
def test_flags_without_effect_on_a_job_are_refused(name, words, tmp_path, capsys):
    code, error, out = _ends(capsys, name, "--storage-path", str(tmp_path), *words)
    assert code == 2 and words[-2] in error + out, error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("evaluate --out n.json", "--out has no effect without --weights"),
        ("evaluate --names a b", "--names has no effect without --weights and a folder --on"),
        ("evaluate --weights a.pt --names a b", "--names has no effect without --weights and a folder --on"),
        ("evaluate --on val", "--on has no effect without --weights"),
        ("evaluate --on=test", "--on has no effect without --weights"),
        ("evaluate --weights a.pt --overwrite", "--overwrite has no effect with --weights"),
        ("evaluate --weights a.pt --sample_images 3", "--sample-images has no effect with --weights"),
        ("suggest --export cvat --label-studio-root /a", "has no effect without --export labelstudio"),
        ("review --export coco --reviewer dora", "--reviewer has no effect without --corrected"),
        ("review --export coco --label-studio-root /a", "has no effect without --export labelstudio"),
        ("review --corrected a.json --which all", "--which has no effect without --export"),
        ("review --corrected a.json --k 3 ", "--k has no effect without --export"),
        ("review --corrected a.json --tau 0.3", "--tau has no effect with --corrected"),
        ("review --corrected a.json --export coco", "--export has no effect with --corrected"),
        ("sweep --table line3 --resume --lr 0.1", "--lr, --resume has no effect with --table"),
        ("sweep smoke --table line3", "the space smoke has no effect with --table"),
    ],
)
def test_flags_of_another_mode_are_refused(line, said):
    name, *words = line.split()
    with pytest.raises(DfssdError, match=re.escape(said)):
        importlib.import_module(f"dfssd.jobs.{name}").job(words)


def test_a_dry_run_of_files_says_what_it_would_measure_and_measures_nothing(tmp_path, monkeypatch, capsys):
    from PIL import Image

    from dfssd.evaluate import files
    from dfssd.jobs.evaluate import job

    for k in range(13):
        Image.effect_noise((64, 64), 90).save(tmp_path / f"{k}.png")
        if k:
            (tmp_path / f"{k}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "classes.txt").write_text("pit\n")
    (tmp_path / "a.onnx").write_bytes(b"never opened")
    monkeypatch.setattr(files, "measure_files", lambda *a: pytest.fail("it measures"))
    words = ["--on", str(tmp_path), "--dry-run", "--storage-path", str(tmp_path / "runs")]
    job(["--weights", str(tmp_path / "a.onnx"), *words])
    assert f"a.onnx: would be measured on 12 labelled pictures of {tmp_path}" in capsys.readouterr().out
    with pytest.raises(DfssdError, match="no such model"):
        job(["--weights", str(tmp_path / "b.onnx"), *words])


def test_where_numbers_go_is_looked_at_before_anything_is_measured(tmp_path, monkeypatch):
    from dfssd.evaluate import files
    from dfssd.jobs.evaluate import job

    monkeypatch.setattr(files, "measure_files", lambda *a: {"a.pt": {"map50": 0.5}})
    monkeypatch.setattr("dfssd.report.terminal.print_files", lambda *a: None)
    job(["--weights", "a.pt", "--out", str(tmp_path / "new" / "folder" / "n.json")])
    assert json.loads((tmp_path / "new" / "folder" / "n.json").read_text()) == {"a.pt": {"map50": 0.5}}
    monkeypatch.setattr(files, "measure_files", lambda *a: pytest.fail("it measures"))
    below, too_long = tmp_path / "new/folder/n.json/m.json", tmp_path / ("n" * 300)
    for out, said in ((tmp_path, "--out is a folder"), (below, "--out: "), (too_long, "--out: File name too long")):
        with pytest.raises(DfssdError, match=said):
            job(["--weights", "a.pt", "--out", str(out)])


def test_a_file_of_settings_is_read_and_flags_win(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("train: {imgsz: 96, lr: 0.01}\ndistill:\n  taps: [4, 15]\nrounds: 2\nthresholds.tau: 0.3\n")
    config, _ = parse("", ["train", "distill"], ["--config", str(file), "--lr", "0.5"])
    assert (config.train.imgsz, config.train.lr, config.distill.taps) == (96, 0.5, (4, 15))
    assert config.rounds == 2 and config.thresholds.tau == 0.3, "also what this job does not show"
    with pytest.raises(SystemExit) as ended:
        parse("", ["train", "rounds"], [f"--config={file}", "--print-config"])
    assert ended.value.code == 0
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    config, _ = parse("", ["train"], ["--config", str(again)])
    assert config.train.imgsz == 96 and config.rounds == 2


def test_what_runs_record_can_be_given_back(tmp_path, monkeypatch, capsys):
    """Settings of a stage's record, and all settings as the report has them."""
    from dfssd.jobs.stages import reads
    from dfssd.pipeline.stages import settings_of
    from dfssd.runtime.artefact_names import STUDENT

    monkeypatch.setattr("dfssd.pipeline.settings.given_weights", lambda spec: spec.encode())
    config = Config(train=Train(imgsz=96, hsv=(0.1, 0.2, 0.3)), distill=Distill(taps=(4, 15), lambda_p=0.5))
    (tmp_path / "report.json").write_text(json.dumps(config.model_dump(mode="json")))
    assert parse("", ["train"], ["--config", str(tmp_path / "report.json")])[0] == config
    other = config.model_copy(update={"distill": config.distill.model_copy(update={"distill_teacher": "a.pt"})})
    record = {"config": settings_of(other, STUDENT), "inputs": {}, "outputs": {}}
    (tmp_path / "stage.json").write_text(json.dumps(record))
    back, _ = parse("", reads(STUDENT), ["--config", str(tmp_path / "stage.json")])
    assert settings_of(back, STUDENT) == settings_of(config, STUDENT)
    assert "give --distill-teacher" in capsys.readouterr().out


def test_the_record_of_a_report_is_enough_to_make_it_again(tmp_path, monkeypatch):
    """--names is a flag of `evaluate --weights`, and no setting that a report reads."""
    from dfssd.jobs.evaluate import job
    from dfssd.pipeline.stages import settings_of
    from dfssd.runtime.artefact_names import REPORT

    asked = []
    monkeypatch.setattr("dfssd.pipeline.run.run_stages", lambda config, names: asked.append(config))
    config = Config(train=Train(imgsz=96))
    (tmp_path / "stage.json").write_text(json.dumps({"config": settings_of(config, REPORT), "inputs": {}}))
    job(["--config", str(tmp_path / "stage.json"), "--storage-path", str(tmp_path), "--run-name", "n", "--dry-run"])
    assert asked[0].train.imgsz == 96


def test_a_record_of_one_stage_is_no_whole_run(tmp_path):
    """Given to a job that reads more, what is not in it would be the default: all labels instead of 8 % of them."""
    from dfssd import api
    from dfssd.jobs.stages import reads
    from dfssd.pipeline.stages import ROWS, settings_of
    from dfssd.runtime.artefact_names import EXPORT, MEAN_TEACHER, STUDENT, TEACHER

    config = Config(data=Data(label_fraction=0.08), train=Train(imgsz=96, teacher_steps=450))
    for name in (STUDENT, TEACHER, MEAN_TEACHER, EXPORT):
        file = tmp_path / str(name) / "stage.json"
        file.parent.mkdir()
        file.write_text(json.dumps({"config": settings_of(config, name), "inputs": {}}))
        back, _ = parse("", reads(name), ["--config", str(file)])  # the job of that stage
        assert settings_of(back, name) == settings_of(config, name)
    words = ["--config", str(tmp_path / "student" / "stage.json")]
    with pytest.raises(DfssdError, match=r"data\.label_fraction, models\.teacher and \d+ more") as caught:
        parse("", all_keys(), words)
    assert "report.html" in caught.value.todo
    with pytest.raises(DfssdError, match="label_fraction"):
        api.settings(words[1])
    asked = config.model_copy(update={"run": config.run.model_copy(update={"overwrite": True, "dry_run": True})})
    (tmp_path / "settings.json").write_text(json.dumps(whole_settings(asked)))  # which deletes nothing a second time
    with pytest.raises(DfssdError) as caught:
        parse("", all_keys(), [*words, "--label-fraction", "0.08"])
    assert "label_fraction" not in caught.value.what and str(tmp_path / "settings.json") in caught.value.todo
    whole, _ = parse("", all_keys(), ["--config", str(tmp_path / "settings.json")])
    assert whole == config
    assert set().union(*(row.free for row in ROWS.values())) <= UNRECORDED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {imgzs: 96}", "'train.imgzs' is not a setting, did you mean 'train.imgsz'"),
        ("imgsz: 96", "'imgsz' is not a setting, did you mean 'train.imgsz'"),
        ("training: {lr: 1}", "'training.lr' is not a setting, did you mean 'train.lr'"),
        ("train: {imgsz: 100}", "--imgsz 100: must be a multiple of 32"),
        ("train: {imgsz: [1}", "neither YAML nor JSON"),
        ("- 1", "holds no settings"),
    ],
)
def test_a_file_of_settings_that_cannot_be(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(DfssdError, match=re.escape(message)) as caught:
        parse("", ["train"], ["--config", str(tmp_path / "run.yaml")])
    assert str(tmp_path) in caught.value.where
    with pytest.raises(DfssdError, match="cannot be read"):
        parse("", ["train"], ["--config", str(tmp_path / "gone.yaml")])


def test_help_names_ranges_and_a_flag_means_one_thing_in_all_jobs(capsys):
    with pytest.raises(SystemExit):
        parse("", ["data", "train"], ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "[above 0 to 1]" in said and "[from 32 in steps of 32]" in said
    for name in JOBS:
        with pytest.raises(SystemExit):
            job_of(name)(["--help"])
        said = " ".join(re.sub("[│|]", " ", capsys.readouterr().out).split())
        teacher = SECTIONS["models"].model_fields["teacher"].description
        assert ("--teacher STR" in said) == (f"--teacher STR {teacher}" in said)


def test_flags_reach_the_config():
    config, _ = parse("", ["run", "train", "distill"], ["--imgsz", "96", "--lambda-f", "0.5", "--no-overwrite"])
    assert config.train.imgsz == 96 and config.distill.lambda_f == 0.5


def test_layers_may_be_written_with_commas():
    for words in (["--taps", "4,15", "--teacher-taps=4,16"], ["--taps", "4", "15", "--teacher-taps", "4", "16"]):
        config, _ = parse("", ["distill"], [*words, "--lambda-f", "2"])
        assert config.distill.taps == (4, 15) and config.distill.teacher_taps == (4, 16)
        assert config.distill.lambda_f == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--taps", "4,15", "--teacher-taps", "4"], "they are compared in pairs"),
        (["--batch", "4", "--num-workers", "5"], "each worker needs a labelled and an unlabelled image"),
        (["--unlabelled-ratio", "0.1", "--batch", "20", "--num-workers", "1:4"], "which holds 20 and 2"),
    ],
)
def test_contradictions_are_user_errors(args, message):
    with pytest.raises(DfssdError, match=message):
        parse("", ["run", "train", "distill"], args)


def test_settings_without_effect_are_named():
    thresholds = Thresholds(threshold_policy="fixed", tau_min=0.6)
    config = Config(thresholds=thresholds, distill=Distill(divergence="mse", feature_tau=2.0, lambda_f=3.0))
    notes = " ".join(settings_without_effect(config))
    assert "--tau-min" in notes and "--feature-tau" in notes and "--tau " not in notes
    assert "--lambda-f has no effect with --balance gradnorm" in notes
    distill = Distill(off_last=0.3, teacher_lr_factor=0.3, share_p=0.1, prediction="mse", lambda_l=2.0, balance="none")
    notes = " ".join(settings_without_effect(Config(distill=distill)))
    for flag in ("--off-last", "--teacher-lr-factor", "--share-p", "--lambda-l"):
        assert f"{flag} has no effect" in notes
    alone = Config(pseudo=Pseudo(tta="none"), distill=Distill(agreement_min=0.5), publish_best=True, baseline=False)
    notes = " ".join(settings_without_effect(alone))
    assert "--agreement-min" in notes and "--publish-best" in notes
    assert not settings_without_effect(Config())
    assert settings_without_effect(Config(train=Train(steps=50, warmup_steps=20)))


def test_dry_run_prints_a_plan_and_changes_nothing(strip, tmp_path):
    args = ["--data", str(strip), "--storage-path", str(tmp_path / "s"), "--imgsz", "64", "--steps", "10", "--dry-run"]
    args += ["--cpus-per-worker", "1"]  # two threads on a busy machine wait for each other
    result = _job("pipeline", *args, "--student", "yolov8n.yaml", "--teacher", "yolov8n.yaml", "--batch", "4")
    assert result.returncode == 0, result.stderr
    for word in ("60 images", "yolov8n.yaml is there", "teacher", "student", "expected time", "writable"):
        assert word in result.stdout, word
    assert not [p for p in (tmp_path / "s").rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "/nowhere"], "the data is not there"),
        (["--teacher", "gone.pt"], "could not be fetched"),
        (["--cpus-per-worker", "9999"], "CPUs are asked for"),
        (["--storage-path", "/proc/nope"], "not writable"),
    ],
)
def test_dry_run_ends_with_2_and_says_what_to_do(strip, tmp_path, args, message, capsys):
    base = ["--storage-path", str(tmp_path), "--imgsz", "64", "--dry-run"]
    code, error, _ = _ends(capsys, "pipeline", "--data", str(strip), *base, *args)
    assert code == 2 and message in error and "to do:" in error, error
    assert "Traceback" not in error


def test_a_submitted_job_refuses_relative_paths(tmp_path, monkeypatch):
    """`ray job submit --working-dir` unpacks to .../working_dir_files/...; what is written there is lost."""
    job_dir = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    job_dir.mkdir(parents=True)
    monkeypatch.chdir(job_dir)
    with pytest.raises(DfssdError, match="--storage-path runs is relative"):
        refuse_relative_paths_in_a_job(Config(run=Run(storage_path="runs")))
    with pytest.raises(DfssdError, match="--data x is relative"):
        refuse_relative_paths_in_a_job(Config(run=Run(storage_path="/a"), data=Data(data="x")))
    refuse_relative_paths_in_a_job(Config(run=Run(storage_path="s3://a/b"), data=Data(data="/x")))
    monkeypatch.chdir(tmp_path)
    refuse_relative_paths_in_a_job(Config(run=Run(storage_path="runs")))


def test_unknown_flags_and_bad_values_end_with_2(capsys):
    result = _job("pipeline", "--imgzs", "64")
    found = [(["--imgzs"], (result.returncode, result.stderr, result.stdout))]
    for args in (["--imgzs", "64"], ["--imgsz", "100"], ["--label-fraction", "2"], ["--amp", "fp8"], ["--lr", "x"]):
        found.append((args, _ends(capsys, "pipeline", *args)))
    for args, (code, error, out) in found:
        assert "http" not in error + out and args[0] in error + out
        assert code == 2, error
        assert "Traceback" not in error, error


def test_evaluate_and_export_work_at_the_size_of_the_run(tmp_path, capsys):
    """Without --imgsz: another size is another measurement, which the run would refuse."""
    from dfssd.jobs.stages import at_size_of_run
    from dfssd.runtime.storage import Storage

    config = Config(run=Run(storage_path=str(tmp_path), run_name="r"))
    assert at_size_of_run(config, [], "").train.imgsz == 640
    Storage(str(tmp_path)).at("r").write_json("student/stage.json", {"config": {"train": {"imgsz": 128}}})
    assert at_size_of_run(config, [], "").train.imgsz == 128 and "128 px" in capsys.readouterr().out
    (tmp_path / "run.yaml").write_text("train: {imgsz: 640}")
    for words, given in ((["--imgsz", "640"], ""), (["--imgsz=640"], ""), ([], str(tmp_path / "run.yaml"))):
        assert at_size_of_run(config, words, given).train.imgsz == 640


@pytest.mark.parametrize(("words", "said"), [
    (["--split-shares", "1.2", "-0.1", "-0.1"], "must be from 0 and add up to 1"),
    (["--hsv", "0.1", "0.2", "1.5"], "each must be from 0 to 1"),
    (["--seed", "-1"], "--seed -1: must be greater than or equal to 0"),
])  # fmt: skip
def test_ranges_that_the_help_names_are_kept(words, said):
    with pytest.raises(DfssdError, match=said):
        parse("", ["run", "data", "train"], words)


@pytest.mark.parametrize("flush", [True, False])
def test_a_reader_that_leaves_is_no_error(flush):
    """`dfssd predict ... | head`: no traceback, while lines are printed or at the end."""
    code = f"from dfssd.cli import main\nmain(lambda: [print('line', k, flush={flush}) for k in range(20000)])"
    job = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    job.stdout.readline()
    job.stdout.close()
    assert job.stderr.read() == "" and job.wait(timeout=300) == 1
    code = "from dfssd.cli import main\ndef job(): raise BrokenPipeError('a socket')\nmain(job)"  # stdout is read
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "a socket" in done.stderr and done.returncode == 1
