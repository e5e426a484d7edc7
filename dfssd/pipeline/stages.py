"""The stages: what each depends on, what it does, and how it is skipped, resumed, tracked and finished."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfssd.config import Config, as_dict
from dfssd.data.manifest import read_manifest
from dfssd.errors import DfssdError
from dfssd.runtime.artefact import Stage, flatten
from dfssd.runtime.artefact_names import finished_models, improved, in_round, newest_round, split_round
from dfssd.runtime.storage import Storage
from dfssd.runtime.tracking import Runs, Tracker

if TYPE_CHECKING:
    from dfssd.train.job import TrainJob

ORDER = ("dataset", "teacher", "label_only", "pseudo", "quality", "student", "report")


@dataclass
class Context:
    """One pipeline: settings, storage of the run, MLflow runs.

    Args:
        fit: trains a job where it is not a worker group of Ray Train that shall do it, as in a sweep's trial.
        title, tags: name and further tags of the MLflow runs of stages; with tags they get all settings as parameters.
    """

    config: Config
    fit: Callable[[TrainJob], dict[str, Any]] | None = None
    title: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    run: Storage = field(init=False)
    runs: Runs = field(init=False)

    def __post_init__(self) -> None:
        run = self.config.run
        storage = Storage(run.storage_path)
        self.run = storage.at(run.run_name)
        self.runs = Runs(storage, run.experiment, run.run_name, flatten(self.config.model_dump(mode="json")), self.tags)


def make_stage(config: Config, run: Storage, name: str) -> Stage:
    """The stage's config (what its result depends on) and inputs."""
    from dfssd.train.job import stage_config

    seed = {"seed": config.run.seed}
    kind, number = split_round(name)
    if name == "dataset":
        data = as_dict(config.data, "bad_limit", "max_side")
        for key in ("data", "labelled_list"):
            data[key] = str(Path(data[key]).absolute()) if data[key] and "://" not in data[key] else data[key]
        return Stage(run, name, {"data": data, **seed})
    if kind == "pseudo":
        pseudo = as_dict(config.pseudo, "label_batch", "num_actors", "unreadable_limit", "label_teachers")
        settings: dict[str, Any] = {"pseudo": pseudo, "imgsz": config.train.imgsz}
        external = [hashlib.sha256(given_weights(spec)).hexdigest() for spec in config.pseudo.label_teachers]
        if external and number == 1:
            return Stage(run, name, {**settings, "teachers": external}, ("dataset",))
        return Stage(run, name, settings, ("dataset", in_round("teacher", number)))
    if kind == "quality":
        settings = {"thresholds": as_dict(config.thresholds), "steps": config.train.steps}
        return Stage(run, name, settings, ("dataset", in_round("pseudo", number)))
    if name == "report":
        settings = {"evaluate": as_dict(config.evaluate), "imgsz": config.train.imgsz}
        return Stage(run, name, settings, ("dataset", *finished_models(run)))
    settings = stage_config(config, name)
    if name == "student" and config.distill.distill_teacher:
        settings["distill"]["distill_teacher"] = hashlib.sha256(
            given_weights(config.distill.distill_teacher)
        ).hexdigest()
    return Stage(run, name, settings, training_inputs(config, run, name))


def training_inputs(config: Config, run: Storage, name: str) -> tuple[str, ...]:
    """Artefacts that a training stage reads: a student those of the newest finished round."""
    kind, number = split_round(name)
    if kind == "teacher" and number > 1:
        return "dataset", in_round("pseudo", number - 1)
    if name != "student":
        return ("dataset",)
    number = newest_round(run)
    distill = config.distill
    own = distill.uses_teacher and not distill.distill_teacher
    teacher = (in_round("teacher", number),) if own else ()
    pseudo = (in_round("pseudo", number),) if distill.unlabelled_ratio > 0 else ()
    return ("dataset", *teacher, *pseudo)


def run_stage(context: Context, name: str) -> dict[str, Any]:
    """Run one stage unless it is finished; return its summary.

    Raises:
        DfssdError: a user error, with the stage left so that the same command goes on.
    """
    stage = make_stage(context.config, context.run, name)
    with stage.lease():
        return _run_held(context, stage)


def _run_held(context: Context, stage: Stage) -> dict[str, Any]:
    """`run_stage`, where no other driver makes the same stage."""
    name, state = stage.name, stage.begin(context.config.run.overwrite)
    if state == "finished":
        record = stage.store.read_json("stage.json")
        print(f"{name}: finished {record['finished_utc']}, skipped", flush=True)
        return dict(record["summary"])
    print(f"{name}: {'goes on' if state == 'interrupted' else 'starts'}", flush=True)
    params = context.runs.params if context.tags else flatten(stage.config)
    run_id = context.runs.stage(name, stage.recorded_run_id(), params, context.title)
    stage.record_run_id(run_id)
    status = "FAILED"
    try:
        summary, outputs = BODIES[split_round(name)[0]](context, stage, run_id)
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
    from dfssd.models.detector import resolve_weights
    from dfssd.report.plots import training_curves
    from dfssd.runtime.cluster import connect, with_workers, worker_resources
    from dfssd.train.job import TrainJob
    from dfssd.train.worker import fit

    config, named = context.config, {split_round(name)[0]: name for name in stage.inputs}
    job = TrainJob(
        stage.name,
        context.run.uri,
        context.config,
        context.runs.uri,
        run_id,
        teacher=named.get("teacher", ""),
        pseudo=named.get("pseudo", ""),
        begun=stage.started,
    )
    _, weights = resolve_weights(job.model_spec)
    if weights is not None and not stage.store.exists("init.pt"):
        stage.store.write("init.pt", weights)
    if job.distills and config.distill.distill_teacher and config.distill.uses_teacher:
        stage.store.write("teacher.pt", given_weights(config.distill.distill_teacher))  # workers may be elsewhere
    log_dataset(context, run_id)
    if context.fit:
        summary = context.fit(job)
    else:
        connect()
        job = replace(job, config=with_workers(config))
        run = job.config.run
        resources = worker_resources(run)
        said = resources.describe(run.num_workers)
        print(f"{stage.name}: {job.model_spec}, {job.steps} steps on {said} each", flush=True)
        summary = fit(job, resources)
    stage.store.write("curves.png", training_curves(stage.store.read_json("history.json"), stage.name))
    context.runs.artefact(run_id, "curves.png", stage.store.read("curves.png"))
    context.runs.artefact(run_id, "weights/best.pt", stage.store.read("best.pt"))
    return summary, ["best.pt", "last.pt", "history.json", "curves.png"]


