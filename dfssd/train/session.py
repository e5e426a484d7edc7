"""Everything a training loop works with, built from a job description: models, data, optimiser, criterion."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import ModelEMA

from dfssd.config import Distill
from dfssd.config_checks import check_weights
from dfssd.data.dataset import ManifestDataset, Streams, TrainingSet, disk_cache
from dfssd.data.decoded import DecodedCache
from dfssd.data.loaders import start_server, training_loader
from dfssd.data.manifest import Boxes, Manifest, read_manifest, read_pseudo
from dfssd.data.sampling import Repeats, StepSampler, repeat_factors
from dfssd.distill.criterion import Criterion, StudentOutput
from dfssd.distill.features import Projections
from dfssd.errors import DfssdError
from dfssd.models.batch_norm import share_statistics
from dfssd.models.detection_loss import DetectionLoss
from dfssd.models.detector import Teacher, autocast_dtype, build_detector, feature_channels
from dfssd.models.head import branches
from dfssd.models.taps import Taps
from dfssd.pseudo.running import RunningThresholds
from dfssd.pseudo.selection import Rules, StepTargets, or_no_candidate, targets_of
from dfssd.pseudo.thresholds import Policy, ScoreCounts, labelled_rates, make_policy
from dfssd.runtime.storage import Storage
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train.job import TrainJob
from dfssd.train.mean_teacher import InLoopTeacher
from dfssd.train.optim import make_optimiser
from dfssd.train.teaching import EMA_TAU, Teaching, build_teaching


class Student(nn.Module):
    """All that is trained: the detector, the projections of its taps, and an online teacher where there is one.

    They live in one module, so that DDP synchronises the gradients of all.

    Args:
        teacher_channels: channels of the teacher's taps; None: features are not distilled.
        layers: layers to tap; none: the neck's outputs.
        generators: with MGD's generators.
        online: a teacher that trains too, on the first `labelled` images of a batch.
    """

    def __init__(
        self,
        detector: DetectionModel,
        teacher_channels: list[int] | None = None,
        layers: Sequence[int] = (),
        generators: bool = False,
        online: DetectionModel | None = None,
        labelled: int = 0,
    ) -> None:
        super().__init__()
        self.detector, self.online, self.labelled = detector, online, labelled
        self.taps = Taps(detector, layers, "student") if layers and teacher_channels else None
        own = self.taps.channels if self.taps else feature_channels(detector)
        self.projections = Projections(own, teacher_channels, generators) if teacher_channels else None

    def forward(self, images_bchw: Tensor) -> StudentOutput:
        raw = branches(self.detector(images_bchw))
        taps = self.taps.take() if self.taps else raw["one2many"].feats
        projected = self.projections(taps) if self.projections is not None else []
        teacher = branches(self.online(images_bchw[: self.labelled])) if self.online is not None else None
        return StudentOutput(raw, taps, projected, teacher)


@dataclass
class Session:
    """The parts of one training run on one worker."""

    job: TrainJob
    world: WorkerGroup
    device: torch.device
    dtype: torch.dtype | None  # of the student's pass under autocast; None: float32
    teacher_dtype: torch.dtype | None
    manifest: Manifest
    student: Student
    wrapped: nn.Module
    ema: ModelEMA
    optimiser: torch.optim.AdamW
    policy: Policy | RunningThresholds | None
    teaching: Teaching | None
    criterion: Criterion
    streams: Streams
    val: ManifestDataset
    in_loop: InLoopTeacher | None = None  # where the network's own average labels
    step: int = 0
    best: dict[str, Any] | None = None
    history: list[dict[str, float]] = field(default_factory=list)  # logged numbers, each with its "step"
    before_s: float = 0.0  # what earlier attempts spent, up to the checkpoint that this one goes on from

    @property
    def teacher(self) -> Teacher | None:
        return self.teaching.teacher if self.teaching else None

    @property
    def teacher_ema(self) -> ModelEMA | None:
        return self.teaching.ema if self.teaching else None

    def targets(self, batch: dict[str, Any]) -> StepTargets:
        """What a collated batch teaches, on the CPU; thresholds are those of before the batch."""
        config = self.criterion.config
        tau = self.policy.thresholds() if self.policy and config and config.lambda_u > 0 else None
        return targets_of(batch, self.student.labelled, tau, Rules.of(config) if config else Rules())

    def loader(self) -> Iterable[dict[str, Any]]:
        """Batches of this worker from the present step to the last."""
        config = self.job.config
        per_step = {"labelled": config.train.batch}
        if "unlabelled" in self.streams.streams:
            per_step["unlabelled"] = config.unlabelled_batch()
        plain_from = round(self.job.steps * (1 - config.train.close_mosaic))
        repeats: dict[str, Repeats] = {name: len(s) for name, s in self.streams.streams.items()}
        if config.train.repeat_threshold:
            labels, classes = [r.boxes for r in self.manifest.labelled_rows()], len(self.manifest.names)
            repeats["labelled"] = repeat_factors(labels, classes, config.train.repeat_threshold)
        seed, world = config.run.seed, self.world
        sampler = StepSampler(
            repeats, per_step, seed, self.step, self.job.steps, plain_from, rank=world.rank, world=world.size
        )
        batch_bytes = -(-sum(per_step.values()) // world.size) * 3 * config.train.imgsz**2
        return training_loader(self.streams, sampler, config.train.loader_workers, self.device, batch_bytes)

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
            "balance": self.criterion.balance.state_dict() if self.criterion.balance else None,
            "teacher_ema": self.teacher_ema.ema.state_dict() if self.teacher_ema else None,
            "teacher_ema_updates": self.teacher_ema.updates if self.teacher_ema else 0,
            "rng": torch.get_rng_state(),
            "best": self.best,
            "lead": self.criterion.lead,
            "started_at": self.in_loop.started_at if self.in_loop else None,
            "history": self.history,
            "clock": {"begun": self.job.begun, "at": time.time(), "before_s": self.before_s},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.step, self.best, self.history = state["step"], state["best"], state["history"]
        self.student.load_state_dict(state["student"])
        self.ema.ema.load_state_dict(state["ema"])
        self.ema.updates = state["ema_updates"]
        own = [{k: v for k, v in group.items() if k != "params"} for group in self.optimiser.param_groups]
        self.optimiser.load_state_dict(state["optimiser"])
        for group, settings in zip(self.optimiser.param_groups, own, strict=True):
            group.update(settings)  # the run's own, where a trial goes on from another one's checkpoint
        if self.policy and state["policy"]:
            self.policy.load_state_dict(state["policy"])
        if self.criterion.balance and state["balance"]:
            self.criterion.balance.load_state_dict(state["balance"])
        if self.teacher_ema and state["teacher_ema"]:
            self.teacher_ema.ema.load_state_dict(state["teacher_ema"])
            self.teacher_ema.updates = state["teacher_ema_updates"]
        self.criterion.lead = state.get("lead", 1.0)
        if self.in_loop:
            self.in_loop.started_at = state["started_at"]
        torch.set_rng_state(state["rng"])
        clock = state.get("clock")
        if clock:  # workers that were started again within one attempt: its own clock never stopped
            this = clock["begun"] == self.job.begun
            self.before_s = clock["before_s"] + (0.0 if this else max(0.0, clock["at"] - clock["begun"]))


def build_session(job: TrainJob, world: WorkerGroup, device: torch.device) -> Session:
    """Build all parts of a training run; nothing is restored yet."""
    if job.config.train.loader_workers:
        start_server()  # which takes as long as the models do
    config, method = job.config, job.distill_settings()
    torch.manual_seed(config.run.seed)
    run = Storage(job.run_uri)
    manifest = read_manifest(run.at("dataset"))
    weights = job.store.read("init.pt") if job.store.exists("init.pt") else None
    detector = build_detector(job.model_spec, manifest.names, config.train.imgsz, weights).to(device)
    # Before taps: hooks are not for what is saved. The average of a mean teacher teaches from the first step, so that it must
    # not begin by running after the network.
    ema = ModelEMA(detector, decay=job.train.ema_decay, tau=EMA_TAU if not job.labels_itself else 1e-3)
    if job.distills:
        check_weights(config.distill)
    teaching = build_teaching(job, run, detector, manifest, device)
    if teaching and teaching.reached is not None and config.distill.fade > 0:
        teaching.own = Teacher(ema.ema, device, frozen=False)
    labelled = world.share_of(config.train.batch)
    strong = (
        config.mean_teacher.strong_view if job.labels_itself else config.distill.student_view if job.distills else 0.0
    )
    student = _student(detector, teaching, config.distill, labelled).to(device).train()
    student.to(memory_format=torch.channels_last)
    if config.train.batch_norm == "global" or (config.train.batch_norm == "auto" and world.size > 1):
        share_statistics(student)
    if config.train.compile:
        detector.compile()
        if teaching:
            teaching.teacher.model.compile()
    wrapped: nn.Module = DistributedDataParallel(student, broadcast_buffers=False) if world.size > 1 else student
    candidates = read_pseudo(run.at(str(job.pseudo))) if job.pseudo and config.unlabelled_batch() else {}
    policy = _policy(job, manifest, candidates) if method else None
    in_loop = InLoopTeacher(ema.ema, policy, config, labelled, world) if isinstance(policy, RunningThresholds) else None
    box_loss, online = config.train.box_loss, teaching.online if teaching else None
    criterion = Criterion(
        DetectionLoss(detector, box_loss),
        method,
        world,
        pairing=teaching.pairing if teaching else None,
        generators=student.projections.generators if student.projections is not None else None,
        teacher_detection=DetectionLoss(online, box_loss) if online is not None else None,
    )
    val, caches = manifest.of_split("val"), _caches(job, manifest)
    return Session(
        job=job,
        world=world,
        device=device,
        dtype=autocast_dtype(config.train.amp, device),
        teacher_dtype=autocast_dtype(config.distill.teacher_amp, device),
        manifest=manifest,
        student=student,
        wrapped=wrapped,
        ema=ema,
        optimiser=make_optimiser(student, job.train, online, config.distill.teacher_lr_factor),
        policy=policy,
        teaching=teaching,
        criterion=criterion,
        streams=Streams(_streams(job, manifest, candidates, caches), strong),
        val=ManifestDataset(val, [r.boxes for r in val], manifest.names, config.train.imgsz, **caches),
        in_loop=in_loop,
    )


def _policy(job: TrainJob, manifest: Manifest, candidates: dict[str, Boxes]) -> Policy | RunningThresholds:
    """Thresholds of candidates that are there already, or that follow those which are found in the loop."""
    thresholds, classes = job.config.thresholds, len(manifest.names)
    if job.labels_itself:
        return RunningThresholds(classes, thresholds, job.config.mean_teacher.mean_teacher_policy)
    return make_policy(thresholds, *_scores(manifest, candidates))


def _student(detector: DetectionModel, teaching: Teaching | None, config: Distill, labelled: int) -> Student:
    """The student with what its teacher makes necessary."""
    if teaching is None:
        return Student(detector, labelled=labelled)
    for note in teaching.pairing.notes:
        print(f"WARNING: {note}", flush=True)
    channels = teaching.teacher.channels if config.lambda_f > 0 else None
    return Student(detector, channels, config.taps, config.divergence == "mgd", teaching.online, labelled)


def _scores(manifest: Manifest, candidates: dict[str, Boxes]) -> tuple[ScoreCounts, np.ndarray]:
    """What a threshold policy is made from: scores of all candidates, and (C,) labelled boxes an image."""
    scores = ScoreCounts.empty(len(manifest.names))
    for image_id in sorted(candidates):
        scores.add(candidates[image_id])
    return scores, labelled_rates(manifest.labelled_rows(), len(manifest.names))


def _caches(job: TrainJob, manifest: Manifest) -> dict[str, Any]:
    """Where files and pixels are kept on this machine, as the settings say."""
    own = job.config.train
    decoded = DecodedCache(own.decoded_dir, own.cache_gib) if own.cache_gib else None
    if decoded:
        decoded.make_room(manifest.rows, own.imgsz)
    return {"files": disk_cache(own), "decoded": decoded}


def _streams(
    job: TrainJob, manifest: Manifest, candidates: dict[str, Boxes], caches: dict[str, Any]
) -> dict[str, TrainingSet]:
    """Labelled images, and where there are candidates the unlabelled ones with them."""
    labelled = manifest.labelled_rows()
    if not any(r.boxes is not None and len(r.boxes) for r in labelled):
        raise DfssdError("no labelled train image shows a defect", todo="raise --label-fraction, or label more images")

    train = job.config.train
    streams = {"labelled": TrainingSet(labelled, [r.boxes for r in labelled], train, **caches)}
    if (job.pseudo or job.labels_itself) and job.config.unlabelled_batch():
        rows = [r for r in manifest.unlabelled_rows() if job.labels_itself or r.image_id in candidates]
        if not rows:
            raise DfssdError(
                "there is no unlabelled image to learn from",
                todo="lower --label-fraction, add --unlabelled DIR, or set --unlabelled-ratio 0",
            )
        boxes = [None if job.labels_itself else or_no_candidate(candidates[r.image_id]) for r in rows]
        streams["unlabelled"] = TrainingSet(rows, boxes, train, **caches)
    return streams
