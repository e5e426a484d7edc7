"""What one training stage is about, and which settings its result depends on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from dfssd.config import Config, Distill, Train, as_dict
from dfssd.runtime.storage import Storage

MEAN_TEACHER = "mean_teacher"


@dataclass(frozen=True)
class TrainJob:
    """What one training stage is about.

    Args:
        stage: teacher, label_only or student (also the name of its artefact); teacher_2 is the teacher of round 2.
        run_uri: storage of the run.
        config: all settings.
        tracking_uri, mlflow_run_id: where to log; '' for nowhere.
        teacher: artefact of the teacher that the student is distilled from.
        pseudo: artefact with the candidates for unlabelled images; '' trains on labels alone.
        begun: when this attempt at the stage began (seconds since the epoch), which also tells one attempt from another.
    """

    stage: str
    run_uri: str
    config: Config
    tracking_uri: str = ""
    mlflow_run_id: str = ""

    teacher: str = "teacher"
    pseudo: str = ""
    begun: float = 0.0

    @property
    def trains_teacher(self) -> bool:
        return is_teacher(self.stage)

    @property
    def labels_itself(self) -> bool:
        """Does the network's own average label the unlabelled images inside the loop?"""
        return self.stage == MEAN_TEACHER

    @property
    def train(self) -> Train:
        """Settings of the loop; a mean teacher has a learning rate and an average of its own."""
        if not self.labels_itself:
            return self.config.train
        own = self.config.mean_teacher
        return self.config.train.model_copy(update={"lr": own.mean_teacher_lr, "ema_decay": own.mean_teacher_decay})

    @property
    def steps(self) -> int:
        if self.labels_itself:
            return self.config.mean_teacher_steps()
        return self.config.teacher_steps() if self.trains_teacher else self.config.train.steps

    @property
    def model_spec(self) -> str:
        return self.config.models.teacher if self.trains_teacher else self.config.models.student

    @property
    def distills(self) -> bool:
        return self.stage == "student"

    @property
    def patience(self) -> int:
        """Validations without a better one after which training stops; 0: never."""
        return self.config.train.teacher_patience if self.trains_teacher else 0

    def distill_settings(self) -> Distill | None:
        """Settings of the terms beside L_sup. A teacher of a later round has no teacher, and so L_pse alone of them."""
        if self.labels_itself:
            own = self.config.mean_teacher
            return self.config.distill.model_copy(
                update={
                    "lambda_u": own.mean_teacher_weight,
                    "score_power": own.mean_teacher_power,
                    "agreement_min": 0.0,
                }
            )
        return self.config.distill if self.distills or self.pseudo else None

    @property
    def store(self) -> Storage:
        return Storage(self.run_uri).at(self.stage)

    def val_every(self) -> int:
        return self.config.train.val_every or max(1, self.steps // 10)

    def fingerprint(self) -> str:
        """Digest of the settings that this stage's result depends on."""
        return hashlib.sha256(json.dumps(stage_config(self.config, self.stage), sort_keys=True).encode()).hexdigest()[
            :16
        ]


def stage_config(config: Config, stage: str) -> dict[str, Any]:
    """The settings that the result of a training stage depends on; what only changes speed is left out."""
    train = as_dict(
        config.train,
        *("teacher_steps", "steps", "val_every", "log_every", "compile"),
        *("loader_workers", "cache_gib", "cache_dir", "cache_dir_gib"),
    )
    teacher = is_teacher(stage)
    if not teacher:
        del train["teacher_patience"]
    if stage == MEAN_TEACHER:
        del train["lr"], train["ema_decay"]
    settings: dict[str, Any] = {
        "model": config.models.teacher if teacher else config.models.student,
        "steps": config.teacher_steps() if teacher else config.train.steps,
        "val_every": config.train.val_every,  # decides which weights can become the best ones
        "seed": config.run.seed,
        "train": train,
    }
    if stage == MEAN_TEACHER:
        settings["steps"] = config.mean_teacher_steps()
        settings["mean_teacher"] = as_dict(config.mean_teacher, "mean_teacher_steps")
        settings["pseudo"] = {k: getattr(config.pseudo, k) for k in ("floor", "nms_iou", "max_candidates")}
        settings["distill"] = {k: getattr(config.distill, k) for k in ("unlabelled_ratio", "uncertain")}
        settings["thresholds"] = {k: getattr(config.thresholds, k) for k in ("tau", "tau_min", "tau_max")}
    elif stage == "student" or (teacher and stage != "teacher"):
        own = ("unlabelled_ratio", "score_power", "uncertain", "agreement_min", "lambda_u")
        distill = as_dict(config.distill, "distill_teacher")  # its content counts, not its path: see make_stage
        settings["distill"] = distill if stage == "student" else {k: distill[k] for k in own}
        settings["thresholds"] = as_dict(config.thresholds)
    return settings


def is_teacher(stage: str) -> bool:
    """Is this the stage of a teacher, of whatever round or kind?"""
    return stage == MEAN_TEACHER or stage.split("_")[0] == "teacher"
