"""Stages that train: teacher, label-only student, student."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dfssd.config import Config
from dfssd.config.checks import check_weights
from dfssd.models.families import build_model, resolve_weights
from dfssd.pipeline.context import Context, Planned, Result
from dfssd.pipeline.settings import given_weights
from dfssd.pipeline.stages import row_of, settings_of
from dfssd.report.plots import training_curves
from dfssd.runtime.artefact import Stage
from dfssd.runtime.artefact_names import DATASET, PSEUDO, ArtefactName
from dfssd.runtime.storage import Storage
from dfssd.train.job import TrainJob


def train_job(config: Config, run: Storage, name: ArtefactName, **more: Any) -> TrainJob:
    """A training of the table of stages.

    Args:
        more: fields of `TrainJob`: where to log, and what it learns from beside the labels.
    """
    training = row_of(name).training
    assert training is not None, f"{name} is no training"
    assert config.train.steps, "their number is settled before (pipeline/budget.py)"
    return TrainJob(name, training, run.uri, config, settings_of(config, name), **more)


def needs(context: Context, stage: Stage, planned: Planned) -> list[str]:
    """Weights can be had, settings make sense together, and outside a dry run the cluster holds the workers.

    Raises:
        DfssdError: one of them is not so.
    """
    job, distill = train_job(context.config, context.run, stage.name), context.config.distill
    specs = [job.model_spec]
    if job.distills:
        check_weights(distill)
        specs += [distill.distill_teacher] if distill.distill_teacher else []
    for spec in specs:
        resolve_weights(spec)
    if not context.config.run.dry_run and not context.fit:
        _resources(job)
    return [f"model: {spec} is there" for spec in specs]


def _resources(job: TrainJob) -> tuple[TrainJob, Any]:
    """The job with its number of workers, and what each of them gets, of the cluster that is joined or started."""
    from dfssd.runtime.cluster import connect, with_workers, worker_resources

    connect()
    job = replace(job, config=with_workers(job.config))
    return job, worker_resources(job.config.run)


def _start(context: Context, job: TrainJob, weights: bytes) -> str:
    """What the network will take over from its start weights, in a line."""
    names = context.run.at(str(DATASET)).read_json("stage.json")["summary"]["names"]
    return build_model(job.model_spec, names, context.config.train.imgsz, weights)[1]


def train_stage(context: Context, stage: Stage, run_id: str) -> Result:
    """Train on a worker group of Ray Train, or as the context says; leave weights and curves."""
    from dfssd.train.worker import fit

    config = context.config
    teacher = [name for name in stage.inputs if row_of(name).teaches]
    pseudo = [name for name in stage.inputs if name.role == PSEUDO.role]
    job = train_job(
        config,
        context.run,
        stage.name,
        tracking_uri=context.runs.uri,
        mlflow_run_id=run_id,
        teacher=teacher[0] if teacher else None,
        pseudo=pseudo[0] if pseudo else None,
        begun=stage.started,
    )
    _, weights = resolve_weights(job.model_spec)
    if job.labels_itself:  # goes on from the teacher
        weights = context.run.read(f"{teacher[0]}/best.pt")
    if weights is not None and not stage.store.exists("init.pt"):
        if not job.labels_itself:
            print(f"{stage.name}: {job.model_spec}: {_start(context, job, weights)}", flush=True)
        stage.store.write("init.pt", weights)
    if job.distills and config.distill.distill_teacher and config.distill.uses_teacher:
        stage.store.write("teacher.pt", given_weights(config.distill.distill_teacher))  # workers may be elsewhere
    if context.fit:
        summary = context.fit(job)
    else:
        job, resources = _resources(job)
        said = resources.describe(job.config.run.num_workers)
        print(f"{stage.name}: {job.model_spec}, {job.steps} steps on {said} each", flush=True)
        summary = fit(job, resources)
    stage.store.write("curves.png", training_curves(stage.store.read_json("history.json"), job.stage))
    context.runs.artefact(run_id, "curves.png", stage.store.read("curves.png"))
    context.runs.artefact(run_id, "weights/best.pt", stage.store.read("best.pt"))
    return summary, ["best.pt", "last.pt", "history.json", "curves.png"]
