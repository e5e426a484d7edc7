"""MLflow: one run a stage, nested under the pipeline's run. Tracking never stops or slows training.

Without a server the runs go to `<storage-path>/mlflow.db` (sqlite, for one host); MLFLOW_TRACKING_URI names a server.
Workers log through a thread with a queue; what cannot be delivered is kept and tried again, and what is still
undelivered at the end is in the stage's `history.json` all the same.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from dfssd.errors import DfssdError
from dfssd.runtime.storage import Storage

T = TypeVar("T")
BATCH = 500  # metrics in one call; MLflow accepts 1000
_LEVELS = ("alembic", "mlflow.store.db.utils", "mlflow.tracking.fluent", "mlflow")


def tracking_uri(storage: Storage) -> str:
    """Where runs are logged: MLFLOW_TRACKING_URI, else sqlite under a local storage path, else '' (nowhere)."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    if given:
        return given
    if storage.is_local:
        return f"sqlite:///{storage.root}/mlflow.db"
    print("WARNING: no MLflow: storage is remote, set MLFLOW_TRACKING_URI to a server; metrics stay in history.json")
    return ""


def client(uri: str) -> Any:
    # A dead server must not hold anybody up: MLflow's own default is 7 retries of up to 120 s.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    for name in _LEVELS:
        logging.getLogger(name).setLevel(logging.ERROR)
    from mlflow import MlflowClient

    return MlflowClient(uri)


class Tracker:
    """Logs metrics of one run from a background thread.

    Args:
        uri, run_id: of the MLflow run; '' logs nowhere.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self.undelivered: list[tuple[str, float, int, int]] = []
        self._queue: queue.Queue[list[tuple[str, float, int, int]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True) if uri and run_id else None
        if self._thread:
            self._thread.start()

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Queue numbers of one step; NaN and infinities are left out (MLflow stores refuse some of them)."""
        now = int(time.time() * 1000)
        rows = [(_metric_name(k), float(v), now, step) for k, v in metrics.items() if math.isfinite(v)]
        if self._thread:
            self._queue.put(rows)

    def _work(self) -> None:
        store = None
        while True:
            rows = self._queue.get()
            self.undelivered += rows or []
            if rows is not None and not self._queue.empty() and len(self.undelivered) < BATCH:
                continue  # more is waiting: deliver together
            try:
                store = store or client(self.uri)
                self._deliver(store)
            except Exception as error:  # whatever the store does, training goes on; the rows stay and are tried again
                if len(self.undelivered) < 4 * BATCH:
                    print(f"WARNING: MLflow: {str(error).splitlines()[0][:200]}; will try again", flush=True)
            if rows is None:
                return

    def _deliver(self, client: Any) -> None:
        from mlflow.entities import Metric

        while self.undelivered:
            part = self.undelivered[:BATCH]
            client.log_batch(self.run_id, metrics=[Metric(*row) for row in part])
            del self.undelivered[:BATCH]

    def close(self, patience_s: float = 30.0) -> None:
        """Deliver what is left, for at most `patience_s` seconds."""
        if not self._thread:
            return
        self._queue.put(None)
        self._thread.join(patience_s)
        if self.undelivered:
            print(
                f"WARNING: {len(self.undelivered)} numbers did not reach MLflow; they are in history.json", flush=True
            )


def _metric_name(name: str) -> str:
    """MLflow allows letters, digits, '_', '-', '.', ' ', ':' and '/'; units in brackets lose the brackets."""
    return "".join(c if c.isalnum() or c in "_-. :/" else " " for c in name).strip().replace("  ", " ")


