"""`--dry-run`: check everything that can be checked without doing the work, and say how long the work will take."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import torch

from dfssd.config import Config
from dfssd.data.formats import read_source
from dfssd.data.source import unlabelled_uris
from dfssd.errors import DfssdError
from dfssd.pipeline.stages import Context, make_stage
from dfssd.report.tables import render
from dfssd.runtime.artefact_names import in_round, split_round
from dfssd.runtime.progress import clock

RAY_START_S = 20  # seconds until a worker group runs its first step, seen on two cores


def dry_run(context: Context, stages: Sequence[str]) -> None:
    """Check storage, data, weights and resources; print stages, their state, steps and expected time.

    Raises:
        DfssdError: the first thing that would stop the real run.
    """
    config = context.config
    context.run.check_writable()
    print(f"storage: {context.run.uri} is writable")
    images = _check_data(context, stages)
    _check_weights(config, stages)
    threads = _check_resources(config)
    rows, total = [], 0.0
    step_s: dict[tuple[str, bool], float] = {}
    for name in _with_rounds(stages, config.rounds):
        state = _state(context, name)
        steps, seconds = "", float(images) / 1000
        kind, number = split_round(name)
        if kind in ("teacher", "label_only", "student"):
            count = config.teacher_steps() if kind == "teacher" else config.train.steps
            spec = config.models.teacher if kind == "teacher" else config.models.student
            unlabelled = name == "student" or number > 1
            key = spec, unlabelled
            step_s[key] = step_s.get(key) or time_step(config, spec, threads, unlabelled, distills=name == "student")
            # Validation of a tenth of the images, ten times, costs about a third of a training step an image.
            validation = 10 * images / 10 / config.train.batch * step_s[key] / 3
            steps, seconds = str(count), count * step_s[key] + validation + RAY_START_S
        elif kind == "pseudo":
            views = (4 if config.pseudo.tta == "flips" else 1) * max(1, len(config.pseudo.label_teachers))
            seconds = RAY_START_S + images * views / 50
        elif name == "report":
            seconds = RAY_START_S + images / 50
        seconds = 0.0 if state == "finished" else seconds
        total += seconds
        rows.append([name, state, steps, clock(seconds)])
    rows.append(["all", "", "", clock(total)])
    print(render("plan (time from steps measured on this machine)", ["stage", "state", "steps", "expected time"], rows))


def _state(context: Context, name: str) -> str:
    """State of a stage; 'new' also where the stages before it have yet to run."""
    stage = make_stage(context.config, context.run, name)
    if not all(context.run.exists(f"{i}/stage.json") for i in stage.inputs):
        return "new"
    try:
        return stage.state()
    except DfssdError:
        if context.config.run.overwrite:
            return "overwritten"
        raise


def _check_data(context: Context, stages: Sequence[str]) -> int:
    """Number of images; reads the data's labels where prepare is part of the plan."""
    if "dataset" in stages:
        source = read_source(context.config.data.data, context.config.data.format, context.config.data.names)
        extra = len(unlabelled_uris(context.config.data))
        labels = sum(item.label is not None for item in source.items)
        print(f"data: {len(source.items)} images ({labels} with a label file) as {source.format}, {extra} more without")
        return len(source.items) + extra
    if not context.run.exists("dataset/stage.json"):
        raise DfssdError(
            "the data set is not prepared", where=context.run.path("dataset"), todo="run jobs/prepare.py first"
        )
    return int(context.run.read_json("dataset/stage.json")["summary"]["images"])


def _check_weights(config: Config, stages: Sequence[str]) -> None:
    from dfssd.models.detector import resolve_weights

    specs = {config.models.teacher} if "teacher" in stages else set()
    specs |= {config.models.student} if {"label_only", "student"} & set(stages) else set()
    if "student" in stages and config.distill.distill_teacher:
        specs.add(config.distill.distill_teacher)
    for spec in sorted(specs):
        resolve_weights(spec)
        print(f"model: {spec} is there")


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


def _with_rounds(stages: Sequence[str], rounds: int) -> list[str]:
    """The stages in order, with those of later rounds where they will run."""
    names = []
    for name in stages:
        names.append(name)
        if name == "quality":
            names += [in_round(kind, n) for n in range(2, rounds + 1) for kind in ("teacher", "pseudo", "quality")]
    return names


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
