"""Ray Train: run the loop on a group of workers, with checkpoints, restarts and metrics."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import ray.train
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from dfssd.errors import DfssdError, find_user_error
from dfssd.runtime.cluster import Resources, check_gpu, free
from dfssd.runtime.tracking import Tracker
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train import checkpoint
from dfssd.train.heartbeat import Heart, Store, Watch
from dfssd.train.job import TrainJob
from dfssd.train.session import Session

RESIZE_S = 30.0  # between looks at whether the cluster can hold more workers; a resize restarts from the checkpoint
MAX_FAILURES = 3  # restarts of the worker group from the newest checkpoint
FIRST_TIMEOUT_S = 600  # of a collective, until all workers have made a step
TIMEOUT_S = 180  # afterwards: a validation's share, a checkpoint's upload


def fit(job: TrainJob, resources: Resources, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Train on a Ray Train worker group and return what the loop returned.

    Failures count since the last progress: a group that got further before it failed too often begins to count anew, so that
    no number of preempted nodes ends a run that moves on between them.

    Args:
        callbacks: of Ray Train, such as the one that hands reports on to Ray Tune.

    Raises:
        DfssdError: a user error inside a worker, or a failure that restarts did not cure.
    """
    if resources.gpu:
        check_gpu(job.config.run)
    store = Store(f"{job.store.uri}/{uuid.uuid4().hex}")
    asked = resources.describe(job.config.run.num_workers)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with Watch(store, str(job.stage), asked, free):
            outcome = _until_no_progress(job, resources, callbacks, store)
    except SystemExit as error:  # Ray answers Ctrl-C with exit code 0, which would read as success
        raise KeyboardInterrupt from error
    finally:
        store.clear()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)  # Ray leaves its own behind
    if isinstance(outcome, DfssdError):
        raise outcome
    assert isinstance(outcome, dict), "rank 0 returns the loop's result"
    return outcome


def _until_no_progress(job: TrainJob, resources: Resources, callbacks: Sequence[Any], store: Store) -> Any:
    """What rank 0 returned; the trainer is started again as long as it got further than the time before.

    Raises:
        DfssdError: it failed too often without getting any further.
    """
    while True:
        reached = checkpoint.newest_step(job.store.at("train"))
        checkpoint.mend_ray_snapshot(job.store.at("train"))
        try:
            return _trainer(job, resources, callbacks, store).fit().return_value
        except ray.train.TrainingFailedError as error:
            user_error = find_user_error(error) or store.error()
            if user_error is not None:
                raise user_error from error
            step, last = checkpoint.newest_step(job.store.at("train")), str(error).strip().splitlines()[-1]
            if step <= reached:
                raise DfssdError(
                    f"training failed {MAX_FAILURES + 1} times without getting beyond step {step}: {last}",
                    where=job.store.uri,
                    todo="see the error above; the same command goes on from the last checkpoint",
                ) from error
            print(f"{job.stage}: failed {MAX_FAILURES + 1} times ({last}), but got from step {reached} to {step}: "
                  "goes on from there", flush=True)  # fmt: skip


def _trainer(job: TrainJob, resources: Resources, callbacks: Sequence[Any], store: Store) -> TorchTrainer:
    run = job.config.run
    starts = 3 + math.ceil(run.wait_min)  # each waits a minute for its nodes
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job, "threads": resources.threads, "key": store.key},
        scaling_config=ScalingConfig(
            num_workers=run.workers if run.elastic else run.workers[0],
            elastic_resize_monitor_interval_s=RESIZE_S,
            use_gpu=resources.gpu,
            resources_per_worker=resources.bundle(),
        ),
        torch_config=TorchConfig(backend="nccl" if resources.gpu else "gloo", timeout_s=FIRST_TIMEOUT_S),
        run_config=RunConfig(
            name="train",
            storage_path=job.store.uri,
            failure_config=FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=starts),
            logging_config=LoggingConfig(log_level="WARNING"),  # its INFO announces every report
            callbacks=list(callbacks) or None,
        ),
    )


def train_worker(settings: dict[str, Any]) -> dict[str, Any] | DfssdError:
    """What each worker runs.

    A user error is returned and not raised, on all workers: a restart would only meet it again. The one that has met it tells
    the others and leaves the group, which ends whatever they wait for.
    """
    context = ray.train.get_context()
    world = WorkerGroup(context.get_world_rank(), context.get_world_size())
    store = Store(settings["key"])
    met = store.error()  # by a group before this one, which could not end in order
    if met is not None:
        return met
    try:
        with Heart(store, world.rank, world.size, lambda: _leave_where_another_has_failed(store, world)):
            return _train(settings["job"], world, settings["threads"])
    except DfssdError as error:
        store.leave_error(error)
        _leave_group()
        return error
    except Exception:
        met = _told(store) if world.size > 1 else None
        if met is None:
            raise
        return met


def _told(store: Store) -> DfssdError | None:
    """The user error of another worker, which may be about to tell it: its leaving the group comes first."""
    for _ in range(20):
        met = store.error()
        if met is not None:
            return met
        time.sleep(0.25)
    return None


def _leave_where_another_has_failed(store: Store, world: WorkerGroup) -> None:
    """NCCL does not notice that another rank has left: end this one's collectives."""
    if (
        world.size > 1
        and torch.distributed.is_initialized()
        and torch.distributed.get_backend() == "nccl"
        and store.error()
    ):
        _leave_group()


def _leave_group() -> None:
    """Close this worker's connections, so that whoever waits for it in a collective gets an error."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    try:
        if distributed.get_backend() == "nccl":
            distributed.distributed_c10d._abort_process_group()
        else:
            distributed.destroy_process_group()
    except (RuntimeError, ValueError) as error:
        print(f"the worker group could not be left: {error}", flush=True)


def _shorten_timeout(world: WorkerGroup) -> None:
    """Once all have made a step, whoever is waited for longer is lost: the first one may compile, fetch and start slowly."""
    if world.size > 1 and torch.distributed.is_initialized():
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT_S), torch.distributed.group.WORLD)


def _train(job: TrainJob, world: WorkerGroup, threads: int) -> dict[str, Any]:
    """The loop, with its metrics and checkpoints handed on."""
    from dfssd.train.loop import train  # imports Ultralytics, which must happen in the worker

    torch.set_num_threads(threads)
    logging.getLogger().setLevel(logging.WARNING)  # Ray's session logs every report through the root logger
    tracker = Tracker(job.tracking_uri, job.mlflow_run_id) if world.rank == 0 else None
    stepped = False

    def log(metrics: dict[str, float], step: int) -> None:
        nonlocal stepped
        if not stepped:
            stepped = True
            _shorten_timeout(world)
        if tracker:
            tracker.log(metrics, step)

    def save(metrics: dict[str, Any], session: Session) -> None:
        """Persist a checkpoint, manifest last, and report. Ray itself would upload the files in an order of its own, and a
        worker killed on the way would leave a checkpoint that only looks like one."""
        if world.rank == 0:
            checkpoint.store_newest(job.store.at("train"), session.step, session.state(), checkpoint.KEEP)
        if metrics:  # none: somebody asked for a checkpoint between validations
            ray.train.report({"step": session.step, **{f"val/{k}": v for k, v in metrics.items()}})

    try:
        return train(job, world, get_device(), log, save)
    finally:
        if tracker:
            tracker.close()
