"""The parts of one training run on one worker, and what a checkpoint holds of them. `dfssd.train.build` makes them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from ultralytics.utils.torch_utils import ModelEMA

from dfssd.data.dataset import ManifestDataset, Streams
from dfssd.data.loaders import Supply, training_loader
from dfssd.data.manifest import Manifest
from dfssd.data.sampling import Repeats, StepSampler, repeat_factors
from dfssd.distill.criterion import Criterion
from dfssd.errors import DfssdError
from dfssd.models.family import TeacherNetwork
from dfssd.models.ghost_norm import GhostNorm
from dfssd.pseudo.selection import Rules, StepTargets, targets_of
from dfssd.pseudo.thresholds import Policy
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train.clocks import StepClock
from dfssd.train.feed import Feed
from dfssd.train.job import TrainJob
from dfssd.train.mean_teacher import InLoopTeacher
from dfssd.train.random_state import random_state, restore_random_state
from dfssd.train.student import Student
from dfssd.train.teaching import Teaching


@dataclass
class Session:
    """The parts of one training run on one worker."""

    job: TrainJob
    workers: WorkerGroup
    device: torch.device
    dtype: torch.dtype | None  # of the student's pass under autocast; None: float32
    teacher_dtype: torch.dtype | None
    manifest: Manifest
    student: Student
    wrapped: nn.Module
    ema: ModelEMA
    optimiser: torch.optim.AdamW
    policy: Policy | None
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
    def teacher(self) -> TeacherNetwork | None:
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
        return range(self.workers.rank, self.micro_batches, self.workers.size)

    @property
    def share(self) -> float:
        """Of the micro-batches of a step, this worker's."""
        return len(self.mine) / self.micro_batches

    def average_statistics(self) -> None:
        """Give all workers the same statistics of batch norm; each follows its own micro-batches."""
        averages = [self.ema.ema, *([self.teacher_ema.ema] if self.teacher_ema else [])]
        for model in (self.student, *averages):
            self.workers.average_buffers(model, self.share)

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
        seed, workers = config.run.seed, self.workers
        sampler = StepSampler(
            repeats,
            per_step,
            seed,
            self.step,
            self.job.steps,
            plain_from,
            workers.rank,
            workers.size,
            self.micro_batches,
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
        if self.micro_batches < self.workers.size:
            raise DfssdError(
                f"this run works in {self.micro_batches} micro-batches, fewer than {self.workers.size} workers",
                todo=f"resume it with --num-workers {self.micro_batches} or fewer",
            )
        torch.set_rng_state(state["rng"])
        if "random" in state:
            restore_random_state(state["random"], self.device)
        clock = state.get("clock")
        if clock:  # workers that were started again within one attempt: its own clock never stopped
            this = clock["begun"] == self.job.begun
            self.before_s = clock["before_s"] + (0.0 if this else max(0.0, clock["at"] - clock["begun"]))
