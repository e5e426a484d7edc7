"""The stages: what each depends on, what it does, and how it is skipped, resumed, tracked and finished."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dfssd.config import Config, as_dict
from dfssd.data.manifest import read_manifest, read_pseudo
from dfssd.errors import DfssdError
from dfssd.stage import Stage, flatten
from dfssd.storage import Storage
from dfssd.tracking import Runs

ORDER = ("dataset", "teacher", "label_only", "pseudo", "student", "report")
TRAINING = ("teacher", "label_only", "student")


@dataclass
class Context:
    """One pipeline: settings, storage of the run, MLflow runs."""

    config: Config
    run: Storage = field(init=False)
    runs: Runs = field(init=False)

    def __post_init__(self) -> None:
        run = self.config.run
        storage = Storage(run.storage_path)
        self.run = storage.at(run.run_name)
        self.runs = Runs(storage, run.experiment, run.run_name, flatten(self.config.model_dump(mode="json")))


def make_stage(config: Config, run: Storage, name: str) -> Stage:
    """The stage's config (what its result depends on) and inputs."""
    from dfssd.train.session import stage_config

    seed = {"seed": config.run.seed}
    if name == "dataset":
        data = as_dict(config.data, "bad_limit", "max_side")
        for key in ("data", "labelled_list"):
            data[key] = str(Path(data[key]).absolute()) if data[key] and "://" not in data[key] else data[key]
        return Stage(run, name, {"data": data, **seed})
    if name == "pseudo":
        pseudo = as_dict(config.pseudo, "label_batch", "num_actors", "unreadable_limit")
        return Stage(run, name, {"pseudo": pseudo, "imgsz": config.train.imgsz}, ("dataset", "teacher"))
    if name == "report":
        models = [m for m in TRAINING if run.exists(f"{m}/stage.json")]
        settings = {"evaluate": as_dict(config.evaluate), "imgsz": config.train.imgsz}
        return Stage(run, name, settings, ("dataset", *models))
    inputs = ("dataset", "teacher", "pseudo") if name == "student" else ("dataset",)
    return Stage(run, name, stage_config(config, name), inputs)


def run_stage(context: Context, name: str) -> dict[str, Any]:
    """Run one stage unless it is finished; return its summary.

    Raises:
        DfssdError: a user error, with the stage left so that the same command goes on.
    """
    stage = make_stage(context.config, context.run, name)
    state = stage.begin(context.config.run.overwrite)
    if state == "finished":
        record = stage.store.read_json("stage.json")
        print(f"{name}: finished {record['finished_utc']}, skipped", flush=True)
        return dict(record["summary"])
    print(f"{name}: {'goes on' if state == 'interrupted' else 'starts'}", flush=True)
    run_id = context.runs.stage(name, stage.recorded_run_id(), flatten(stage.config))
    stage.record_run_id(run_id)
    status = "FAILED"
    try:
        summary, outputs = BODIES[name](context, stage, run_id)
        record = stage.finish(outputs, summary)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        context.runs.end(run_id, status)
    numbers = {k: v for k, v in flatten(summary).items() if isinstance(v, int | float) and not isinstance(v, bool)}
    context.runs.metrics(run_id, {f"summary/{k}": float(v) for k, v in numbers.items()})
    context.runs.artefact(run_id, "stage.json", stage.store.read("stage.json"))
    print(f"{name}: finished in {record['duration_s']:.0f} s", flush=True)
    return summary


Body = tuple[dict[str, Any], list[str]]


def _prepare(context: Context, stage: Stage, run_id: str) -> Body:
    from dfssd.data.prepare import prepare
    from dfssd.report.tables import split_table

    summary = prepare(context.config.data, context.config.run.seed, stage.store)
    print(split_table(summary), flush=True)
    for name in ("groups.png", "split.csv"):
        context.runs.artefact(run_id, name, stage.store.read(name))
    return summary, [f for f in stage.store.files() if f != "started.json"]


