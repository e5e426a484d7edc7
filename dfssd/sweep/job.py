"""What jobs/sweep.py does: check, plan, run, and leave table, figure and the best model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfssd.config import Config
from dfssd.config.checks import check_weights, refuse_relative_paths_in_a_job
from dfssd.data.formats.read import read_source
from dfssd.errors import DfssdError
from dfssd.pipeline.timing import StepTimer
from dfssd.report.tables import render
from dfssd.runtime.artefact_names import STUDENT, TEACHER
from dfssd.runtime.progress import clock
from dfssd.runtime.records import differences, flatten
from dfssd.runtime.storage import Storage
from dfssd.runtime.tracking import Runs
from dfssd.sweep import ablation, shared
from dfssd.sweep.data import as_the_data_asks
from dfssd.sweep.figure import draw
from dfssd.sweep.points import METHODS, Trial, in_words, short, trials
from dfssd.sweep.space import Space

SYNTHETIC = {"images": 240, "side": 128}


@dataclass(frozen=True)
class Options:
    """Flags of the job that are not settings of a run."""

    max_concurrent: int = 0
    resume: bool = False
    file: str = ""


def with_absolute_paths(config: Config) -> Config:
    """The config with every local path made absolute: a trial runs in a folder of its own."""

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().absolute()) if path and "://" not in path else path

    def model(spec: str) -> str:
        return absolute(spec) if Path(spec).is_file() else spec  # yolov8n.yaml is a name, not a path

    run, data, models, pseudo, distill = config.run, config.data, config.models, config.pseudo, config.distill
    train = config.train
    changes = {
        "run": run.model_copy(update={"storage_path": absolute(run.storage_path)}),
        "data": data.model_copy(
            update={
                "data": absolute(data.data),
                "labelled_list": absolute(data.labelled_list),
                "unlabelled": tuple(map(absolute, data.unlabelled)),
            }
        ),
        "train": train.model_copy(
            update={"cache_dir": absolute(train.cache_dir), "decoded_dir": absolute(train.decoded_dir)}
        ),
        "models": models.model_copy(update={"teacher": model(models.teacher), "student": model(models.student)}),
        "pseudo": pseudo.model_copy(update={"label_teachers": tuple(map(model, pseudo.label_teachers))}),
        "distill": distill.model_copy(update={"distill_teacher": model(distill.distill_teacher)}),
    }
    return config.model_copy(update=changes)


def with_data(config: Config) -> Config:
    """The config with a synthetic data set below the sweep's folder where none was given."""
    if config.data.data:
        return config
    from dfssd.data.synthetic import make_dataset

    storage = Storage(config.run.storage_path)
    if not storage.is_local:
        raise DfssdError("there is no data set", todo="give --data; the synthetic one needs a local --storage-path")
    place = Path(storage.path(config.run.run_name, "data"))
    if not (place / "data.yaml").exists():
        make_dataset(place, **SYNTHETIC)
    return config.model_copy(update={"data": config.data.model_copy(update={"data": str(place)})})


def _planned(config: Config, space: Space) -> list[Trial]:
    """All trials, each checked.

    Raises:
        DfssdError: settings that contradict each other, or a space without a number of steps.
    """
    planned = trials(space, config, config.run.run_name)
    if config.export.register_as:
        from dfssd.pipeline.exporting import check_settings

        check_settings(config.export)  # the best trial is exported at the end, which may be hours from now
    if not all(t.config.train.steps for t in planned):
        raise DfssdError(
            f"space {space.name} sets train.steps to 0, but trials and schedulers compare equal steps",
            todo="give a number there",
        )
    for trial in planned:
        if trial.stage == STUDENT:
            try:
                check_weights(trial.config.distill)
            except DfssdError as error:
                raise DfssdError(error.what, where=f"row '{trial.row}'", todo=error.todo) from error
    return planned


