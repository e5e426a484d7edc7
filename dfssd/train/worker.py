"""Ray Train: run the loop on a group of workers, with checkpoints, restarts and metrics."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Sequence
from typing import Any

import ray.train
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from dfssd.errors import DfssdError, find_user_error
from dfssd.runtime.cluster import Resources
from dfssd.runtime.storage import Storage
from dfssd.runtime.tracking import Tracker
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train import checkpoint
from dfssd.train.ending import Watch, take_over_signals
from dfssd.train.job import TrainJob
from dfssd.train.session import Session

RESIZE_S = 30.0  # between looks at whether the cluster can hold more workers; a resize restarts from the checkpoint
MAX_FAILURES = 3  # restarts of the worker group from the newest checkpoint


def fit(job: TrainJob, resources: Resources, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Train on a Ray Train worker group and return what the loop returned.

    Args:
        callbacks: of Ray Train, such as the one that hands reports on to Ray Tune.

    Raises:
        DfssdError: a user error inside a worker, or a failure that restarts did not cure.
    """
    checkpoint.mend_ray_snapshot(job.store.at("train"))
    trainer = _Trainer(
        train_worker,
        train_loop_config={"job": job, "threads": resources.threads},
        scaling_config=ScalingConfig(
            num_workers=job.config.run.workers if job.config.run.elastic else job.config.run.workers[0],
            elastic_resize_monitor_interval_s=RESIZE_S,
            use_gpu=resources.gpu,
            resources_per_worker={"CPU": resources.cpus, **({"GPU": 1} if resources.gpu else {})},
        ),
        torch_config=TorchConfig(backend="nccl" if resources.gpu else "gloo", timeout_s=600),
        run_config=RunConfig(
            name="train",
            storage_path=job.store.uri,
            failure_config=FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=3),
            logging_config=LoggingConfig(log_level="WARNING"),  # its INFO announces every report
            callbacks=list(callbacks) or None,
        ),
    )
    trainer.store = job.store
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        outcome = trainer.fit().return_value
    except SystemExit as error:  # Ray answers Ctrl-C with exit code 0, which would read as success
        raise KeyboardInterrupt from error
    except ray.train.TrainingFailedError as error:
        user_error = find_user_error(error)
        if user_error is not None:
            raise user_error from error
        raise DfssdError(
            f"training did not survive {MAX_FAILURES} restarts: {str(error).strip().splitlines()[-1]}",
            where=job.store.uri,
            todo="see the error above; the same command goes on from the last checkpoint",
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # Ray leaves its own behind
                signal.signal(number, handler)
    if isinstance(outcome, DfssdError):
        raise outcome
    assert isinstance(outcome, dict), "rank 0 returns the loop's result"
    return outcome


class _Trainer(TorchTrainer):
    """Ray's trainer; Ctrl-C and SIGTERM leave a checkpoint before they end it."""

    store: Storage

    def _register_sigint_handler(self, controller: Any) -> None:
        super()._register_sigint_handler(controller)
        take_over_signals(self.store)


def train_worker(settings: dict[str, Any]) -> dict[str, Any] | DfssdError:
    """What each worker runs. A user error is returned rather than raised where nobody waits for this worker:
    a restart would only meet it again."""
    from dfssd.train.loop import train  # imports Ultralytics, which must happen in the worker

    context = ray.train.get_context()
    world = WorkerGroup(context.get_world_rank(), context.get_world_size())
    job: TrainJob = settings["job"]
    torch.set_num_threads(settings["threads"])
    logging.getLogger().setLevel(logging.WARNING)  # Ray's session logs every report through the root logger
    tracker = Tracker(job.tracking_uri, job.mlflow_run_id, job.store) if world.rank == 0 else None

    def log(metrics: dict[str, float], step: int) -> None:
        if tracker:
            tracker.log(metrics, step)

    def save(metrics: dict[str, Any], session: Session) -> None:
        """Persist a checkpoint, manifest last, and report. Ray itself would upload the files in an order of its own, and a
        worker killed on the way would leave a checkpoint that only looks like one."""
        if world.rank == 0:
            checkpoint.store_newest(job.store.at("train"), session.step, session.state(), checkpoint.KEEP)
        ray.train.report({"step": session.step, **{f"val/{k}": v for k, v in metrics.items()}})

    watch = Watch(job.store) if world.rank == 0 else None

    def after_step(session: Session) -> None:
        if watch:
            watch.answer(
                lambda: checkpoint.store_newest(job.store.at("train"), session.step, session.state(), checkpoint.KEEP),
                session.step,
            )

    try:
        return train(job, world, get_device(), log, save, after_step)
    except DfssdError as error:
        if world.size == 1:
            return error
        raise
    finally:
        if watch:
            watch.close()
        if tracker:
            tracker.close()
