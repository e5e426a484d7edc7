"""`--dry-run`: check everything that can be checked without doing the work, and say how long the work will take."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

import torch

from dfssd.config import Config
from dfssd.errors import DfssdError
from dfssd.pipeline.context import Context
from dfssd.pipeline.data import count_images
from dfssd.pipeline.stages import make_stage, plan, resolve, row_of
from dfssd.pipeline.training import train_job
from dfssd.report.tables import render
from dfssd.runtime.artefact import Stage
from dfssd.runtime.artefact_names import DATASET, PSEUDO, REPORT, ArtefactName, is_finished
from dfssd.runtime.progress import clock

RAY_START_S = 20  # seconds until a worker group runs its first step, seen on two cores


def dry_run(context: Context, stages: Sequence[ArtefactName]) -> None:
    """Check storage, data, weights and resources; print stages, their state, steps and expected time.

    Raises:
        DfssdError: the first thing that would stop the real run.
    """
    config = context.config
    context.run.check_writable()
    print(f"storage: {context.run.uri} is writable")
    names = list(plan(config, stages))
    states = _states(context, names)
    threads, images = _check_resources(config), _images(context, names)
    rows, total = [], 0.0
    step_s: dict[tuple[str, bool], float] = {}
    for name in names:
        steps, seconds = _expected(context, name, images, threads, step_s)
        seconds = 0.0 if states[name] == "finished" else seconds
        total += seconds
        rows.append([str(name), states[name], steps, clock(seconds)])
    rows.append(["all", "", "", clock(total)])
    print(render("plan (time from steps measured on this machine)", ["stage", "state", "steps", "expected time"], rows))


def _states(context: Context, names: Sequence[ArtefactName]) -> dict[ArtefactName, str]:
    """State of each stage, once what it needs is found; prints what is there.

    Raises:
        DfssdError: what would stop the stage.
    """
    states: dict[ArtefactName, str] = {}
    for name in names:
        stage, row = make_stage(context.config, context.run, name), row_of(name)
        state = _state(context, stage, states)
        if row.needs and state != "finished":
            for line in resolve(row.needs)(context, stage, tuple(states)):
                print(line)
        states[name] = state
    return states


def _state(context: Context, stage: Stage, before: Mapping[ArtefactName, str]) -> str:
    """State of a stage, whose inputs are finished or planned before it.

    Raises:
        DfssdError: an input is neither, or the artefact there was made with other settings.
    """
    remade = [name for name in stage.inputs if before.get(name, "finished") != "finished"]
    if not remade or any(name not in remade and not is_finished(context.run, name) for name in stage.inputs):
        if context.config.run.overwrite and stage.differs():
            return "overwritten"
        return stage.state()
    there = any(stage.store.exists(name) for name in ("started.json", "stage.json"))
    return "overwritten" if there and context.config.run.overwrite else "new"


def _expected(
    context: Context, name: ArtefactName, images: int, threads: int, step_s: dict[tuple[str, bool], float]
) -> tuple[str, float]:
    """(steps, seconds) that a stage will take.

    Args:
        step_s: seconds of a step by (network, with unlabelled images), measured once each.
    """
    config, training = context.config, row_of(name).training
    if training:
        job = train_job(config, context.run, name)
        unlabelled = job.distills or name.round > 1
        key = job.model_spec, unlabelled
        step_s[key] = step_s.get(key) or time_step(config, job.model_spec, threads, unlabelled, distills=job.distills)
        # Validation of a tenth of the images, ten times, costs about a third of a training step an image.
        validation = 10 * images / 10 / config.train.batch * step_s[key] / 3
        return str(job.steps), job.steps * step_s[key] + validation + RAY_START_S
    if name.role == PSEUDO.role:
        views = (4 if config.pseudo.tta == "flips" else 1) * max(1, len(config.pseudo.label_teachers))
        return "", RAY_START_S + images * views / 50
    return "", RAY_START_S + images / 50 if name == REPORT else images / 1000


def _images(context: Context, names: Sequence[ArtefactName]) -> int:
    """Images of the prepared data set, or of the data that will be prepared.

    Raises:
        DfssdError: it is not prepared, nor is that planned.
    """
    if DATASET in names:
        return count_images(context.config).images
    if not is_finished(context.run, DATASET):
        raise DfssdError(
            "the data set is not prepared", where=context.run.path(str(DATASET)), todo="run jobs/prepare.py first"
        )
    return int(context.run.read_json(f"{DATASET}/stage.json")["summary"]["images"])


def _check_resources(config: Config) -> int:
    """Threads a worker will have; joins the cluster only where one is named."""
    if os.environ.get("RAY_ADDRESS"):
        from dfssd.runtime.cluster import connect, describe, with_workers, worker_resources

        connect()
        run = with_workers(config).run
        resources = worker_resources(run)
        print(f"cluster: {describe()}; {resources.describe(run.num_workers)} each")
        return resources.threads
    cpus = os.cpu_count() or 1
    asked = config.run.cpus_per_worker * config.run.workers[0]
    if asked > cpus:
        raise DfssdError(
            f"{asked} CPUs are asked for, this machine has {cpus}", todo="lower --num-workers or --cpus-per-worker"
        )
    print(f"cluster: a local Ray with {cpus} CPUs")
    return config.run.cpus_per_worker or max(1, cpus // config.run.workers[0])


def time_step(config: Config, spec: str, threads: int, unlabelled: bool, distills: bool) -> float:
    """Seconds of one training step on this machine: the faster of two, on random images."""
    from dfssd.models.detector import autocast_dtype, build_detector, resolve_weights
    from dfssd.models.detector import threads as using_threads
    from dfssd.models.head import branches

    images = config.train.batch + (config.unlabelled_batch() if unlabelled else 0)
    images = max(1, images // config.run.workers[0])
    names = [f"class{k}" for k in range(7)]
    device = torch.device("cpu")

    def forward(model: torch.nn.Module, batch: torch.Tensor, amp: str) -> torch.Tensor:
        dtype = autocast_dtype(amp, device)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            raw = branches(model(batch))["one2many"]
        return torch.as_tensor(raw.boxes.mean() + raw.scores.mean())

    with using_threads(threads):
        student = build_detector(spec, names, config.train.imgsz, resolve_weights(spec)[1]).train()
        student = student.to(memory_format=torch.channels_last)
        teacher = None
        if distills:
            weights = resolve_weights(config.models.teacher)[1]
            teacher = build_detector(config.models.teacher, names, config.train.imgsz, weights)
        batch = torch.rand(images, 3, config.train.imgsz, config.train.imgsz).to(memory_format=torch.channels_last)
        times = []
        for _ in range(2):
            begun = time.perf_counter()
            if teacher is not None:
                with torch.no_grad():
                    forward(teacher, batch, config.distill.teacher_amp)
            forward(student, batch, config.train.amp).backward()
            times.append(time.perf_counter() - begun)
    return min(times) * 1.25  # loss, optimiser, weight average and data
