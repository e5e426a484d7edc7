"""How long a training step takes where it would run: in a Ray task on such a node, or here where Ray will be local."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from dfssd.config import Config
from dfssd.errors import DfssdError
from dfssd.runtime.placement import Resources

OVERHEAD = 1.25  # loss, optimiser, weight average and data
LIMIT_S = 180.0  # for timing one kind of step on the cluster
LONG_S = 15.0  # of one step, after which it is not made again: warm caches matter little, and somebody waits


@dataclass(frozen=True)
class Networks:
    """What a step runs: names (yaml or .pt) and the content of a .pt, since a node may not see the file."""

    student: str
    student_weights: bytes | None
    teacher: str = ""
    teacher_weights: bytes | None = None


@dataclass
class StepTimer:
    """Times steps where they would run, each kind once.

    Args:
        resources: what a worker will have; None where none can be placed now, and `why` says what is lacking.
        on_cluster: time in a Ray task, not in this process.
    """

    config: Config
    resources: Resources | None
    on_cluster: bool
    why: str = ""
    where: set[str] = field(default_factory=set)
    _known: dict[tuple[str, bool, bool], float | None] = field(default_factory=dict)

    def __call__(self, spec: str, unlabelled: bool, distills: bool) -> float | None:
        """Seconds of a step; None where it cannot be told, and `why` says why."""
        key = spec, unlabelled, distills
        if key not in self._known:
            self._known[key] = self._time(*key) if self.resources else None
        return self._known[key]

    @property
    def title(self) -> str:
        """What a table says of its times."""
        if self.where:
            return f"time from steps measured on {', '.join(sorted(self.where))}"
        return f"no times: {self.why}" if self.why else "no step to time"

    def _time(self, spec: str, unlabelled: bool, distills: bool) -> float | None:
        from dfssd.models.families import resolve_weights

        teacher = self.config.models.teacher if distills else ""
        networks = Networks(spec, resolve_weights(spec)[1], teacher, resolve_weights(teacher)[1] if teacher else None)
        assert self.resources is not None
        print(f"timing a step of {spec}{f' beside {teacher}' if teacher else ''}", flush=True)
        if not self.on_cluster:
            place, seconds = time_step(self.config, networks, self.resources, unlabelled)
        else:
            try:
                place, seconds = self._on_cluster(networks, unlabelled)
            except DfssdError as error:
                self.why = error.what
                return None
        self.where.add(place)
        return seconds

    def _on_cluster(self, networks: Networks, unlabelled: bool) -> tuple[str, float]:
        """As `time_step`, in a task with what a worker will have.

        Raises:
            DfssdError: it did not end in time, or failed.
        """
        import ray

        own = self.resources
        assert own is not None
        task = ray.remote(time_step).options(num_cpus=own.cpus, num_gpus=1 if own.gpu else 0, max_retries=0)
        ref = task.remote(self.config, networks, own, unlabelled)
        try:
            place, seconds = ray.get(ref, timeout=LIMIT_S)
        except ray.exceptions.GetTimeoutError as error:
            ray.cancel(ref, force=True)
            raise DfssdError(f"a step could not be timed on the cluster in {LIMIT_S:.0f} s") from error
        except ray.exceptions.RayError as error:
            said = str(error).strip().splitlines()[-1]
            raise DfssdError(f"a step could not be timed on the cluster: {said}") from error
        return str(place), float(seconds)


def step_timer(config: Config) -> StepTimer:
    """A timer for the workers that the settings ask for; joins the cluster only where one is named.

    Raises:
        DfssdError: the cluster, or this machine, can never hold them, and nothing is there that would add nodes.
    """
    if os.environ.get("RAY_ADDRESS"):
        from dfssd.runtime.cluster import connect, describe, with_workers, worker_resources

        connect()
        now = config.model_copy(update={"run": config.run.model_copy(update={"wait_min": 0.0})})  # it starts no nodes
        try:
            run = with_workers(now).run
            resources = worker_resources(run)
        except DfssdError as error:
            if not config.run.wait_min:
                raise
            print(f"cluster: {error.what}; the job will wait {config.run.wait_min:g} minutes for an autoscaler's nodes")
            return StepTimer(config, None, True, why=f"there is no node to measure on yet ({error.what})")
        print(f"cluster: {describe()}; {resources.describe(run.num_workers)} each")
        return StepTimer(config, resources, True)
    cpus = os.cpu_count() or 1
    asked = config.run.cpus_per_worker * config.run.workers[0]
    if asked > cpus:
        raise DfssdError(
            f"{asked} CPUs are asked for, this machine has {cpus}", todo="lower --num-workers or --cpus-per-worker"
        )
    print(f"cluster: a local Ray with {cpus} CPUs")
    gpu = config.run.gpu != "never" and torch.cuda.device_count() >= config.run.workers[0]
    share = float(config.run.cpus_per_worker) or cpus / config.run.workers[0]
    return StepTimer(config, Resources.of_share(share, gpu), False)


def time_step(config: Config, networks: Networks, resources: Resources, unlabelled: bool) -> tuple[str, float]:
    """Where this runs, and seconds of one worker's training step there, on random images: the faster of two after a first."""
    from dfssd.evaluate.latency import using_threads
    from dfssd.models.families import build_model, family_of
    from dfssd.models.head import MAIN
    from dfssd.models.precision import autocast_dtype

    images = config.train.batch + (config.unlabelled_batch() if unlabelled else 0)
    images = max(1, images // config.run.workers[0])
    names = [f"class{k}" for k in range(7)]
    device = torch.device("cuda" if resources.gpu and torch.cuda.is_available() else "cpu")

    def forward(model: torch.nn.Module, batch: torch.Tensor, amp: str) -> torch.Tensor:
        dtype = autocast_dtype(amp, device)
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            raw = family_of(model).raw(model, batch)[MAIN]
        return torch.as_tensor(raw.boxes.mean() + raw.scores.mean())

    def built(spec: str, weights: bytes | None) -> torch.nn.Module:
        model: Any = build_model(spec, names, config.train.imgsz, weights)[0].train()
        moved: torch.nn.Module = model.to(device, memory_format=torch.channels_last)
        return moved

    with using_threads(resources.threads):
        student = built(networks.student, networks.student_weights)
        teacher = built(networks.teacher, networks.teacher_weights) if networks.teacher else None
        batch = torch.rand(images, 3, config.train.imgsz, config.train.imgsz).to(
            device, memory_format=torch.channels_last
        )
        times = []
        for _ in range(3):
            begun = time.perf_counter()
            if teacher is not None:
                with torch.no_grad():
                    forward(teacher, batch, config.distill.teacher_amp)
            forward(student, batch, config.train.amp).backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
            if sum(times) > LONG_S:
                break
    on = torch.cuda.get_device_name() if device.type == "cuda" else f"{resources.threads} thread(s)"
    return f"{socket.gethostname()} ({on})", min(times[1:] or times) * OVERHEAD
