"""Build everything a training loop works with from a job description: models, data, optimiser, criterion."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics.utils.torch_utils import ModelEMA

from dfssd.config import Distill
from dfssd.config.checks import check_weights
from dfssd.config.choices import DIVERGENCES, POLICIES
from dfssd.data.dataset import ManifestDataset, Streams, TrainingSet, disk_cache
from dfssd.data.decoded import DecodedCache
from dfssd.data.loaders import start_server
from dfssd.data.manifest import Boxes, Manifest, read_manifest, read_pseudo
from dfssd.distill.criterion import Criterion
from dfssd.errors import DfssdError
from dfssd.models.families import build_model, family_of
from dfssd.models.ghost_norm import GhostNorm
from dfssd.models.precision import autocast_dtype
from dfssd.pseudo.quality import val_evidence
from dfssd.pseudo.running import RunningThresholds
from dfssd.pseudo.selection import or_no_candidate
from dfssd.pseudo.thresholds import Policy, ScoreCounts, labelled_rates, make_policy
from dfssd.runtime.storage import Storage, is_remote
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train.clocks import StepClock
from dfssd.train.job import TrainJob
from dfssd.train.mean_teacher import InLoopTeacher
from dfssd.train.optim import make_optimiser
from dfssd.train.session import Session
from dfssd.train.student import Student
from dfssd.train.teaching import EMA_TAU, Teaching, build_teaching


def build_session(job: TrainJob, workers: WorkerGroup, device: torch.device) -> Session:
    """Build all parts of a training run; nothing is restored yet."""
    if job.config.train.loader_workers:
        start_server()  # which takes as long as the models do
    config = job.config
    torch.manual_seed(config.run.seed)
    run = Storage(job.run_uri)
    shared = workers.size > 1 or is_remote(job.run_uri)  # of the next stage too, where reading is slow
    manifest = read_manifest(run.at("dataset"), shared)
    weights = job.store.read("init.pt") if job.store.exists("init.pt") else None
    detector = build_model(job.model_spec, manifest.names, config.train.imgsz, weights)[0].to(device)
    # Before taps: hooks are not for what is saved. The average of a mean teacher teaches from the first step, so that it must
    # not begin by running after the network.
    ema = ModelEMA(detector, decay=job.train.ema_decay, tau=EMA_TAU if not job.labels_itself else 1e-3)
    if job.distills:
        check_weights(config.distill)
    teaching = build_teaching(job, run, detector, ema, manifest, device)
    student = _student(detector, teaching, config.distill).to(device).train()
    student.to(memory_format=torch.channels_last)
    if config.train.compile:
        family_of(detector).compile(detector)
        if teaching:
            family_of(teaching.teacher.model).compile(teaching.teacher.model)
    wrapped = workers.share_gradients(student)
    candidates = read_pseudo(run.at(str(job.pseudo)), shared) if job.pseudo and config.unlabelled_batch() else {}
    policy = _policy(job, manifest, candidates) if job.distill_settings() else None
    caches, dtype = _caches(job, manifest), autocast_dtype(config.train.amp, device)
    return Session(
        job=job,
        workers=workers,
        device=device,
        dtype=dtype,
        teacher_dtype=autocast_dtype(config.distill.teacher_amp, device),
        manifest=manifest,
        student=student,
        wrapped=wrapped,
        ema=ema,
        optimiser=make_optimiser(student, job.train, student.online, config.distill.teacher_lr_factor),
        policy=policy,
        teaching=teaching,
        criterion=_criterion(job, workers, device, student, teaching),
        streams=Streams(_streams(job, manifest, candidates, caches), job.strong_view),
        val=_validation(job, manifest, caches),
        in_loop=InLoopTeacher(ema.ema, policy, config, workers) if isinstance(policy, RunningThresholds) else None,
        norms=GhostNorm(student),
        clock=StepClock(device),
        micro_batches=config.micro_batches(),
        scaler=torch.amp.GradScaler(device.type) if dtype == torch.float16 else None,
    )


def _criterion(
    job: TrainJob, workers: WorkerGroup, device: torch.device, student: Student, teaching: Teaching | None
) -> Criterion:
    """All loss terms of the job."""
    box_loss, online = job.config.train.box_loss, student.online
    return Criterion(
        student.family.loss(student.detector, box_loss),
        job.distill_settings(),
        workers,
        pairing=teaching.pairing if teaching else None,
        generators=student.projections.generators if student.projections is not None else None,
        teacher_detection=family_of(online).loss(online, box_loss) if online is not None else None,
        masks=torch.Generator(device),
    )


def _validation(job: TrainJob, manifest: Manifest, caches: dict[str, Any]) -> ManifestDataset:
    val = manifest.of_split("val")
    return ManifestDataset(val, [r.boxes for r in val], manifest.names, job.config.train.imgsz, **caches)


def _policy(job: TrainJob, manifest: Manifest, candidates: dict[str, Boxes]) -> Policy:
    """Thresholds of candidates that are there already, or that follow those which are found in the loop."""
    thresholds, classes = job.config.thresholds, len(manifest.names)
    if job.labels_itself:
        return RunningThresholds(classes, thresholds, job.config.mean_teacher.mean_teacher_policy)
    scores, rate = _scores(manifest, candidates)
    if POLICIES[thresholds.threshold_policy].needs == "val":
        scores.val = val_evidence(Storage(job.run_uri).at(str(job.pseudo)), manifest)
    return make_policy(thresholds, scores, rate)


def _student(detector: nn.Module, teaching: Teaching | None, config: Distill) -> Student:
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
