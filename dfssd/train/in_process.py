"""Run the training loop in this process: for trials of a sweep, for tests, and for experiments on a machine that has neither
Ray nor MLflow (neither is imported here)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dfssd.runtime.tracking import Tracker
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train import checkpoint
from dfssd.train.interrupt import Interrupt, on_sigterm
from dfssd.train.job import TrainJob
from dfssd.train.loop import train
from dfssd.train.session import Session


def train_in_process(
    job: TrainJob,
    device: torch.device | None = None,
    on_validation: Callable[[Session], None] | None = None,
    interrupt: Interrupt | None = None,
) -> dict[str, Any]:
    """Run the loop in this process, with checkpoints, without a worker group.

    Args:
        device: default the CPU.
        on_validation: called after each validation, once its checkpoint is stored.
        interrupt: through which a checkpoint, or an end, is asked for; default by the clock and by SIGTERM.

    Raises:
        DfssdError: of the user's making, or because SIGTERM asked it to stop; a checkpoint is stored then.
    """
    interrupt = interrupt or Interrupt(60 * job.config.train.checkpoint_min)
    tracker = Tracker(job.tracking_uri, job.mlflow_run_id, job.store, system=True)

    def save(metrics: dict[str, Any], session: Session) -> None:
        checkpoint.store_newest(job.store.at("train"), session.step, session.state(), checkpoint.KEEP)
        if on_validation and metrics:
            on_validation(session)

    try:
        with on_sigterm(interrupt):
            return train(job, WorkerGroup(), device or torch.device("cpu"), tracker.log, save, interrupt)
    finally:
        tracker.close()
