"""Ray Train: run the loop on a group of workers, with checkpoints, restarts and metrics."""

from __future__ import annotations

import logging
import math
import signal
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from dfssd.errors import DfssdError, find_user_error
from dfssd.runtime.cluster import Resources, check_gpu, free
from dfssd.runtime.storage import Storage
from dfssd.runtime.tracking import Tracker
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train import checkpoint, ending
from dfssd.train.heartbeat import Heart, Store, Watch
from dfssd.train.interrupt import Interrupt
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
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with Watch(store, str(job.stage), asked, free), _stop_at_sigterm(store):
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


@contextmanager
def _stop_at_sigterm(store: Store) -> Iterator[None]:
    """SIGTERM (`ray job stop`, a deleted pod) asks the workers to store a checkpoint and end; a second one does as before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def handler(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        threading.Thread(target=store.put, args=("stop", b"1"), daemon=True).start()  # a handler must not wait

    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
    trainer = _Trainer(
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
    trainer.artefact = job.store
    return trainer


class _Trainer(TorchTrainer):
    """Ray's trainer; Ctrl-C and SIGTERM leave a checkpoint before they end it."""

    artefact: Storage

    def _register_sigint_handler(self, controller: Any) -> None:
        super()._register_sigint_handler(controller)
        ending.take_over_signals(self.artefact)


def train_worker(settings: dict[str, Any]) -> dict[str, Any] | DfssdError:
    """What each worker runs.

    A user error is returned and not raised where nobody waits for this worker: a restart would only meet it again. Where
    others wait for it in a collective it is left for the next group, which this failure starts and which returns it at once.
    """
    context = ray.train.get_context()
    world = WorkerGroup(context.get_world_rank(), context.get_world_size())
    store = Store(settings["key"])
    met = store.error()
    if met is not None:
        return met
    job: TrainJob = settings["job"]
    interrupt = Interrupt(60 * job.config.train.checkpoint_min)
    try:
        with Heart(store, world.rank, world.size, Notices(store, world.rank, interrupt)):
            return _train(job, world, settings["threads"], interrupt)
    except DfssdError as error:
        if world.size == 1:
            return error
        store.leave_error(error)
        raise


class Notices:
    """What a worker is told from outside, looked for at each of its beats: that its node is about to go, and that the driver
    was asked to end. The loop stores a checkpoint after its present step, on all workers alike."""

    def __init__(self, store: Store, rank: int, interrupt: Interrupt) -> None:
        self.store, self.rank, self.interrupt = store, rank, interrupt
        self.node, self.told = ray.get_runtime_context().get_node_id(), False

    def __call__(self) -> None:
        if self.store.get("stop"):
            self.interrupt.ask(stop=True)
        if not self.told and self.node in draining():
            self.told = True
            print(f"rank {self.rank}: its node is about to go, a checkpoint is stored", flush=True)
            self.interrupt.ask()


def draining() -> set[str]:
    """Ids of nodes that the cluster is about to take away: a spot instance's notice, `ray drain-node`, an autoscaler."""
    return set(ray._private.state.state.get_draining_nodes() or {})


def _shorten_timeout(world: WorkerGroup) -> None:
    """Once all have made a step, whoever is waited for longer is lost: the first one may compile, fetch and start slowly."""
    if world.size > 1 and torch.distributed.is_initialized():
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT_S), torch.distributed.group.WORLD)


def _train(job: TrainJob, world: WorkerGroup, threads: int, interrupt: Interrupt) -> dict[str, Any]:
    """The loop, with its metrics and checkpoints handed on."""
    from dfssd.train.loop import train  # imports Ultralytics, which must happen in the worker

    torch.set_num_threads(threads)
    logging.getLogger().setLevel(logging.WARNING)  # Ray's session logs every report through the root logger
    tracker = Tracker(job.tracking_uri, job.mlflow_run_id, job.store, system=True) if world.rank == 0 else None
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
        if watch:
            watch.stored(session.step)
        if metrics:  # none: somebody asked for a checkpoint between validations
            ray.train.report({"step": session.step, **{f"val/{k}": v for k, v in metrics.items()}})

    interrupt = Interrupt(60 * job.config.train.checkpoint_min)
    watch = ending.Watch(job.store, interrupt.ask) if world.rank == 0 else None
    try:
        return train(job, world, get_device(), log, save, interrupt)
    finally:
        if watch:
            watch.close()
        if tracker:
            tracker.close()
