"""Run stages of the table: one, or several in order. Skipping, resuming, tracking and finishing are the same for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dfssd.config import Config
from dfssd.config.checks import check_weights, refuse_relative_paths_in_a_job, settings_without_effect
from dfssd.config.file import WHOLE, whole
from dfssd.pipeline.budget import with_steps
from dfssd.pipeline.context import Context
from dfssd.pipeline.replay import deliver_later, summary_numbers
from dfssd.pipeline.stages import is_wanted, make_stage, plan, policies_at_work, resolve, row_of, wanted
from dfssd.runtime.artefact import Stage
from dfssd.runtime.artefact_names import DATASET, ArtefactName, is_finished
from dfssd.runtime.records import flatten

SAID = {"interrupted": "goes on", "added to": "adds to what is there"}


def run_stages(config: Config, names: Sequence[ArtefactName]) -> None:
    """Run stages in order, and later rounds where the settings ask for them; or show the plan.

    Raises:
        DfssdError: a user error, with the stage left so that the same command goes on.
    """
    if any(own.distils for own in (row_of(name).training for name in names) if own):
        check_weights(config.distill)
    for note in settings_without_effect(config, policies_at_work(config, names)):
        print(f"WARNING: {note}", flush=True)
    refuse_relative_paths_in_a_job(config)
    context = Context(config)
    if config.run.dry_run:
        from dfssd.pipeline.dry_run import dry_run  # imports torch, to time a step

        dry_run(context, names)
        return
    context.run.check_writable()
    status, ended, planned = "FAILED", False, list(plan(config, names))
    _start_ray_early(context, planned)
    try:
        for name in planned:
            if name.round > 1 and ended:
                continue
            _settle(context, name)
            if DATASET in planned and name != DATASET and not is_wanted(context.config, name):
                print(f"{name}: left out, for no batch holds an unlabelled image", flush=True)
                continue
            _run_settled(context, name)
            ended = row_of(name).ends_rounds(context.run, name.round)
        if list(names) == list(wanted(config)):  # of single stages the other settings are not known
            context.run.write_json(WHOLE, whole(config))
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        context.runs.end_parent(status)


def _start_ray_early(context: Context, planned: Sequence[ArtefactName]) -> None:
    """Where stages that use Ray come after one that does not, Ray starts while that one works."""
    left = [name for name in planned if not is_finished(context.run, name)]
    if not context.fit and left[:1] == [DATASET] and len(left) > 1:
        from dfssd.runtime.cluster import start_early

        start_early()


def run_stage(context: Context, name: ArtefactName) -> dict[str, Any]:
    """Run one stage unless it is finished; return its summary.

    Raises:
        DfssdError: a user error, with the stage left so that the same command goes on.
    """
    _settle(context, name)
    return _run_settled(context, name)


def _settle(context: Context, name: ArtefactName) -> None:
    """What the settings leave to the data: how many steps, and whether a batch holds unlabelled images."""
    if name != DATASET:  # which says how many images of which kind there are
        context.config = with_steps(context.config, context.run, quiet=row_of(name).training is None)


def _run_settled(context: Context, name: ArtefactName) -> dict[str, Any]:
    stage = make_stage(context.config, context.run, name)
    with stage.lease():
        return _run_held(context, stage)


def _run_held(context: Context, stage: Stage) -> dict[str, Any]:
    """The same, where no other driver makes the same artefact."""
    name, row = stage.name, row_of(stage.name)
    overwrite = context.config.run.overwrite
    if row.renew and (not overwrite or context.config.data.update) and stage.differs():
        resolve(row.renew)(context, stage)
    state = stage.begin(overwrite, lambda: resolve(row.needs)(context, stage, ()) if row.needs else None)
    if state == "finished":
        record = stage.store.read_json("stage.json")
        print(f"{name}: finished {record['finished_utc']}, skipped", flush=True)
        deliver_later(context.runs, context.run, str(name))  # what MLflow missed while it was down
        if row.again:
            resolve(row.again)(context, stage)
        return dict(record["summary"])
    print(f"{name}: {SAID.get(state, 'starts')}", flush=True)
    params = context.runs.params if context.tags else flatten(stage.config)
    run_id = context.runs.stage(str(name), stage.recorded_run_id(), params, context.title, keep=stage.record_run_id)
    status = "FAILED"
    try:
        if name != DATASET:
            context.log_dataset(run_id)
        summary, outputs = resolve(row.body)(context, stage, run_id)
        record = stage.finish(outputs, summary)
        if name == DATASET:
            context.log_dataset(run_id)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        context.runs.end(run_id, status)
    context.runs.metrics(run_id, summary_numbers(summary))
    context.runs.artefact(run_id, "stage.json", stage.store.read("stage.json"))
    deliver_later(context.runs, context.run, str(name))
    print(f"{name}: finished in {record['duration_s']:.0f} s", flush=True)
    return dict(summary)
