"""The command line is a contract: names, defaults and units are frozen here."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dfssd.cli import parse
from dfssd.config import Config, Data, Distill, Pseudo, Run, Section, Thresholds, Train
from dfssd.config_checks import refuse_relative_paths_in_a_job, settings_without_effect
from dfssd.errors import DfssdError

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
    "close-mosaic",
    "compile",
    "cpus-per-worker",
    "data",
    "distill-teacher",
    "divergence",
    "dry-run",
    "ema-decay",
    "experiment",
    "feature-schedule",
    "feature-tau",
    "fliplr",
    "flipud",
    "floor",
    "format",
    "fuse-iou",
    "gpu",
    "grad-clip",
    "hsv",
    "imgsz",
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
    "missing-labels",
    "mixup",
    "mosaic",
    "names",
    "near-duplicate",
    "nms-iou",
    "num-actors",
    "num-workers",
    "off-last",
    "overwrite",
    "prediction",
    "profile-steps",
    "publish-best",
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
    "split",
    "split-shares",
    "steps",
    "storage-path",
    "student",
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
    "val-every",
    "wait-min",
    "warmup-steps",
    "weight-decay",
]


def _job(name, *args, timeout=120):
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
    )


def test_the_pipeline_has_these_flags_and_no_others(capsys):
    own = ("baseline", "publish_best", "rounds")
    flags = {name: (Config.model_fields[name].annotation, Config.model_fields[name]) for name in own}
    with pytest.raises(SystemExit):
        parse("", [s for s in Config.model_fields if s not in own], ["--help"], **flags)
    shown = set(re.findall(r"(?<![\w-])--(?!no-)([a-z][a-z0-9-]+)", capsys.readouterr().out)) - {"help"}
    mentioned_in_text = {"data", "steps", "batch", "unlabelled", "tau"}
    assert shown - mentioned_in_text <= set(FLAGS), sorted(shown - set(FLAGS))
    assert set(FLAGS) <= shown, sorted(set(FLAGS) - shown)


def test_field_names_are_unique_and_described():
    sections = [
        f.annotation
        for f in Config.model_fields.values()
        if isinstance(f.annotation, type) and issubclass(f.annotation, Section)
    ]
    names = [name for s in sections for name in s.model_fields]
    assert len(names) == len(set(names))
    assert all(f.description for s in sections for f in s.model_fields.values())


@pytest.mark.parametrize("name", JOBS)
def test_every_job_has_help_with_defaults(name):
    result = _job(name, "--help")
    assert result.returncode == 0 and "--storage-path" in result.stdout and "(default:" in result.stdout
    lines = (ROOT / "jobs" / f"{name}.py").read_text().splitlines()
    assert len(lines) <= 60


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
def test_dry_run_ends_with_2_and_says_what_to_do(strip, tmp_path, args, message):
    base = ["--storage-path", str(tmp_path), "--imgsz", "64", "--dry-run"]
    result = _job("pipeline", "--data", str(strip), *base, *args)
    assert result.returncode == 2 and message in result.stderr and "to do:" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


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


def test_unknown_flags_and_bad_values_end_with_2():
    for args in (["--imgzs", "64"], ["--imgsz", "100"], ["--label-fraction", "0"]):
        result = _job("pipeline", *args)
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr, result.stderr
