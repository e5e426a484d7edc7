"""Everything a training loop works with, built from a job description: models, data, optimiser, criterion."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import ModelEMA

from dfssd.config import Config, as_dict
from dfssd.data.dataset import ManifestDataset, Streams, collate
from dfssd.data.manifest import Manifest, read_manifest, read_pseudo
from dfssd.data.sampling import StepSampler
from dfssd.distill.criterion import Criterion
from dfssd.errors import DfssdError
from dfssd.models.detection_loss import DetectionLoss
from dfssd.models.detector import (
    Branch,
    Teacher,
    autocast_dtype,
    branches,
    build_detector,
    feature_channels,
    load_detector,
)
from dfssd.pseudo.thresholds import Policy, make_policy
from dfssd.storage import Storage
from dfssd.train.optim import make_optimiser
from dfssd.world import World

EMA_TAU = 100  # updates over which the decay of the weight average builds up


@dataclass(frozen=True)
class TrainJob:
    """What one training stage is about.

    Args:
        stage: teacher, label_only or student (also the name of its artefact).
        run_uri: storage of the run.
        config: all settings.
        tracking_uri, mlflow_run_id: where to log; '' for nowhere.
    """

    stage: str
    run_uri: str
    config: Config
    tracking_uri: str = ""
    mlflow_run_id: str = ""

    @property
    def steps(self) -> int:
        return self.config.teacher_steps() if self.stage == "teacher" else self.config.train.steps

    @property
    def model_spec(self) -> str:
        return self.config.models.teacher if self.stage == "teacher" else self.config.models.student

    @property
    def distills(self) -> bool:
        return self.stage == "student"

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
    train = as_dict(config.train, "teacher_steps", "steps", "val_every", "log_every", "loader_workers", "cache_gib")
    teacher = stage == "teacher"
    settings: dict[str, Any] = {
        "model": config.models.teacher if teacher else config.models.student,
        "steps": config.teacher_steps() if teacher else config.train.steps,
        "val_every": config.train.val_every,  # decides which weights can become the best ones
        "seed": config.run.seed,
        "train": train,
    }
    if stage == "student":
        settings["distill"] = as_dict(config.distill)
    return settings


class Student(nn.Module):
    """The detector that is trained, with the 1x1 convolutions that bring its taps to the teacher's channels.

    Both live in one module, so that DDP synchronises the gradients of both.
    """

    def __init__(self, detector: DetectionModel, teacher_channels: list[int] | None) -> None:
        super().__init__()
        self.detector = detector
        pairs = zip(feature_channels(detector), teacher_channels or [], strict=False)
        self.projections = nn.ModuleList(nn.Conv2d(own, other, 1) for own, other in pairs)

    def forward(self, images_bchw: Tensor) -> tuple[dict[str, Branch], list[Tensor]]:
        """Raw head output by branch, and the projected neck outputs (empty without a teacher)."""
        raw = branches(self.detector(images_bchw))
        feats = raw["one2many"]["feats"]
        return raw, [conv(f) for conv, f in zip(self.projections, feats, strict=False)]


@dataclass
class Session:
    """The parts of one training run on one worker."""

    job: TrainJob
    world: World
    device: torch.device
    dtype: torch.dtype | None
    manifest: Manifest
    student: Student
    wrapped: nn.Module
    ema: ModelEMA
    optimiser: torch.optim.AdamW
    policy: Policy | None
    teacher: Teacher | None
    criterion: Criterion
    streams: Streams
    val: ManifestDataset
    step: int = 0
    best: dict[str, Any] | None = None
    history: list[dict[str, float]] = field(default_factory=list)  # logged numbers, each with its "step"

    def loader(self) -> torch.utils.data.DataLoader:
        """Batches of this worker from the present step to the last."""
        config = self.job.config
        per_step = {"labelled": config.train.batch}
        if "unlabelled" in self.streams.streams:
            per_step["unlabelled"] = config.unlabelled_batch()
        plain_from = round(self.job.steps * (1 - config.train.close_mosaic))
        sizes = {name: len(s) for name, s in self.streams.streams.items()}
        seed, world = config.run.seed, self.world
        sampler = StepSampler(
            sizes, per_step, seed, self.step, self.job.steps, plain_from, rank=world.rank, world=world.size
        )
        workers = config.train.loader_workers
        if workers < 0:
            workers = 1 if torch.get_num_threads() > 1 else 0
        return torch.utils.data.DataLoader(
            self.streams,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=4 if workers else None,
        )

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs; positions in the data follow from the step."""
        return {
            "format": 1,
            "fingerprint": self.job.fingerprint(),
            "mlflow_run_id": self.job.mlflow_run_id,
            "step": self.step,
            "student": self.student.state_dict(),
            "ema": self.ema.ema.state_dict(),
            "ema_updates": self.ema.updates,
            "optimiser": self.optimiser.state_dict(),
            "policy": self.policy.state_dict() if self.policy else None,
            "rng": torch.get_rng_state(),
            "best": self.best,
            "history": self.history,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.step, self.best, self.history = state["step"], state["best"], state["history"]
        self.student.load_state_dict(state["student"])
        self.ema.ema.load_state_dict(state["ema"])
        self.ema.updates = state["ema_updates"]
        self.optimiser.load_state_dict(state["optimiser"])
        if self.policy and state["policy"]:
            self.policy.load_state_dict(state["policy"])
        torch.set_rng_state(state["rng"])


def build_session(job: TrainJob, world: World, device: torch.device) -> Session:
    """Build all parts of a training run; nothing is restored yet."""
    config = job.config
    torch.manual_seed(config.run.seed)
    run = Storage(job.run_uri)
    manifest = read_manifest(run.at("dataset"))
    weights = job.store.read("init.pt") if job.store.exists("init.pt") else None
    detector = build_detector(job.model_spec, manifest.names, config.train.imgsz, weights).to(device)
    teacher = _teacher(job, run, detector, manifest, device) if job.distills else None
    channels = teacher.channels if teacher and config.distill.lambda_f > 0 else None
    student = Student(detector, channels).to(device).train()
    student.to(memory_format=torch.channels_last)
    wrapped: nn.Module = DistributedDataParallel(student, broadcast_buffers=False) if world.size > 1 else student
    policy = make_policy(config.distill, len(manifest.names)) if job.distills else None
    criterion = Criterion(
        DetectionLoss(detector),
        config.distill if job.distills else None,
        policy,
        config.train.batch // world.size,
        world,
    )
    val = manifest.of_split("val")
    return Session(
        job=job,
        world=world,
        device=device,
        dtype=autocast_dtype(config.train.amp, device),
        manifest=manifest,
        student=student,
        wrapped=wrapped,
        ema=ModelEMA(detector, decay=config.train.ema_decay, tau=EMA_TAU),
        optimiser=make_optimiser(student, config.train),
        policy=policy,
        teacher=teacher,
        criterion=criterion,
        streams=Streams(_streams(job, run, manifest)),
        val=ManifestDataset(
            val, [r.boxes for r in val], manifest.names, config.train.imgsz, cache_gib=config.train.cache_gib
        ),
    )


def _teacher(
    job: TrainJob, run: Storage, student: DetectionModel, manifest: Manifest, device: torch.device
) -> Teacher | None:
    """The frozen teacher, checked against the student; None where no enabled term needs it."""
    distill = job.config.distill
    if distill.lambda_p == 0 and distill.lambda_f == 0:
        return None
    model = load_detector(run.read("teacher/best.pt"), run.path("teacher/best.pt"), job.config.train.imgsz)
    teacher = Teacher(model, device)
    if teacher.names != manifest.names:
        raise DfssdError(
            f"the teacher knows the classes {teacher.names}, the data has {manifest.names}",
            where=run.path("teacher/best.pt"),
            todo="train the teacher on this data set",
        )
    if model.model[-1].stride.tolist() != student.model[-1].stride.tolist():
        raise DfssdError("teacher and student have other strides", todo="take both from YOLOv8/11/12/26 with P3-P5")
    return teacher


def _streams(job: TrainJob, run: Storage, manifest: Manifest) -> dict[str, ManifestDataset]:
    """Labelled images, and for the student the unlabelled ones with their candidates."""
    config, names = job.config, manifest.names
    labelled = manifest.labelled_rows()
    if not any(r.boxes is not None and len(r.boxes) for r in labelled):
        raise DfssdError("no labelled train image shows a defect", todo="raise --label-fraction, or label more images")

    def dataset(rows: list[Any], boxes: list[Any]) -> ManifestDataset:
        return ManifestDataset(rows, boxes, names, config.train.imgsz, config.train, config.train.cache_gib)

    streams = {"labelled": dataset(labelled, [r.boxes for r in labelled])}
    if job.distills and config.unlabelled_batch():
        candidates = read_pseudo(run.at("pseudo"))
        rows = [r for r in manifest.unlabelled_rows() if r.image_id in candidates]
        if not rows:
            raise DfssdError(
                "there is no unlabelled image to learn from",
                todo="lower --label-fraction, add --unlabelled DIR, or set --unlabelled-ratio 0",
            )
        streams["unlabelled"] = dataset(rows, [candidates[r.image_id] for r in rows])
    return streams
