"""Stage `export`: the best finished student as a file for the line, its parity, and its model in MLflow."""

from __future__ import annotations

import calendar
import os
import time
from collections.abc import Sequence
from typing import Any

from dfssd.config import Config, Export
from dfssd.errors import DfssdError
from dfssd.export.formats import check_formats
from dfssd.export.write import export_model
from dfssd.line.registry import log_model
from dfssd.pipeline.context import Context, Planned, Result
from dfssd.pipeline.stages import exported_model
from dfssd.runtime.artefact import Stage
from dfssd.runtime.artefact_names import DATASET, EXPORT, REPORT
from dfssd.runtime.storage import Storage
from dfssd.runtime.tracking import Runs


def needs(context: Context, stage: Stage, planned: Planned) -> list[str]:
    """What is to be written can be written.

    Raises:
        DfssdError: a format's library is missing, settings exclude each other, or nothing has measured the models.
    """
    settings = _asked(context, stage).export
    check_settings(settings, _there(context, stage))
    if not context.run.exists(f"{REPORT}/stage.json") and REPORT not in planned:
        raise DfssdError(
            "nothing has measured the models, so there is no operating point to export",
            where=context.run.uri,
            todo="run dfssd evaluate first, or dfssd pipeline, which runs all in order",
        )
    if REPORT not in planned:
        size = context.run.read_json(f"{REPORT}/metrics.json")["environment"]["imgsz"]
        if size != context.config.train.imgsz:
            raise DfssdError(
                f"--imgsz {context.config.train.imgsz}, but the operating point was chosen at {size} px: scores are others",
                where=context.run.uri,
                todo=f"give --imgsz {size}, or measure at the other size first: dfssd evaluate with it and --overwrite",
            )
    return [f"export: {', '.join(settings.formats)}{' and int8' if settings.int8 else ''}"]


def check_settings(settings: Export, there: Sequence[str] = ()) -> None:
    """What is to be written goes together, and what it needs is installed.

    Args:
        there: formats that nobody asks for: the export has them, and all of its files are made together.

    Raises:
        DfssdError: it does not, or is not.
    """
    here = not os.environ.get("RAY_ADDRESS")  # else the task may run where a GPU is, and asks there
    check_formats(tuple(f for f in settings.formats if here or f != "tensorrt"), there)
    if settings.nms_inside and (settings.int8 or "tensorrt" in settings.formats):
        raise DfssdError("--nms-inside goes with neither --int8 nor tensorrt", todo="leave one of them out")


def export_stage(context: Context, stage: Stage, run_id: str) -> Result:
    """Write the files in one Ray task, then log the model to MLflow."""
    import ray

    from dfssd.runtime.cluster import connect, task_resources
    from dfssd.runtime.tasks import result

    model, config = str(exported_model(context.config, context.run)), _asked(context, stage)
    connect()
    run = config.run
    resources = task_resources(run, "require" if "tensorrt" in config.export.formats else "never")
    task = ray.remote(export_model).options(num_cpus=resources.cpus, num_gpus=int(resources.gpu), max_retries=1)
    ref = task.remote(config, context.run.uri, model, resources.threads, _there(context, stage))
    done = result(ref, str(stage.name), run, f"{resources.each()} on one node")
    stage.store.write_json("export.json", done)
    context.runs.artefact(run_id, "export.json", stage.store.read("export.json"))
    context.runs.metrics(run_id, tracked(done))
    outputs = _outputs(stage.store, done)
    logged = _logged(config, context.runs, run_id, context.run, model, done)
    summary = {"model": model, "speedup": done["speedup"], "mlflow_model": logged, **_short(done)}
    return summary, outputs


def _asked(context: Context, stage: Stage) -> Config:
    """The settings, with what the stage shall hold in the end: what is asked for and what is there already."""
    held = stage.config["export"]
    export = context.config.export.model_copy(update={"formats": tuple(held["formats"]), "int8": held["int8"]})
    return context.config.model_copy(update={"export": export})


def _outputs(store: Storage, done: dict[str, Any]) -> list[str]:
    """Names of the files that an export has left; removes those of an interrupted attempt that asked for more formats."""
    outputs = [*done["files"], "export.json"]
    for name in set(store.files()) - set(outputs):
        if name.startswith((f"{done['model']}_", f"{done['model']}.")):
            store.delete(name)
    return outputs


def _there(context: Context, stage: Stage) -> tuple[str, ...]:
    """Formats that are made again although nobody asks for them, since the export has them."""
    return tuple(name for name in stage.config["export"]["formats"] if name not in context.config.export.formats)


def register_finished(context: Context, stage: Stage) -> None:
    """Register a model that was exported before, where that is asked for only now."""
    name, record = context.config.export.register_as, stage.store.read_json("stage.json")
    if not name:
        return
    run_id, done = record.get("mlflow_run_id") or "", stage.store.read_json("export.json")
    if not run_id:
        print(f"WARNING: {name} was not registered: this export has no run in MLflow", flush=True)
        return
    summary = record["summary"]
    before = summary.get("mlflow_model", "")
    uri = _logged(context.config, context.runs, run_id, context.run, done["model"], done, before)
    if not before:
        ended = calendar.timegm(time.strptime(record["finished_utc"], "%Y-%m-%dT%H:%M:%SZ")) * 1000
        context.runs.end(run_id, "FINISHED", ended)  # logging a model opens its run again
    if uri != before:
        stage.store.write_json("stage.json", {**record, "summary": {**summary, "mlflow_model": uri}})


def export_and_register(config: Config, runs: Runs, run_id: str, run: Storage, model: str) -> None:
    """Export a finished model in this process, and log it: that of a sweep's best trial."""
    done = export_model(config, run.uri, model, 1)
    run.write_json(f"{EXPORT}/export.json", done)
    _logged(config, runs, run_id, run, model, done)


def _logged(
    config: Config, runs: Runs, run_id: str, run: Storage, model: str, done: dict[str, Any], logged: str = ""
) -> str:
    """Log the exported model in an MLflow run, and register it where that is asked for.

    Args:
        logged: its URI, where it was logged before.
    """
    digest, measured = run.read_json(f"{DATASET}/stage.json")["digest"], run.read_json(f"{REPORT}/metrics.json")
    numbers = measured[
        run.read_json(f"{model}/stage.json").get("published", model)
    ]  # of the weights that were exported
    return log_model(runs, run_id, run.at(str(EXPORT)), model, done, numbers, digest, config.export.register_as, logged)


def tracked(done: dict[str, Any]) -> dict[str, float]:
    """Numbers for MLflow: latency (ms) and loss of mAP50-95 by format."""
    numbers = {f"export/latency/{name} (ms)": t["p50_ms"] for name, t in done["latency"]["timings"].items()}
    return numbers | {f"export/loss/{name}": p["loss"] for name, p in done["parity"].items()}


def _short(done: dict[str, Any]) -> dict[str, Any]:
    return {"loss": {name: p["loss"] for name, p in done["parity"].items()}}
