"""Deliver to MLflow what it has missed: from `history.json` and `stage.json` of finished stages, each number once.

It runs in the outbox after each stage and where a finished one is skipped, and by `dfssd track replay RUN`.
"""

from __future__ import annotations

import calendar
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dfssd.errors import DfssdError
from dfssd.report.tables import tracked
from dfssd.runtime.records import flatten
from dfssd.runtime.storage import Storage
from dfssd.runtime.tracker import BATCH, delivered, log_rows, metric_rows
from dfssd.runtime.tracking import Runs, attach

MARKS = "delivered.json"  # in the run's folder: digests of the stages that MLflow has completely
FILES = {  # outputs that MLflow gets, and under which name
    **{
        n: n
        for n in ("groups.png", "split.csv", "curves.png", "quality.json", "quality.csv", "quality.png", "doubtful.png")
    },
    **{n: n for n in ("report.html", "metrics.json", "detections.png")},
    "best.pt": "weights/best.pt",
}
Rows = list[tuple[str, float, int, int]]


@dataclass(frozen=True)
class Delivered:
    """What MLflow lacked of one stage."""

    stage: str
    run_id: str
    numbers: int
    files: int


def deliver_later(runs: Runs, run: Storage, stage: str) -> None:
    """Have a finished stage delivered in the background, unless it was."""
    if not runs.uri:
        return
    digest = run.read_json(f"{stage}/stage.json")["digest"]
    if _marks(run).get(stage) != digest:
        runs.parent()
        runs.post(lambda client: deliver(client, runs, run, stage))


def deliver(client: Any, runs: Runs, run: Storage, stage: str) -> Delivered:
    """Bring the MLflow run of a finished stage up to what the stage has left.

    Args:
        runs: opens a run where none is known, nested under the pipeline's.
        run: storage of the run.

    Raises:
        Exception: what MLflow raises; nothing is marked then, and it can be called again.
    """
    store = run.at(stage)
    record = store.read_record("stage.json", ("config", "digest", "summary"), "")
    started = store.read_json("started.json") if store.exists("started.json") else {}
    known = str(started.get("mlflow_run_id") or record.get("mlflow_run_id") or "")
    run_id = runs.open_stage(client, stage, known, flatten(record["config"]))
    if run_id != known:
        store.write_json("started.json", {**started, "mlflow_run_id": run_id})
    ended = calendar.timegm(time.strptime(record["finished_utc"], "%Y-%m-%dT%H:%M:%SZ")) * 1000
    there = delivered(client, run_id)
    rows = [row for row in _rows(store, record, ended) if (row[0], row[3]) not in there]
    _log(client, run_id, rows)
    measured, parent = _measured(store, record, ended), runs.parent()
    if measured and parent:
        there = delivered(client, parent)
        _log(client, parent, [row for row in measured if (row[0], row[3]) not in there])
    files = 0
    for name, as_name in {
        **{n: FILES[n] for n in record.get("outputs", {}) if n in FILES},
        "stage.json": "stage.json",
    }.items():
        folder = as_name.rpartition("/")[0]
        if as_name not in {a.path for a in client.list_artifacts(run_id, folder or None)}:
            attach(client, run_id, as_name, store.read(name))
            files += 1
    client.set_terminated(run_id, "FINISHED", end_time=ended)
    run.write_json(MARKS, {**_marks(run), stage: record["digest"]})
    return Delivered(stage, run_id, len(rows), files)


def summary_numbers(summary: dict[str, Any]) -> dict[str, float]:
    """The numbers of a stage's summary that MLflow gets: tables (by split and class, by policy and class) stay in its files,
    since each would be a hundred columns; of the policies the chosen one's sums over all classes are there."""
    numbers = {
        f"summary/{key}": float(value)
        for key, value in flatten(summary).items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and key.count(".") <= 1
        and not key.startswith("data_settings.")  # parameters of the run
    }
    chosen = summary.get("policies", {}).get(summary.get("chosen"), {}).get("all", {})
    return numbers | {f"quality/{key}": float(value) for key, value in chosen.items() if value is not None}


def _log(client: Any, run_id: str, rows: Rows) -> None:
    for first in range(0, len(rows), BATCH):
        log_rows(client, run_id, rows[first : first + BATCH])


def _marks(run: Storage) -> dict[str, Any]:
    """Digests by stage; a damaged file costs no more than looking again."""
    try:
        return run.read_record(MARKS, (), "") if run.exists(MARKS) else {}
    except DfssdError:
        return {}


def _rows(store: Storage, record: dict[str, Any], ended_ms: int) -> Iterator[tuple[str, float, int, int]]:
    """All numbers of a stage. When a step was is not known: they are spread evenly over the time of the stage."""
    history = store.read_json("history.json") if "history.json" in record.get("outputs", {}) else []
    last = max((row["step"] for row in history), default=0) or 1
    seen: set[tuple[str, int]] = set()
    for row in history:
        at = ended_ms - int(1000 * float(record.get("duration_s", 0)) * (1 - row["step"] / last))
        for one in metric_rows({k: v for k, v in row.items() if k != "step"}, row["step"], at):
            if (one[0], one[3]) not in seen:
                seen.add((one[0], one[3]))
                yield one
    yield from metric_rows(summary_numbers(record["summary"]), 0, ended_ms)
    yield from _measured(store, record, ended_ms)


def _measured(store: Storage, record: dict[str, Any], ended_ms: int) -> Rows:
    """Numbers of the report, which the pipeline's run has, too."""
    if "metrics.json" not in record.get("outputs", {}):
        return []
    return metric_rows(tracked(store.read_json("metrics.json")), 0, ended_ms)


def replay(storage_path: str, run_name: str, experiment: str = "dfssd") -> list[Delivered]:
    """Deliver all finished stages of a run now, whatever was marked.

    Raises:
        DfssdError: there is no such run, no MLflow is configured, or it does not answer.
    """
    from dfssd.runtime.outbox import connect, first_line

    storage = Storage(storage_path)
    run = storage.at(run_name)
    stages = [name for name in run.folders() if run.exists(f"{name}/stage.json")]
    if not stages:
        raise DfssdError(
            "there is no finished stage to deliver", where=run.uri, todo="check --storage-path and the run's name"
        )
    runs = Runs(storage, experiment, run_name)
    if not runs.uri:
        raise DfssdError("there is no MLflow to deliver to", todo="set MLFLOW_TRACKING_URI to a server")
    try:
        client = connect(runs.uri)
        client.search_experiments(max_results=1)
        runs.parent()
        done = [deliver(client, runs, run, stage) for stage in stages]
    except DfssdError:
        raise
    except Exception as error:
        raise DfssdError(
            f"MLflow does not answer: {first_line(error)}", where=runs.uri, todo="type this again once it does"
        ) from error
    runs.end_parent("FINISHED")
    runs.close()
    return done