def _train(context: Context, stage: Stage, run_id: str) -> Body:
    from dfssd.cluster import connect, worker_resources
    from dfssd.models.detector import resolve_weights
    from dfssd.report.plots import training_curves
    from dfssd.train.session import TrainJob
    from dfssd.train.worker import fit

    job = TrainJob(stage.name, context.run.uri, context.config, context.runs.uri, run_id)
    _, weights = resolve_weights(job.model_spec)
    if weights is not None and not stage.store.exists("init.pt"):
        stage.store.write("init.pt", weights)
    log_dataset(context, run_id)
    connect()
    resources = worker_resources(context.config.run)
    workers = context.config.run.num_workers
    print(
        f"{stage.name}: {job.model_spec}, {job.steps} steps on {workers} worker(s) with {resources.cpus:g} CPUs"
        f"{' and a GPU' if resources.gpu else ''} each",
        flush=True,
    )
    summary = fit(job, resources)
    stage.store.write("curves.png", training_curves(stage.store.read_json("history.json"), stage.name))
    context.runs.artefact(run_id, "curves.png", stage.store.read("curves.png"))
    context.runs.artefact(run_id, "weights/best.pt", stage.store.read("best.pt"))
    return summary, ["best.pt", "last.pt", "history.json", "curves.png"]


def log_dataset(context: Context, run_id: str) -> None:
    """Log the split, by its digest, as the data set of an MLflow run."""
    record = context.run.at("dataset").read_json("stage.json")
    profile = {k: record["summary"][k] for k in ("images", "labelled_images", "groups")}
    context.runs.dataset(run_id, context.run.path("dataset", "manifest.parquet"), record["digest"], profile)


def _pseudo(context: Context, stage: Stage, run_id: str) -> Body:
    from dfssd.cluster import connect
    from dfssd.pseudo.labeller import label
    from dfssd.report.pictures import pseudo_sheet

    connect()
    manifest = read_manifest(context.run.at("dataset"))
    if not manifest.unlabelled_rows():
        print("pseudo: there is no unlabelled image", flush=True)
    digest = context.run.at("teacher").digest("best.pt")["sha256"][:16]
    summary = label(context.config, context.run, manifest, digest)
    distill = context.config.distill
    tau = np.full(len(manifest.names), distill.tau if distill.threshold_policy == "fixed" else distill.tau_min)
    stage.store.write("pseudo.png", pseudo_sheet(manifest, read_pseudo(stage.store), tau))
    context.runs.artefact(run_id, "pseudo.png", stage.store.read("pseudo.png"))
    for name, count in summary["candidates"].items():
        rate = summary["score_above_0.5"][name] / max(summary["images"], 1)
        print(f"pseudo: {name}: {count} candidates, {rate:.2f} an image with a score of 0.5 or more", flush=True)
    return summary, [f for f in stage.store.files() if f != "started.json"]


def _evaluate(context: Context, stage: Stage, run_id: str) -> Body:
    import ray

    from dfssd.cluster import connect, worker_resources
    from dfssd.evaluate import MODELS, measure
    from dfssd.report.html import write_report

    if not any(context.run.exists(f"{m}/stage.json") for m in MODELS):
        raise DfssdError(
            "there is no finished model to measure",
            where=context.run.uri,
            todo="run jobs/teacher.py or jobs/distill.py first, or jobs/pipeline.py, which runs all in order",
        )
    connect()
    resources = worker_resources(context.config.run.model_copy(update={"num_workers": 1}))
    task = ray.remote(measure).options(num_cpus=resources.cpus, max_retries=2)
    results = ray.get(task.remote(context.config, context.run.uri, resources.threads))
    stage.store.write_json("metrics.json", results)
    write_report(context.config, context.run, results)
    for model in MODELS:
        if model in results:
            values = {f"{model}/{k}": v for k, v in flatten(results[model]).items() if isinstance(v, int | float)}
            context.runs.metrics(run_id, values)
            context.runs.metrics(context.runs.parent(), values)
    for name in ("report.html", "metrics.json", "detections.png"):
        context.runs.artefact(run_id, name, stage.store.read(name))
    summary = {m: {"map50": results[m]["test"]["map50"], "map50_95": results[m]["test"]["map50_95"]} for m in MODELS
               if m in results}  # fmt: skip
    return summary, [f for f in stage.store.files() if f != "started.json"]


BODIES: dict[str, Callable[[Context, Stage, str], Body]] = {
    "dataset": _prepare,
    "teacher": _train,
    "label_only": _train,
    "pseudo": _pseudo,
    "student": _train,
    "report": _evaluate,
}
