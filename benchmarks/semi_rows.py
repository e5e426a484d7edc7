"""Rows of benchmarks/semi_supervised.py: what each one needs and does. No Ray, no MLflow.

A row is named `BASE`, `BASE(section.key=value,...)` or `BASE(...)@TEACHER`: `full(distill.unlabelled_ratio=2)` is the full
method with one setting changed, `full@mean_teacher(mean_teacher.mean_teacher_steps=1200)` the full method with another
teacher.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from semi_data import link, subset

from dfssd.config import Config
from dfssd.data.dataset import ManifestDataset
from dfssd.data.manifest import Manifest, read_manifest, read_pseudo, read_withheld
from dfssd.evaluate.validation import validate
from dfssd.models.yolo.detector import load_detector, resolve_weights
from dfssd.pipeline.stages import row_of, settings_of
from dfssd.pseudo.evidence import Evidence
from dfssd.pseudo.in_process import label_in_process
from dfssd.pseudo.quality import val_evidence
from dfssd.pseudo.thresholds import ScoreCounts, labelled_rates, policy_thresholds
from dfssd.runtime.artefact_names import PSEUDO, ArtefactName
from dfssd.runtime.storage import Storage
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train import checkpoint
from dfssd.train.job import TrainJob
from dfssd.train.session import Session

NO_DISTILLATION = {"distill.lambda_p": 0, "distill.lambda_l": 0, "distill.lambda_f": 0}
# What the published DFSSD describes, with its code's numbers, on this project's loop: its own trains nothing (docs/design.md
# section 5). Hard labels of a moving average of confidences, background elsewhere; a teacher that goes on training.
PUBLISHED = {
    "thresholds.threshold_policy": "ema",
    "distill.score_power": 0,
    "distill.uncertain": "background",
    "distill.silent": "background",
    "distill.teacher_mode": "online",
    "distill.teacher_lr_factor": 1.0,
    "distill.prediction": "mse",
    "distill.divergence": "hw_js",
    "distill.feature_schedule": "cosine",
    "distill.taps": [2, 4, 6, 8, 12, 15, 18, 21],
    "distill.balance": "none",
    "train.box_loss": "inner_focaler_eiou",
}
BASES: dict[str, tuple[str, str, dict[str, Any]]] = {  # name -> stage, teacher it needs, settings
    "label_only": ("label_only", "", {}),
    "label_only_longer": ("label_only", "", {}),  # three times the steps
    "ceiling": ("label_only", "", {}),  # all labels
    "teacher": ("teacher", "", {}),
    "mean_teacher": ("mean_teacher", "teacher", {}),
    "labels": ("pseudo", "mean_teacher", {}),
    "pseudo_only": ("student", "teacher", NO_DISTILLATION),
    "full": ("student", "mean_teacher", {}),
    "full_without_mean_teacher": ("student", "teacher", {}),
    "published": ("student", "teacher", PUBLISHED),
    "yolo_train": ("stock", "", {}),
    "distill_model": ("stock", "teacher", {}),
    "distill_model_pseudo": ("stock", "mean_teacher", {}),  # given our pseudo-labels as label files
}
TITLES = {
    "label_only": "student, labels alone",
    "label_only_longer": "student, labels alone, three times the steps",
    "ceiling": "student, all labels",
    "teacher": "teacher, labels alone",
    "mean_teacher": "mean teacher",
    "pseudo_only": "student, pseudo-labels of the teacher, no distillation",
    "full": "student, full method (default)",
    "full_without_mean_teacher": "student, full method without the mean teacher",
    "published": "student, settings of the published DFSSD",
    "yolo_train": "Ultralytics `yolo train`, labels alone, its own settings",
    "distill_model": "Ultralytics distill_model, labels alone",
    "distill_model_pseudo": "Ultralytics distill_model, our pseudo-labels as labels",
}
CHECKPOINT_S = 120.0  # between two checkpoints


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str
    base: str
    teacher: str
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def stage(self) -> str:
        return BASES[self.base][0]

    @property
    def needs(self) -> list[str]:
        """Rows that must be finished first."""
        labels = [f"labels@{self.teacher}"] if self.stage == "student" or self.base == "distill_model_pseudo" else []
        return [*([self.teacher] if self.teacher else []), *labels]

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.=,@()+-]", "_", self.name)


def parse_row(name: str) -> Row:
    """Row of a name.

    Raises:
        SystemExit: there is no such base.
    """
    own, _, teacher = name.partition("@")
    base, _, rest = own.partition("(")
    if base not in BASES:
        raise SystemExit(f"no such row: {base}; there are {', '.join(BASES)}")
    pairs = [p.split("=", 1) for p in rest.rstrip(")").split(",") if p]
    settings = {**BASES[base][2], **{k: _value(v) for k, v in pairs}}
    return Row(name, base, teacher or BASES[base][1], settings)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def with_needs(names: list[str]) -> list[Row]:
    """Rows and what they need, what is needed first."""
    found: dict[str, Row] = {}

    def add(name: str) -> None:
        row = parse_row(name)
        for other in row.needs:
            add(other)
        found.setdefault(name, row)

    for name in names:
        add(name)
    return list(found.values())


def changed(config: Config, settings: dict[str, Any]) -> Config:
    """The config with settings by dotted key."""
    tree = config.model_dump()
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        target = tree[section] if section else tree
        if name not in target:
            raise SystemExit(f"no such setting: {key}")
        target[name] = value
    return Config.model_validate(tree)


def run_row(row: Row, seed_folder: Path, manifest: Manifest, config: Config, fraction: float, device: str) -> None:
    """Do one row and leave `result.json` in its folder."""
    torch.set_num_threads(1)
    begun = time.monotonic()
    folder = seed_folder / row.folder
    config = changed(config, row.settings)
    if row.base == "label_only_longer":
        config = changed(config, {"train.steps": 3 * config.train.steps})
    run = Storage(str(folder))
    counts = subset(manifest, 1.0 if row.base == "ceiling" else fraction, config.run.seed, run.at("dataset"))
    if row.teacher:
        link(
            seed_folder / parse_row(row.teacher).folder / parse_row(row.teacher).stage,
            folder / parse_row(row.teacher).stage,
        )
    for need in row.needs[1:]:
        link(seed_folder / parse_row(need).folder / "pseudo", folder / "pseudo")
    target = torch.device(device)
    teacher_stage = parse_row(row.teacher).stage if row.teacher else "teacher"
    result: dict[str, Any] = {"row": row.name, "seed": config.run.seed, "fraction": fraction, **counts}
    if row.stage == "pseudo":
        result |= label_all(config, run, teacher_stage, target)
    elif row.stage == "stock":
        result |= stock(row, config, folder, teacher_stage, device)
    else:
        result |= train_row(row, config, run, teacher_stage, target)
    if row.stage != "pseudo":
        result |= measured(config, run, row.stage, target)
    result["seconds"] = round(time.monotonic() - begun, 1)
    run.write_json("result.json", result)


def train_row(row: Row, config: Config, run: Storage, teacher: str, device: torch.device) -> dict[str, Any]:
    """Train one model of ours."""
    from dfssd.train.loop import train

    name, student = ArtefactName(row.stage), row.stage == "student"
    job = TrainJob(
        name,
        row_of(name).training,
        run.uri,
        config,
        settings_of(config, name),
        teacher=ArtefactName(teacher) if student else None,
        pseudo=PSEUDO if student else None,
    )
    weights = run.read("teacher/best.pt") if row.stage == "mean_teacher" else resolve_weights(job.model_spec)[1]
    if weights is not None:
        run.write(f"{row.stage}/init.pt", weights)
    saved = time.monotonic()

    def save(metrics: dict[str, Any], session: Session) -> None:
        nonlocal saved
        if time.monotonic() - saved > CHECKPOINT_S:
            checkpoint.store_newest(job.store.at("train"), session.step, session.state(), 1)
            saved = time.monotonic()

    summary = train(job, WorkerGroup(), device, lambda metrics, step: None, save)
    job.store.write_json("stage.json", {"summary": summary})
    for name in job.store.at("train").folders():
        job.store.at("train").delete(name)
    return {"steps": summary["steps"], "best_step": summary["best"]["step"], "s_per_step": summary["seconds_per_step"],
            "data_wait": summary["data_wait_share"]}  # fmt: skip


def label_all(config: Config, run: Storage, teacher: str, device: torch.device) -> dict[str, Any]:
    """Candidates of every unlabelled image, as the labelling job leaves them."""
    manifest = read_manifest(run.at("dataset"))
    found = label_in_process(config, run, "pseudo", manifest, [f"{teacher}/best.pt"], device, cores=1)
    return {"silent": found["without_candidate"], **worth(config, run, manifest)}


def worth(config: Config, run: Storage, manifest: Manifest) -> dict[str, Any]:
    """Precision and recall of the pseudo-labels at the thresholds of the student's policy, against withheld boxes."""
    candidates, withheld = read_pseudo(run.at("pseudo")), read_withheld(run.at("dataset"))
    scores, evidence = ScoreCounts.empty(len(manifest.names)), Evidence.empty(len(manifest.names))
    for image_id in sorted(candidates):
        scores.add(candidates[image_id])
        if image_id in withheld:  # the data set may have unlabelled images of its own
            evidence.add(candidates[image_id], withheld[image_id])
    rate = labelled_rates(manifest.labelled_rows(), len(manifest.names))
    result: dict[str, Any] = {
        "silent": sum(not len(b) for b in candidates.values()),
        "ap50": float(np.nanmean(evidence.ap50())),
    }
    scores.val = val_evidence(run.at("pseudo"), manifest)
    taus = {p: policy_thresholds(config.thresholds, p, scores, rate) for p in ("gmm", "match", "fixed", "precision")}
    for policy, tau in taus.items():
        at = evidence.at(tau)
        result[policy] = {k: [round(float(x), 3) for x in at[k]] for k in ("precision", "recall")}
        result[policy]["tau"] = [round(float(x), 3) for x in tau]
    return result