class Runs:
    """Creates and ends the runs of a pipeline from the driver. Every call may fail without harm, and says so once."""

    def __init__(
        self,
        storage: Storage,
        experiment: str,
        run_name: str,
        params: dict[str, Any] | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        self.uri, self.experiment, self.run_name = tracking_uri(storage), experiment, run_name
        self.params, self.tags = params or {}, tags or {}
        self.storage, self._parent, self._said = storage, "", False

    def attempt(self, call: Callable[[Any], T], default: T) -> T:
        """`call(client)`, or `default` with a warning where MLflow does not answer."""
        if not self.uri:
            return default
        try:
            return call(client(self.uri))
        except DfssdError:
            raise
        except Exception as error:  # tracking never stops a stage
            if not self._said:
                print(
                    f"WARNING: MLflow is not reachable, going on without: {str(error).splitlines()[0][:300]}",
                    flush=True,
                )
            self._said = True
            return default

    def parent(self) -> str:
        """Id of the pipeline's run, remembered in `<run>/run.json`, so that a resumed pipeline goes on in it."""
        run = self.storage.at(self.run_name)
        if not self._parent and run.exists("run.json"):
            known = str(run.read_json("run.json").get("mlflow_run_id", ""))
            self._parent = self.attempt(lambda c: known if known and c.get_run(known) else "", "")
            self.attempt(lambda c: c.update_run(self._parent, status="RUNNING") if self._parent else None, None)
        if not self._parent:
            self._parent = self.attempt(lambda c: self._create(c, self.run_name, {}), "")
            if self._parent:
                self.attempt(lambda c: _log_params(c, self._parent, self.params), None)
                run.write_json("run.json", {"mlflow_run_id": self._parent, "experiment": self.experiment})
        return self._parent

    def stage(self, name: str, known: str | None, params: dict[str, Any], title: str = "") -> str:
        """Id of a stage's run, nested under the pipeline's; `known` is the one of an interrupted attempt."""
        parent = self.parent()
        found = self.attempt(lambda c: known if known and c.get_run(known) else "", "")
        if found:
            self.attempt(lambda c: c.update_run(found, status="RUNNING"), None)
            return found
        tags = {"mlflow.parentRunId": parent, "stage": name} if parent else {"stage": name}
        run_id = self.attempt(lambda c: self._create(c, title or f"{self.run_name}/{name}", tags), "")
        if run_id:
            self.attempt(lambda c: _log_params(c, run_id, params), None)
        return run_id

    def _create(self, client: Any, name: str, tags: dict[str, str]) -> str:
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            # Without a location, MLflow would take ./mlruns of whichever process came first.
            place = f"{self.storage.uri}/mlartifacts" if self.uri.startswith("sqlite") else None
            experiment_id = client.create_experiment(self.experiment, artifact_location=place)
        else:
            experiment_id = found.experiment_id
        from dfssd.runtime.code_version import code_version

        tags = {**self.tags, **tags, "mlflow.runName": name, "code": code_version(), "run_name": self.run_name}
        return str(client.create_run(experiment_id, tags=tags).info.run_id)

    def end_parent(self, status: str) -> None:
        """End the pipeline's run, if this process has opened it."""
        self.end(self._parent, status)

    def end(self, run_id: str, status: str) -> None:
        """Mark a run FINISHED, FAILED or KILLED."""
        if run_id:
            self.attempt(lambda c: c.set_terminated(run_id, status), None)

    def metrics(self, run_id: str, values: dict[str, float], step: int = 0) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [Metric(_metric_name(k), float(v), now, step) for k, v in values.items() if math.isfinite(v)]
        if run_id:
            self.attempt(lambda c: c.log_batch(run_id, metrics=rows), None)

    def artefact(self, run_id: str, name: str, data: bytes) -> None:
        """Attach a file."""
        import tempfile
        from pathlib import Path

        if not run_id:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name.rsplit("/", 1)[-1]
            path.write_bytes(data)
            place = name.rsplit("/", 1)[0] if "/" in name else None
            self.attempt(lambda c: c.log_artifact(run_id, str(path), place), None)

    def dataset(self, run_id: str, source: str, digest: str, profile: dict[str, Any]) -> None:
        """Log the split as a data set, by its digest."""
        import json

        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset("manifest", digest, "local", json.dumps({"uri": source}), profile=json.dumps(profile))
        entry = DatasetInput(data, tags=[InputTag("mlflow.data.context", "train, val, test")])
        if run_id:
            self.attempt(lambda c: c.log_inputs(run_id, [entry]), None)


def _log_params(client: Any, run_id: str, params: dict[str, Any]) -> None:
    from mlflow.entities import Param

    rows = [Param(k, str(v)[:5000]) for k, v in params.items()]
    for first in range(0, len(rows), 100):  # MLflow takes 100 at a time
        client.log_batch(run_id, params=rows[first : first + 100])
