"""Stage `report`: all finished models measured, and the report."""

from __future__ import annotations

from dfssd.errors import DfssdError
from dfssd.evaluate.measure import measure
from dfssd.pipeline.context import Context, Planned, Result
from dfssd.pipeline.stages import finished_models, row_of
from dfssd.report.html import write_report
from dfssd.report.tables import tracked
from dfssd.runtime.artefact import Stage


def needs(context: Context, stage: Stage, planned: Planned) -> list[str]:
    """There is a model to measure, or one is trained before; and outside a dry run the cluster has room for the task.

    Raises:
        DfssdError: one of them is not so.
    """
    models = finished_models(context.run)
    if not models and not any(row_of(name).training for name in planned):
        raise DfssdError(
            "there is no finished model to measure",
            where=context.run.uri,
            todo="run dfssd teacher or dfssd distill first, or dfssd pipeline, which runs all in order",
        )
    if not context.config.run.dry_run and not context.fit:
        from dfssd.runtime.cluster import connect, task_resources

        connect()
        task_resources(context.config.run, context.config.run.gpu)
    return []


def report_stage(context: Context, stage: Stage, run_id: str) -> Result:
    """Measure in one Ray task; write numbers, pictures and report.html."""
    import ray

    from dfssd.runtime.cluster import connect, task_resources
    from dfssd.runtime.tasks import check_gpu, result

    models = list(map(str, finished_models(context.run)))
    for name in models:
        trained = context.run.read_json(f"{name}/stage.json")["config"].get("train", {}).get("imgsz")
        if trained not in (None, context.config.train.imgsz):
            print(
                f"WARNING: {name} was trained at {trained} px and is measured at {context.config.train.imgsz}: --imgsz"
            )
    connect()
    run = context.config.run
    resources = task_resources(run, run.gpu)
    if resources.gpu:
        check_gpu(run)
    task = ray.remote(measure).options(num_cpus=resources.cpus, num_gpus=int(resources.gpu), max_retries=2)
    ref = task.remote(context.config, context.run.uri, models, resources.threads)
    results = result(ref, str(stage.name), run, f"{resources.each()} on one node")
    stage.store.write_json("metrics.json", results)
    write_report(context.config, context.run, results)
    for which in (run_id, context.runs.parent()):
        context.runs.metrics(which, tracked(results))
    for name in ("report.html", "metrics.json", "detections.png"):
        context.runs.artefact(run_id, name, stage.store.read(name))
    tests = {name: results[name]["test"] for name in models}
    summary = {name: {"map50": test["map50"], "map50_95": test["map50_95"]} for name, test in tests.items()}
    return summary, [f for f in stage.store.files() if f != "started.json"]
