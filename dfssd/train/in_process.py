"""Run the training loop in this process: for trials of a sweep, for tests, and for experiments on a machine that has neither
Ray nor MLflow (neither is imported here)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dfssd.runtime.tracking import Tracker
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train import checkpoint
from dfssd.train.job import TrainJob
from dfssd.train.loop import train
from dfssd.train.session import Session


def train_in_process(
    job: TrainJob, device: torch.device | None = None, on_validation: Callable[[Session], None] | None = None
) -> dict[str, Any]:
    """Run the loop in this process, with checkpoints, without a worker group.

    Args:
        device: default the CPU.
        on_validation: called after each validation, once its checkpoint is stored.
    """
    tracker = Tracker(job.tracking_uri, job.mlflow_run_id, job.store)

    def save(metrics: dict[str, Any], session: Session) -> None:
        checkpoint.store_newest(job.store.at("train"), session.step, session.state(), checkpoint.KEEP)
        if on_validation:
            on_validation(session)

    try:
        return train(job, WorkerGroup(), device or torch.device("cpu"), tracker.log, save)
    finally:
        tracker.close()
