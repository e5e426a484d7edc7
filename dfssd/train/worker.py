"""Ray Train: run the loop on a group of workers, with checkpoints, restarts and metrics."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from dfssd.errors import DfssdError, find_user_error
from dfssd.runtime.cluster import Resources, free
from dfssd.runtime.progress import clock
from dfssd.runtime.storage import Storage
from dfssd.runtime.tasks import check_gpu
from dfssd.runtime.tracking import Tracker
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train import checkpoint, ending
from dfssd.train.heartbeat import Heart, Store, Watch
from dfssd.train.interrupt import Interrupt
from dfssd.train.job import TrainJob
from dfssd.train.process_group import GroupConfig
from dfssd.train.session import Session

RESIZE_S = 30.0  # between looks at whether the cluster can hold more workers; a resize restarts from the checkpoint
MAX_FAILURES = 3  # restarts of the worker group from the newest checkpoint
FIRST_TIMEOUT_S = 600  # of a collective, until all workers have made a step
TIMEOUT_S = 180  # afterwards: a validation's share, a checkpoint's upload
LAST_S = 20.0  # before its node goes, in which a group stores its last checkpoint
HOLD_S = 30.0  # in which the controller ends a group of which a worker has met a user error


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
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with Watch(store, str(job.stage), asked, free):
            outcome = _until_no_progress(job, resources, callbacks, store)
    except SystemExit as error:  # Ray answers Ctrl-C with exit code 0, which would read as success
        raise KeyboardInterrupt from error
    finally:
        if ray.is_initialized():  # it may be gone, and what ended this run is worth more than that
            store.clear()
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # Ray leaves its own behind
                signal.signal(number, handler)
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
        trainer = _trainer(job, resources, callbacks, store)
        try:
            outcome = trainer.fit().return_value
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:  # the latter: `EndAtUserError`
            user_error = find_user_error(error) or store.error()
            if user_error is not None:
                raise user_error from error
            if trainer.asked_to_end():
                raise KeyboardInterrupt from error
            if isinstance(error, ray.exceptions.RayActorError):  # the controller is gone, and nobody asked it to go
                raise
            step, last = checkpoint.newest_step(job.store.at("train")), str(error).strip().splitlines()[-1]
            if step <= reached:
                raise DfssdError(
                    f"training failed {MAX_FAILURES + 1} times without getting beyond step {step}: {last}",
                    where=job.store.uri,
                    todo="see the error above; the same command goes on from the last checkpoint",
                ) from error
            print(f"{job.stage}: failed {MAX_FAILURES + 1} times ({last}), but got from step {reached} to {step}: "
                  "goes on from there", flush=True)  # fmt: skip
        else:
            if trainer.asked_to_end():  # in its last steps
                raise KeyboardInterrupt
            return outcome


def _trainer(job: TrainJob, resources: Resources, callbacks: Sequence[Any], store: Store) -> _Trainer:
    run = job.config.run
    starts = 3 + math.ceil(run.wait_min)  # each waits a minute for its nodes
    trainer = _Trainer(
        train_worker,
        train_loop_config={"job": job, "threads": resources.threads, "key": store.key},
        scaling_config=ScalingConfig(
            num_workers=run.workers if run.elastic else run.workers[0],
            elastic_resize_monitor_interval_s=RESIZE_S,
            use_gpu=resources.gpu,
            resources_per_worker=resources.bundle(),
        ),
        torch_config=GroupConfig(backend="nccl" if resources.gpu else "gloo", timeout_s=FIRST_TIMEOUT_S),
        run_config=RunConfig(
            name="train",
            storage_path=job.store.uri,
            failure_config=FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=starts),
            logging_config=LoggingConfig(log_level="WARNING"),  # its INFO announces every report
            callbacks=[EndAtUserError(store), *callbacks],
        ),
    )
    trainer.artefact = job.store
    return trainer


class EndAtUserError(WorkerGroupCallback):
    """Ends the group, and the controller in which it runs, once a worker has left a user error for the driver.

    To let the worker fail instead takes a minute: Ray first waits half of one for the others to leave the process group, in
    which they wait for the failed one, and then starts another group.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.ending = store, False

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        with suppress(ray.exceptions.RayError):  # the control service is away: the next poll asks again
            if not self.ending and self.store.error() is not None:
                self.ending = True
                ray.get_runtime_context().current_actor.abort.remote()


