"""Everything a training loop works with, built from a job description: models, data, optimiser, criterion."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import ModelEMA

from dfssd.choices import DIVERGENCES
from dfssd.config import Distill
from dfssd.config_checks import check_weights
from dfssd.data.dataset import ManifestDataset, Streams, TrainingSet, disk_cache
from dfssd.data.decoded import DecodedCache
from dfssd.data.loaders import Supply, start_server, training_loader
from dfssd.data.manifest import Boxes, Manifest, read_manifest, read_pseudo
from dfssd.data.sampling import Repeats, StepSampler, repeat_factors
from dfssd.distill.criterion import Criterion
from dfssd.errors import DfssdError
from dfssd.models.detection_loss import DetectionLoss
from dfssd.models.detector import Teacher, build_detector
from dfssd.models.ghost_norm import GhostNorm
from dfssd.models.precision import autocast_dtype
from dfssd.pseudo.calibration import calibrate
from dfssd.pseudo.quality import val_evidence
from dfssd.pseudo.running import RunningThresholds
from dfssd.pseudo.selection import Rules, StepTargets, or_no_candidate, targets_of
from dfssd.pseudo.thresholds import Policy, ScoreCounts, labelled_rates, make_policy
from dfssd.runtime.storage import Storage, is_remote
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train.clocks import StepClock
from dfssd.train.data_parallel import averaged_gradients
from dfssd.train.feed import Feed
from dfssd.train.job import TrainJob
from dfssd.train.mean_teacher import InLoopTeacher
from dfssd.train.optim import make_optimiser
from dfssd.train.random_state import random_state, restore_random_state
from dfssd.train.student import Student
from dfssd.train.teaching import EMA_TAU, Teaching, build_teaching


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
    norms: GhostNorm
    clock: StepClock
    micro_batches: int  # that a global batch is cut into
    scaler: torch.amp.GradScaler | None = None  # where the student's pass is in float16
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

    def targets(self, batch: dict[str, Any], labelled: int) -> StepTargets:
        """What a collated batch teaches, on the CPU; thresholds are those of before the batch."""
        config = self.criterion.config
        tau = self.policy.thresholds() if self.policy and config and config.lambda_u > 0 else None
        return targets_of(batch, labelled, tau, Rules.of(config) if config else Rules())

    @property
    def mine(self) -> range:
        """The micro-batches of a step that this worker computes."""
        return range(self.world.rank, self.micro_batches, self.world.size)

    @property
    def share(self) -> float:
        """Of the micro-batches of a step, this worker's."""
        return len(self.mine) / self.micro_batches

    def average_statistics(self) -> None:
        """Give all workers the same statistics of batch norm; each follows its own micro-batches."""
        averages = [self.ema.ema, *([self.teacher_ema.ema] if self.teacher_ema else [])]
        for model in (self.student, *averages):
            self.world.average_buffers(model, self.share)

    def feed(self) -> Feed:
        """Micro-batches of this worker on its device, from the present step to the last."""
        batch, count = self.job.config.train.batch, self.micro_batches
        labelled = [len(range(k, batch, count)) for k in range(count)]
        return Feed(self.loader(), self.mine, self.targets, labelled, self.device)

    def loader(self) -> Supply:
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
            repeats, per_step, seed, self.step, self.job.steps, plain_from, world.rank, world.size, self.micro_batches
        )
        batch_bytes = -(-sum(per_step.values()) // self.micro_batches) * 3 * config.train.imgsz**2
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
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "micro_batches": self.micro_batches,
            "rng": torch.get_rng_state(),
            "random": random_state(self.device),
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
        if self.scaler and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self.micro_batches = state.get("micro_batches", self.micro_batches)
        if self.micro_batches < self.world.size:
            raise DfssdError(
                f"this run works in {self.micro_batches} micro-batches, fewer than {self.world.size} workers",
                todo=f"resume it with --num-workers {self.micro_batches} or fewer",
            )
        torch.set_rng_state(state["rng"])
        if "random" in state:
            restore_random_state(state["random"], self.device)
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
    shared = world.size > 1 or is_remote(job.run_uri)  # of the next stage too, where reading is slow
    manifest = read_manifest(run.at("dataset"), shared)
    weights = job.store.read("init.pt") if job.store.exists("init.pt") else None
    detector = build_detector(job.model_spec, manifest.names, config.train.imgsz, weights).to(device)
    # Before taps: hooks are not for what is saved. The average of a mean teacher teaches from the first step, so that it must
    # not begin by running after the network.
    ema = ModelEMA(detector, decay=job.train.ema_decay, tau=EMA_TAU if not job.labels_itself else 1e-3)
    if job.distills:
        check_weights(config.distill)
    teaching = build_teaching(job, run, detector, manifest, device)
    if teaching and teaching.reached is not None and config.distill.fade > 0:
        own_dtype = autocast_dtype(config.distill.teacher_amp, device)
        teaching.own = Teacher(ema.ema, device, frozen=False, dtype=own_dtype)
    strong = (
        config.mean_teacher.strong_view if job.labels_itself else config.distill.student_view if job.distills else 0.0
    )
    student = _student(detector, teaching, config.distill).to(device).train()
    student.to(memory_format=torch.channels_last)
    if config.train.compile:
        detector.compile()
        if teaching:
            teaching.teacher.model.compile()
    wrapped = averaged_gradients(student) if world.size > 1 else student
    candidates = read_pseudo(run.at(str(job.pseudo)), shared) if job.pseudo and config.unlabelled_batch() else {}
    policy = _policy(job, manifest, candidates) if method else None
    in_loop = InLoopTeacher(ema.ema, policy, config, world) if isinstance(policy, RunningThresholds) else None
    box_loss, online = config.train.box_loss, teaching.online if teaching else None
    criterion = Criterion(
        DetectionLoss(detector, box_loss),
        method,
        world,
        pairing=teaching.pairing if teaching else None,
        generators=student.projections.generators if student.projections is not None else None,
        teacher_detection=DetectionLoss(online, box_loss) if online is not None else None,
        masks=torch.Generator(device),
    )
    val, caches = manifest.of_split("val"), _caches(job, manifest)
    dtype = autocast_dtype(config.train.amp, device)
    return Session(
        job=job,
        world=world,
        device=device,
        dtype=dtype,
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
        norms=GhostNorm(student),
        clock=StepClock(device),
        micro_batches=config.micro_batches(),
        scaler=torch.amp.GradScaler(device.type) if dtype == torch.float16 else None,
    )


def _policy(job: TrainJob, manifest: Manifest, candidates: dict[str, Boxes]) -> Policy | RunningThresholds:
    """Thresholds of candidates that are there already, or that follow those which are found in the loop."""
    thresholds, classes = job.config.thresholds, len(manifest.names)
    if job.labels_itself:
        return RunningThresholds(classes, thresholds, job.config.mean_teacher.mean_teacher_policy)
    scores, rate = _scores(manifest, candidates)
    if thresholds.threshold_policy == "precision":
        val = val_evidence(Storage(job.run_uri).at(str(job.pseudo)), manifest)
        scores.calibration = calibrate(val.found, val.hits)
    return make_policy(thresholds, scores, rate)


def _student(detector: DetectionModel, teaching: Teaching | None, config: Distill) -> Student:
    """The student with what its teacher makes necessary."""
    if teaching is None:
        return Student(detector)
    for note in teaching.pairing.notes:
        print(f"WARNING: {note}", flush=True)
    channels = teaching.teacher.channels if config.lambda_f > 0 else None
    generators = DIVERGENCES[config.divergence].needs == "generator"
    return Student(detector, channels, config.taps, generators, teaching.online)


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