def later_rounds(context: Context) -> None:
    """Rounds 2, 3, ...: a teacher that also learns from its own pseudo-labels (Noisy Student, Xie et al., CVPR 2020),
    and its labels; until the settings' number is reached or its validation is no better than that of the round before."""
    for number in range(2, context.config.rounds + 1):
        run_stage(context, in_round("teacher", number))
        if not improved(context.run, number):
            return
        run_stage(context, in_round("pseudo", number))
        run_stage(context, in_round("quality", number))


def given_weights(spec: str) -> bytes:
    """Content of a .pt that labels or teaches.

    Raises:
        DfssdError: there is no such file, or it holds no detector.
    """
    from dfssd.models.detector import resolve_weights

    _, weights = resolve_weights(spec)
    if weights is None:
        raise DfssdError(
            f"{spec} has no weights, so it cannot label or teach", todo="give the .pt of a trained detector"
        )
    return weights


def log_dataset(context: Context, run_id: str) -> None:
    """Log the split, by its digest, as the data set of an MLflow run."""
    record = context.run.at("dataset").read_json("stage.json")
    profile = {k: record["summary"][k] for k in ("images", "labelled_images", "groups")}
    context.runs.dataset(run_id, context.run.path("dataset", "manifest.parquet"), record["digest"], profile)


def _pseudo(context: Context, stage: Stage, run_id: str) -> Body:
    from dfssd.pseudo.labeller import label
    from dfssd.runtime.cluster import connect

    teachers = [name for name in stage.inputs if name != "dataset"]
    weights = [f"{name}/best.pt" for name in teachers]
    for k, spec in enumerate(() if teachers else context.config.pseudo.label_teachers):
        weights.append(f"{stage.name}/teachers/{k}.pt")  # a copy: workers may run on other machines
        context.run.write(weights[-1], given_weights(spec))
    connect()
    manifest = read_manifest(context.run.at("dataset"))
    if not manifest.unlabelled_rows():
        print(f"{stage.name}: there is no unlabelled image", flush=True)
    tracker = Tracker(context.runs.uri, run_id)
    try:
        summary = label(context.config, context.run, stage.name, manifest, weights, tracker.log)
    finally:
        tracker.close()
    return summary, [f for f in stage.store.files() if f != "started.json"]


def _quality(context: Context, stage: Stage, run_id: str) -> Body:
    from dfssd.pseudo.quality import measure
    from dfssd.report import quality as report

    folder = in_round("pseudo", split_round(stage.name)[1])
    quality = measure(context.config, context.run, folder)
    numbers = quality.numbers()
    manifest = read_manifest(context.run.at("dataset"))
    print(report.terminal_table(numbers), flush=True)
    stage.store.write_json("quality.json", numbers)
    stage.store.write("quality.csv", report.csv(numbers))
    stage.store.write("quality.png", report.curves(quality))
    stage.store.write("doubtful.png", report.doubtful_sheet(quality, manifest))
    outputs = ["quality.json", "quality.csv", "quality.png", "doubtful.png"]
    for name in outputs:
        context.runs.artefact(run_id, name, stage.store.read(name))
    return numbers, outputs


def _evaluate(context: Context, stage: Stage, run_id: str) -> Body:
    import ray

    from dfssd.evaluate.measure import measure
    from dfssd.report.html import write_report
    from dfssd.report.tables import tracked
    from dfssd.runtime.cluster import connect, worker_resources

    models = finished_models(context.run)
    if not models:
        raise DfssdError(
            "there is no finished model to measure",
            where=context.run.uri,
            todo="run jobs/teacher.py or jobs/distill.py first, or jobs/pipeline.py, which runs all in order",
        )
    connect()
    resources = worker_resources(context.config.run.model_copy(update={"num_workers": "1"}))
    task = ray.remote(measure).options(num_cpus=resources.cpus, max_retries=2)
    results = ray.get(task.remote(context.config, context.run.uri, models, resources.threads))
    stage.store.write_json("metrics.json", results)
    write_report(context.config, context.run, results)
    for which in (run_id, context.runs.parent()):
        context.runs.metrics(which, tracked(results))
    for name in ("report.html", "metrics.json", "detections.png"):
        context.runs.artefact(run_id, name, stage.store.read(name))
    summary = {m: {"map50": results[m]["test"]["map50"], "map50_95": results[m]["test"]["map50_95"]} for m in models}
    return summary, [f for f in stage.store.files() if f != "started.json"]


BODIES: dict[str, Callable[[Context, Stage, str], Body]] = {
    "dataset": _prepare,
    "teacher": _train,
    "label_only": _train,
    "pseudo": _pseudo,
    "quality": _quality,
    "student": _train,
    "report": _evaluate,
}
