"""One trial: the same stage as jobs/distill.py runs, inside Ray Tune, with reports for its scheduler."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from ray import tune

from dfssd.errors import find_user_error
from dfssd.evaluate.measure import measure
from dfssd.pipeline.context import Context
from dfssd.pipeline.run import run_stage
from dfssd.pipeline.stages import make_stage
from dfssd.report.pictures import write_detection_sheet
from dfssd.runtime.cluster import Resources
from dfssd.runtime.records import flatten
from dfssd.runtime.storage import Storage
from dfssd.sweep.points import Trial
from dfssd.sweep.population import CLOCK, take_over
from dfssd.sweep.shared import adopt, copy_inputs
from dfssd.sweep.space import MEASURES, Space
from dfssd.train.in_process import train_in_process
from dfssd.train.job import TrainJob
from dfssd.train.session import Session
from dfssd.train.worker import fit


@dataclass(frozen=True)
class Plan:
    """What all trials of a sweep share."""

    sweep: str
    space: str
    metric: str
    mode: str
    search: str
    parent: str
    resources: Resources
    x: tuple[str, ...] = ()
    population: bool = False

    @classmethod
    def of(cls, sweep: str, space: Space, parent: str, resources: Resources) -> Plan:
        own = (space.name, space.metric, space.mode, space.search)
        return cls(sweep, *own, parent, resources, space.x, space.scheduler == "pbt")


def folder(trial: Trial) -> Storage:
    return Storage(trial.config.run.storage_path).at(trial.config.run.run_name)


def tags(plan: Plan, trial: Trial, order: int, digest: str) -> dict[str, str]:
    """What a trial can be searched by in MLflow, and what the table is built from."""
    return {
        "sweep": plan.sweep,
        "space": plan.space,
        "kind": "trial",
        "row": trial.row,
        "order": str(order),
        "seed": str(trial.seed),
        "trial": trial.id,
        "data_digest": digest,
        "metric": plan.metric,
        "mode": plan.mode,
        "search": plan.search,
        **({"x": str(x_of(plan.x, trial))} if x_of(plan.x, trial) is not None else {}),
        **({"origin": trial.origin} if trial.origin else {}),
        **{f"set.{key}": str(value) for key, value in trial.settings.items()},
    }


def x_of(keys: tuple[str, ...], trial: Trial) -> Any:
    """Where on a curve the trial lies, or None."""
    return next((trial.settings[key] for key in keys if key in trial.settings), None)


def run_once(trial: Trial, plan: Plan, order: int) -> None:
    """`run`; what a user has to mend is left in `failed.json` and not raised: a second try would only meet it again.

    Raises:
        Exception: anything else. The trial's process may be to blame, and Ray Tune tries again.
    """
    store = folder(trial)
    store.delete("failed.json")
    try:
        run(trial, plan, order)
    except Exception as error:
        said = find_user_error(error)
        if said is None:
            raise
        store.write_json("failed.json", {"error": str(said)})


def run(trial: Trial, plan: Plan, order: int) -> dict[str, Any]:
    """Train, measure on the test split, leave `result.json`; report each validation to Ray Tune on the way.

    A finished trial only reports again, and so does one that a scheduler has stopped; an interrupted one goes on.
    """
    store = folder(trial)
    for name in ("result.json", "stopped.json"):
        if store.exists(name):
            record = dict(store.read_json(name))
            for row in record["reports"]:
                tune.report({**row, CLOCK: 0})
            return record
    take_over(trial, plan.sweep)
    copy_inputs(trial.config, plan.sweep, trial.stage)
    adopt(trial.config, plan.parent)
    digest = store.read_json("dataset/stage.json")["digest"]
    own_tags, reports = tags(plan, trial, order, digest), Reports(trial.config.train.steps, plan.population)
    context = Context(
        trial.config,
        fit=lambda job: _fit(job, plan.resources, reports),
        title=f"{trial.row}, seed {trial.seed}",
        tags=own_tags,
    )
    summary = run_stage(context, trial.stage)
    results = measure(trial.config, store.uri, [str(trial.stage)], plan.resources.threads)
    record = _record(trial, plan, order, summary, results[str(trial.stage)])
    record["reports"] = [*reports.rows(store.read_json(f"{trial.stage}/history.json")), record["result"]]
    run_id = make_stage(trial.config, store, trial.stage).recorded_run_id() or ""
    context.runs.metrics(run_id, {f"result/{k}": float(v) for k, v in record["result"].items()})
    store.write_json("report/metrics.json", results)
    write_detection_sheet(trial.config, store, results, {str(trial.stage): trial.row})
    context.runs.artefact(run_id, "detections.png", store.read("report/detections.png"))
    context.runs.close()  # Ray Tune may end this process at the report that follows
    store.write_json("result.json", {**record, "mlflow_run_id": run_id})
    tune.report({**record["result"], CLOCK: 0})
    return record


class Reports:
    """Hands each validation to Ray Tune once, also those from before a restart; the last one waits for `result.json`.

    A scheduler may stop a trial at any report: the last one is for when there is nothing left to lose. In a population
    trials pause and go on, and only the newest validation counts: others would turn its clock back.
    """

    def __init__(self, steps: int, population: bool = False) -> None:
        self.steps, self.population, self.reported = steps, population, 0

    def rows(self, history: list[dict[str, Any]]) -> list[dict[str, float]]:
        """Validations before the last step, of the loop's history."""
        found = [{k: v for k, v in row.items() if k == "step" or k.startswith("val/")} for row in history]
        return [row for row in found if len(row) > 1 and row["step"] < self.steps]

    def __call__(self, session: Session) -> None:
        rows = self.rows(session.history)
        for row in rows[-1:] if self.population else rows[self.reported :]:
            if self.population:
                self._report_to_population(row)
            else:
                tune.report(row)
        self.reported = len(rows)

    def _report_to_population(self, row: dict[str, float]) -> None:
        """Ray Tune takes over only from trials that have reported a checkpoint; ours lie elsewhere (`take_over`)."""
        with TemporaryDirectory() as folder:
            (Path(folder) / "report.json").write_text(json.dumps(row))
            tune.report({**row, CLOCK: row["step"]}, checkpoint=tune.Checkpoint(folder))


