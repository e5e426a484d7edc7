"""What one training stage is about."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from dfssd.config import Config, Distill, Train
from dfssd.runtime.artefact_names import ArtefactName
from dfssd.runtime.storage import Storage
from dfssd.train.training import Training


@dataclass(frozen=True)
class TrainJob:
    """What one training stage is about; `dfssd.pipeline.training.train_job` makes it from the table of stages.

    Args:
        name: of its artefact, such as teacher, label_only, student; teacher_2 is the teacher of round 2.
        training: what it trains.
        run_uri: storage of the run.
        config: all settings.
        settings: those that the result depends on; a checkpoint made with others is not gone on from.
        tracking_uri, mlflow_run_id: where to log; '' for nowhere.
        teacher: artefact of the teacher that the student is distilled from; None: it has none, or one of its own.
        pseudo: artefact with the candidates for unlabelled images; None trains on labels alone.
        begun: when this attempt at the stage began (seconds since the epoch), which also tells one attempt from another.
    """

    name: ArtefactName
    training: Training
    run_uri: str
    config: Config
    settings: dict[str, Any] = field(hash=False)
    tracking_uri: str = ""
    mlflow_run_id: str = ""

    teacher: ArtefactName | None = None
    pseudo: ArtefactName | None = None
    begun: float = 0.0

    @property
    def stage(self) -> str:
        """What the stage is called in lines, files and MLflow."""
        return str(self.name)

    @property
    def trains_teacher(self) -> bool:
        return self.training.model == "teacher"

    @property
    def labels_itself(self) -> bool:
        """Does the network's own average label the unlabelled images inside the loop?"""
        return self.training.labels_itself

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
        return self.training.distils

    @property
    def strong_view(self) -> float:
        """How strongly the network's view of unlabelled images is changed; 0: it sees what labels them and teaches."""
        if self.labels_itself:
            return self.config.mean_teacher.strong_view
        return self.config.distill.student_view if self.distills else 0.0

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
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]
