"""Small settings and made-up artefacts that several tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dfssd.config import Config, Data, Distill, Models, Pseudo, Run, Thresholds, Train
from dfssd.data.manifest import pseudo_table, read_manifest, write_table
from dfssd.distill.criterion import Criterion, StudentOutput, Terms
from dfssd.models.head import TeacherOutput
from dfssd.models.yolo.detector import build_detector, detector_bytes
from dfssd.pipeline.training import train_job
from dfssd.pseudo.selection import StepTargets
from dfssd.runtime.artefact_names import PSEUDO, STUDENT, TEACHER, ArtefactName
from dfssd.runtime.storage import Storage
from dfssd.train.job import TrainJob

SWEEP_BASE = """
BASE = {"train.imgsz": 64, "train.batch": 4, "train.steps": 12, "train.teacher_steps": 4, "train.val_every": 3,
        "train.log_every": 1, "train.amp": "fp32", "models.teacher": "yolov8n.yaml", "pseudo.tta": "none",
        "data.label_fraction": 0.4, "evaluate.latency_repeats": 3, "evaluate.sample_images": 2}
"""  # of spaces whose trials take seconds
OTHERS = {"distill": Distill, "thresholds": Thresholds, "pseudo": Pseudo}


def tiny_config(storage: Path, **changes: object) -> Config:
    """Settings that train in seconds on one CPU, in fp32 so that runs can be compared bit by bit."""
    train = {
        "imgsz": 64,
        "batch": 4,
        "steps": 6,
        "val_every": 3,
        "log_every": 1,
        "amp": "fp32",
        "loader_workers": 0,
        "cache_gib": 0,
    }
    run = {"storage_path": str(storage), "run_name": "r", "gpu": "never"}
    others: dict[str, dict[str, object]] = {
        "distill": {"teacher_amp": "fp32"},
        "thresholds": {"threshold_policy": "ema"},  # the one with a state that moves
        "pseudo": {},
    }
    sections = {"run": (Run, run), **{k: (t, others[k]) for k, t in OTHERS.items()}}
    for key, value in changes.items():
        own = next((d for model, d in sections.values() if key in model.model_fields), train)
        own[key] = value  # type: ignore[index]
    return Config(
        run=Run(**run),  # type: ignore[arg-type]
        data=Data(label_fraction=0.4),
        models=Models(teacher="yolov8n.yaml", student="yolov8n.yaml"),
        train=Train(**train),  # type: ignore[arg-type]
        distill=Distill(**others["distill"]),  # type: ignore[arg-type]
        thresholds=Thresholds(**others["thresholds"]),  # type: ignore[arg-type]
        pseudo=Pseudo(**others["pseudo"]),  # type: ignore[arg-type]
    )


def narrow_layout(folder: Path) -> str:
    """A yaml of YOLOv8n with half its channels, 0.8 million weights: what is tested takes no longer than it must."""
    from ultralytics.utils import ROOT, YAML

    layout = YAML.load(ROOT / "cfg/models/v8/yolov8.yaml")
    layout["scales"] = {"n": [0.33, 0.125, 1024]}
    YAML.save(folder / "narrow.yaml", layout)
    return str(folder / "narrow.yaml")


def make_job(stage: str, run_uri: str, config: Config) -> TrainJob:
    """A training stage by its folder; the student's learns from what `give_teacher_and_candidates` left."""
    name = ArtefactName.parse(stage)
    inputs = {"teacher": TEACHER, "pseudo": PSEUDO} if name == STUDENT else {}
    return train_job(config, Storage(run_uri), name, **inputs)


def give_teacher_and_candidates(storage):
    """A made-up teacher and made-up candidates, so that the student's stage can run alone."""
    run = Storage(str(storage / "r"))
    manifest = read_manifest(run.at("dataset"))
    torch.manual_seed(9)
    run.write("teacher/best.pt", detector_bytes(build_detector("yolov8s.yaml", manifest.names, 64), {}))
    rng = np.random.default_rng(0)
    rows = manifest.unlabelled_rows()
    boxes = []
    for _ in rows:
        columns = [(0.3, 0.6)] * 4 + [(0.1, 1.0), (1.0, 1.0)]  # cx, cy, w, h, score, agreement
        numbers = np.stack([rng.uniform(low, high, 2) for low, high in columns], 1)
        boxes.append(np.concatenate([rng.integers(0, 3, (2, 1)), numbers], 1).astype(np.float32))
    write_table(run.at("pseudo"), "shard-00000.parquet", pseudo_table([r.image_id for r in rows], "t", boxes))
    val, found = manifest.of_split("val"), []
    for (
        row
    ) in val:  # each defect is found, and many faint ones where there is nothing: what a precision can be asked of
        truth = row.boxes if row.boxes is not None else np.zeros((0, 5), np.float32)
        right = np.concatenate([truth, rng.uniform(0.3, 1.0, (len(truth), 1))], 1)
        wrong = np.concatenate([np.arange(30)[:, None] % 3, np.full((30, 4), 0.02), rng.uniform(0.1, 0.3, (30, 1))], 1)
        boxes = np.concatenate([right, wrong])
        found.append(np.concatenate([boxes, np.ones((len(boxes), 1))], 1).astype(np.float32))
    write_table(run.at("pseudo"), "val-00000.parquet", pseudo_table([r.image_id for r in val], "t", found))


def terms_of(
    criterion: Criterion,
    out: StudentOutput,
    teacher: TeacherOutput | None,
    targets: StepTargets,
    progress: float,
    own: TeacherOutput | None = None,
) -> Terms:
    """The terms of a step of one micro-batch a worker."""
    measured = criterion.measure(out, teacher, targets, progress, own)
    totals = measured.named(criterion.workers.sum(measured.flat()))
    if criterion.balance:
        if criterion.balance.due:
            names, squared_norms = criterion.squared_norms(measured, totals)
            criterion.balance.follow(names, criterion.workers.sum(squared_norms))
        criterion.balance.advance()
    return criterion.terms(measured, totals, progress)