def describe(config: Config, space: Space, options: Options) -> None:
    """Print trials, what they share, resources and expected time; change nothing but a synthetic data set."""
    from dfssd.runtime.cluster import connect, describe
    from dfssd.sweep.driver import check_shareable, probes, share

    Storage(config.run.storage_path).check_writable()
    config, sweep = as_the_data_asks(with_data(with_absolute_paths(config)), space), config.run.run_name
    source = read_source(config.data.data, config.data.format, config.data.names)
    planned = _planned(config, space)
    check_shareable(space, config, sweep)
    wanted = space.trials if space.search == "optuna" else len(planned)
    connect()
    count, resources = share(config, wanted, options.max_concurrent)
    before = list(shared.needed(probes(space, config, sweep, planned), sweep).values())
    rows = [[t.id, t.row, str(t.seed), str(t.stage), str(t.config.train.steps)] for t in planned]
    for key, axis in space.axes.items() if space.search == "optuna" else ():
        rows.append(["drawn", key, str(space.seeds[0]), str(STUDENT), in_words(axis)])
    print(f"data: {len(source.items)} images as {source.format}; cluster: {describe()}")
    print(render(f"{space.name}: {wanted} trials", ["trial", "row", "seed", "stage", "steps"], rows))
    names = [str(name) for _, name in before]
    print("made once before: " + ", ".join(f"{names.count(n)} x {n}" for n in dict.fromkeys(names)))
    timer = StepTimer(config, resources, bool(os.environ.get("RAY_ADDRESS")))
    seconds = {s: timer(config.models.student, s, s) for s in (False, True)}
    teacher = timer(config.models.teacher, False, False)
    steps = [(t.config.train.steps, seconds[t.stage == STUDENT]) for t in planned]
    steps = steps or [(wanted * config.train.steps, seconds[True])]
    taught = names.count(str(TEACHER)) * config.teacher_steps()
    said = "how long their steps take is not known"
    if teacher is not None and None not in seconds.values():
        total = sum(n * (each or 0.0) for n, each in steps) / count + taught * teacher
        said = f"steps alone take about {clock(total)}"
    print(
        f"{count} at a time, each {resources.describe(config.run.num_workers)}; {said} "
        f"({timer.title}; validation and start-up come on top)"
    )


def run_sweep(config: Config, space: Space, options: Options) -> None:
    """Run all trials that are not finished, and leave the table.

    Raises:
        DfssdError: settings that cannot be, a cluster that cannot hold a trial, or trials that failed (after the others
            have run and the table is written).
    """
    from dfssd.runtime.cluster import connect
    from dfssd.sweep.driver import check_shareable, records, run_trials, steps_run

    refuse_relative_paths_in_a_job(config)
    storage, sweep = Storage(config.run.storage_path), config.run.run_name
    storage.check_writable()
    config = as_the_data_asks(with_data(with_absolute_paths(config)), space)
    planned = _planned(config, space)
    check_shareable(space, config, sweep)
    _claim(config, space, planned, options)
    connect()
    tags = {"sweep": sweep, "space": space.name, "kind": "sweep"}
    runs = Runs(storage, config.run.experiment, sweep, flatten(config.model_dump(mode="json")), tags)
    parent = runs.parent()
    if options.file:
        runs.artefact(parent, Path(options.file).name, Path(options.file).read_bytes())
    status = "FAILED"
    try:
        failed = run_trials(config, space, sweep, planned, options.max_concurrent, runs)
        done = records(storage, sweep)
        if done:
            finish(runs, config, storage.at(sweep), done, space)
            steps, early = steps_run(storage, sweep, done)
            whole = config.train.steps * (len(done) + early)
            print(
                f"steps     {steps} of {whole} ({100 * steps / whole:.0f} %), {early} trials stopped early", flush=True
            )
        if failed or not done:
            raise DfssdError(
                f"{len(failed)} trials failed:\n    " + "\n    ".join(failed) if failed else "no trial has finished",
                where=storage.at(sweep).uri,
                todo="mend what the lines say; the same command runs only what is missing",
            )
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        runs.end_parent(status)