class _Trainer(TorchTrainer):
    """Ray's trainer; Ctrl-C and SIGTERM leave a checkpoint before they end it.

    It has no Ray data sets, for which each group would start an actor: a process of 190 MB, and seconds of a core.
    """

    artefact: Storage
    signals: ending.Signals | None = None  # outside the main thread, as in a sweep's trial, there are none

    def asked_to_end(self) -> bool:
        """Has a signal asked for it while the training was running? Call it once, when that has ended."""
        return self.signals is not None and self.signals.over()

    def _create_default_callbacks(self) -> list[Any]:
        return [c for c in super()._create_default_callbacks() if not isinstance(c, DatasetsCallback)]

    def _register_sigint_handler(self, controller: Any) -> None:
        super()._register_sigint_handler(controller)
        self.signals = ending.Signals(self.artefact)


def train_worker(settings: dict[str, Any]) -> dict[str, Any] | DfssdError:
    """What each worker runs.

    A user error is returned and not raised where nobody waits for this worker: a restart would only meet it again. Where
    others wait for it in a collective it is left for `EndAtUserError`, which ends the group; should that not come, this
    worker's failure starts the next group, which returns the error at once.
    """
    context = ray.train.get_context()
    workers = WorkerGroup(context.get_world_rank(), context.get_world_size())
    store = Store(settings["key"])
    met = store.error()
    if met is not None:
        return met
    job: TrainJob = settings["job"]
    interrupt = Interrupt(60 * job.config.train.checkpoint_min)
    notices = Notices(workers.rank, ray.get_runtime_context().get_node_id(), interrupt)
    try:
        with Heart(store, workers.rank, workers.size, notices):
            return _train(job, workers, settings["threads"], interrupt)
    except DfssdError as error:
        if workers.size == 1:
            return error
        store.leave_error(error)
        time.sleep(HOLD_S)
        raise


class Notices:
    """What a worker is told of its node, looked for at each of its beats: that it is about to go.

    The loop stores a checkpoint after its present step, on all workers alike, and another just before the node goes: until
    then the group works on.
    """

    def __init__(self, rank: int, node: str, interrupt: Interrupt) -> None:
        self.rank, self.node, self.interrupt, self.told = rank, node, interrupt, 0

    def __call__(self) -> None:
        deadline = draining().get(self.node)
        if deadline is None:
            return
        left = deadline / 1000 - time.time() if deadline else math.inf
        due = 2 if left < LAST_S else 1
        if due > self.told:
            said = f", in {clock(max(0.0, left))}" if math.isfinite(left) else ""
            print(f"rank {self.rank}: its node is about to go{said}; a checkpoint is stored", flush=True)
            self.told = due
            self.interrupt.ask()


def draining() -> dict[str, int]:
    """Nodes that the cluster is about to take away, by id (a spot instance's notice, `ray drain-node`, an autoscaler), and
    when (ms since the epoch; 0: nobody knows)."""
    return dict(ray._private.state.state.get_draining_nodes() or {})


def _shorten_timeout(workers: WorkerGroup) -> None:
    """Once all have made a step, whoever is waited for longer is lost: the first one may compile, fetch and start slowly."""
    if workers.size > 1 and torch.distributed.is_initialized():
        set_timeout = getattr(torch.distributed, "set_timeout", None)  # public from PyTorch 2.14 on
        set_timeout = set_timeout or torch.distributed.distributed_c10d._set_pg_timeout
        set_timeout(timedelta(seconds=TIMEOUT_S), torch.distributed.group.WORLD)


def _train(job: TrainJob, workers: WorkerGroup, threads: int, interrupt: Interrupt) -> dict[str, Any]:
    """The loop, with its metrics and checkpoints handed on."""
    from dfssd.train.loop import train  # imports Ultralytics, which must happen in the worker

    torch.set_num_threads(threads)
    logging.getLogger().setLevel(logging.WARNING)  # Ray's session logs every report through the root logger
    tracker = Tracker(job.tracking_uri, job.mlflow_run_id, job.store, system=True) if workers.rank == 0 else None
    stepped = False

    def log(metrics: dict[str, float], step: int) -> None:
        nonlocal stepped
        if not stepped:
            stepped = True
            _shorten_timeout(workers)
        if tracker:
            tracker.log(metrics, step)

    def save(metrics: dict[str, Any], session: Session) -> None:
        """Persist a checkpoint, manifest last, and report. Ray itself would upload the files in an order of its own, and a
        worker killed on the way would leave a checkpoint that only looks like one."""
        if workers.rank == 0:
            checkpoint.store_newest(job.store.at("train"), session.step, session.state(), checkpoint.KEEP)
        if watch:
            watch.stored(session.step)
        if metrics:  # none: somebody asked for a checkpoint between validations
            ray.train.report({"step": session.step, **{f"val/{k}": v for k, v in metrics.items()}})

    watch = ending.Watch(job.store, interrupt.ask) if workers.rank == 0 else None
    try:
        return train(job, workers, get_device(), log, save, interrupt)
    finally:
        if watch:
            watch.close()
        if tracker:
            tracker.close()