def _fit(job: TrainJob, resources: Resources, reports: Reports) -> dict[str, Any]:
    """One worker trains in the trial's own process; several are a worker group of Ray Train beside it."""
    if job.config.run.workers[0] > 1:
        return fit(job, resources, [_forward(reports.steps)])
    torch.set_num_threads(resources.threads)
    device = torch.device("cuda" if resources.gpu and torch.cuda.is_available() else "cpu")
    return train_in_process(job, device, reports)


def _forward(steps: int) -> Any:
    """Ray Train's reports to Ray Tune, without the last one: see `Reports`."""
    from ray.tune.integration.ray_train import TuneReportCallback

    class Forward(TuneReportCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            if metrics[0]["step"] < steps:
                super().after_report(run_context, metrics, None)

    return Forward()


def _record(trial: Trial, plan: Plan, order: int, summary: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """What the table needs of a trial: numbers in `result`, all else beside it."""
    stage = folder(trial).read_json(f"{trial.stage}/stage.json")
    seconds = float(summary["seconds_per_step"]) * summary["steps"]
    workers = trial.config.run.workers[0]
    cost = workers * (1 if plan.resources.gpu else plan.resources.cpus) * stage["duration_s"] / 3600
    result: dict[str, float] = {
        "step": float(summary["steps"]),
        **{f"val/{k}": v for k, v in summary["best"].items() if k != "step"},
        **{f"test/{k}": measured["test"][k] for k in MEASURES},
        "latency_ms": measured["latency_ms"],
        "parameters": measured["params"],
        "training_s": seconds,
        "duration_s": stage["duration_s"],
        "gpu_hours" if plan.resources.gpu else "cpu_hours": cost,
    }
    return {
        "trial": trial.id,
        "row": trial.row,
        "order": order,
        "seed": trial.seed,
        "settings": flatten(trial.settings),
        "origin": trial.origin,
        "search": plan.search,
        "metric": plan.metric,
        "mode": plan.mode,
        "x": x_of(plan.x, trial),
        "result": {k: float(v) for k, v in result.items()},
    }