def stock(row: Row, config: Config, folder: Path, teacher: str, device: str) -> dict[str, Any]:
    """Ultralytics' own training, or its own distillation, for the same steps."""
    from ultralytics_distill import Arguments, train_stock

    weights = str(folder / teacher / "best.pt") if row.teacher else ""
    train_stock(
        Arguments(
            storage_path=str(folder.parent), run_name=folder.name, teacher=weights,
            student=config.models.student, steps=config.train.steps, imgsz=config.train.imgsz, seed=config.run.seed,
            close_mosaic=config.train.close_mosaic, pseudo=row.base == "distill_model_pseudo", device=device,
        )
    )  # fmt: skip
    return {"steps": config.train.steps}


def measured(
    config: Config,
    run: Storage,
    stage: str,
    device: torch.device,
    weights: Sequence[str] = ("best", "last"),
    splits: Sequence[str] = ("val", "test"),
) -> dict[str, Any]:
    """Validation and test metrics of the best and of the last weights."""
    manifest = read_manifest(run.at("dataset"))
    result: dict[str, Any] = {}
    for which in weights:
        name = f"{stage}/{which}.pt"
        model = load_detector(run.read(name), name, config.train.imgsz).to(device)
        result[which] = {}
        for split in splits:
            rows = [r for r in manifest.of_split(split) if r.boxes is not None]
            images = ManifestDataset(rows, [r.boxes for r in rows], manifest.names, config.train.imgsz)
            found = validate(model, images, model.names, WorkerGroup(), device)
            result[which][split] = {k: round(found[k], 5) for k in ("map50", "map50_95")}
            result[which][split]["by_class"] = {k: round(v["map50"], 4) for k, v in found["by_class"].items()}
    return result