def _claim(config: Config, space: Space, planned: list[Trial], options: Options) -> None:
    """Remember what the sweep is about; refuse to go on with another one under its name.

    Raises:
        DfssdError: it was begun with other settings, or --resume finds nothing.
    """
    store = Storage(config.run.storage_path).at(config.run.run_name)
    own = {
        "space": space.name,
        "config": config.model_dump(
            mode="json", exclude={"run", "export"}
        ),  # no trial exports; what is registered is free
        "axes": {k: in_words(v) for k, v in space.axes.items()},
        "search": f"{space.search} {space.trials} {space.scheduler}",
        "trials": {t.id: f"{t.row}, seed {t.seed}" for t in planned},
    }
    if not store.exists("sweep.json"):
        if options.resume:
            raise DfssdError("there is no sweep to resume", where=store.uri, todo="leave --resume out to start it")
        store.write_json("sweep.json", own)
        return
    changed = differences(store.read_json("sweep.json"), own)
    if changed and not config.run.overwrite:
        raise DfssdError(
            "this sweep was begun with other settings:\n    " + "\n    ".join(changed[:12]),
            where=store.uri,
            todo="take a new --run-name, or add --overwrite to replace it",
        )
    if changed:
        for name in ("trials", "shared", "tune", "run.json"):
            store.delete(name)
        store.write_json("sweep.json", own)


def finish(runs: Runs, config: Config, store: Storage, done: list[dict[str, Any]], space: Space) -> None:
    """Write and log table and figure; log, and where asked export and register, the best trial's model."""
    sweep = config.run.run_name
    write_table(store, done, sweep, runs)
    sign = 1 if space.mode == "max" else -1
    best = max(done, key=lambda record: sign * record["result"][space.metric])
    stage = METHODS[best["settings"].get("method", "distill")]
    name, parent = f"trials/{best['trial']}/{stage}/best.pt", runs.parent()
    runs.metrics(parent, {f"best/{k}": v for k, v in best["result"].items()})
    runs.artefact(parent, "best/best.pt", store.read(name))
    said = {k: short(v) for k, v in best["settings"].items()}
    print(f"\nbest      {best['row']}, seed {best['seed']}: {space.metric} {best['result'][space.metric]:.4f}  {said}")
    print(f"model     {store.path(name)}\ntable     {store.path('table.md')} (.csv, .tex, .png)")
    if runs.uri.startswith("sqlite"):
        print(f"next      mlflow ui --backend-store-uri {runs.uri}")
    if config.export.register_as:
        _register(runs, config, store, best, str(stage))


def _register(runs: Runs, config: Config, store: Storage, best: dict[str, Any], model: str) -> None:
    """Export the best trial's model, and log and register it in the sweep's run."""
    from dfssd.pipeline.exporting import export_and_register

    trial = store.at("trials", str(best["trial"]))
    imgsz = trial.read_json(f"{model}/stage.json")["config"]["train"]["imgsz"]
    trained = config.model_copy(update={"train": config.train.model_copy(update={"imgsz": imgsz})})
    export_and_register(trained, runs, runs.parent(), trial, model)


def write_table(store: Storage, done: list[dict[str, Any]], sweep: str, runs: Runs | None = None) -> None:
    """Print the table; write it as Markdown, CSV, LaTeX and figure."""
    rows = ablation.rows_of(ablation.ranked(done))
    files = {
        "table.md": ablation.markdown(rows).encode(),
        "table.csv": ablation.csv(rows).encode(),
        "table.tex": ablation.latex(rows).encode(),
        "table.png": draw(rows, done, sweep, done[0]["search"] != "grid"),
    }
    for name, data in files.items():
        store.write(name, data)
        if runs:
            runs.artefact(runs.parent(), name, data)
    print(ablation.terminal(rows, sweep), flush=True)


def table_of(config: Config, sweep: str) -> None:
    """Rebuild the table of a sweep from MLflow alone."""
    storage = Storage(config.run.storage_path)
    runs = Runs(storage, config.run.experiment, sweep)
    if not runs.uri:
        raise DfssdError("no MLflow to read from", todo="set MLFLOW_TRACKING_URI")
    from dfssd.runtime.tracking import client

    done = ablation.from_mlflow(client(runs.uri), config.run.experiment, sweep)
    write_table(storage.at(sweep), done, sweep)
