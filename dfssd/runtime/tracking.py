"""MLflow: one run a stage, nested under the pipeline's run. Tracking never stops or slows training.

Without a server the runs go to `<storage-path>/mlflow.db` (sqlite, for one host); MLFLOW_TRACKING_URI names a server.
The driver's calls wait in an outbox, workers log through a thread with a queue; what a server that is down has missed is
delivered from `history.json` and `stage.json` later (`pipeline/replay.py`).
"""

from __future__ import annotations

import getpass
import os
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from dfssd.errors import mask
from dfssd.runtime import outbox
from dfssd.runtime.outbox import Outbox
from dfssd.runtime.storage import Storage
from dfssd.runtime.tracker import Tracker, log_rows, metric_rows

__all__ = ["Runs", "Tracker", "attach", "client", "tracking_uri"]

T = TypeVar("T")
MISSING = "it is only the id of the pipeline's run in MLflow: delete the file, and a new run is opened"


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
    """A client whose calls fail within seconds."""
    return outbox.connect(uri)


def _user() -> str:
    """Who started this; in a container without a name, its number."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


class Runs:
    """Creates and ends the runs of a pipeline from the driver. Nothing waits for it but for an id, and for that seconds."""

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
        self.storage, self._parent = storage, ""
        self._outbox: Outbox | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_outbox": None}  # Ray Tune pickles its callbacks; a thread stays where it is

    @property
    def outbox(self) -> Outbox:
        self._outbox = self._outbox or Outbox(self.uri)
        return self._outbox

    def attempt(self, call: Callable[[Any], T], default: T, patience_s: float | None = None) -> T:
        """`call(client)` after all calls before it, or `default` where MLflow does not answer soon: then it is made later."""
        return self.outbox.ask(call, default, patience_s) if self.uri else default

    def post(self, call: Callable[[Any], Any]) -> None:
        """Have `call(client)` made after all calls before it."""
        if self.uri:
            self.outbox.post(call)

    def close(self, patience_s: float | None = None) -> bool:
        """Wait for what is under way; was all delivered?"""
        return self._outbox is None or self._outbox.close(patience_s)

    def parent(self) -> str:
        """Id of the pipeline's run, remembered in `<run>/run.json`, so that a resumed pipeline goes on in it.

        Raises:
            DfssdError: run.json is damaged.
        """
        if self._parent or not self.uri:
            return self._parent
        run, known = self.storage.at(self.run_name), ""
        if run.exists("run.json"):
            known = str(run.read_record("run.json", ("mlflow_run_id",), MISSING)["mlflow_run_id"] or "")
        once = uuid.uuid4().hex

        def open_parent(c: Any) -> str:
            self._parent = self._open(c, known, self.run_name, lambda: {}, self.params, once)
            if self._parent != known:
                number = str(c.get_run(self._parent).info.experiment_id)  # a link needs it
                known_by = {"mlflow_run_id": self._parent, "experiment": self.experiment, "experiment_id": number}
                run.write_json("run.json", known_by)
            return self._parent

        self._parent = self.attempt(open_parent, known)
        return self._parent

    def stage(
        self,
        name: str,
        known: str | None,
        params: dict[str, Any],
        title: str = "",
        keep: Callable[[str], None] = lambda run_id: None,
    ) -> str:
        """Id of a stage's run, nested under the pipeline's; `known` is the one of an interrupted attempt.

        Args:
            keep: told the id, also where it comes too late to be returned ('' is returned then).
        """
        self.parent()
        once = uuid.uuid4().hex

        def open_stage(c: Any) -> str:
            run_id = self.open_stage(c, name, known, params, title, once)
            keep(run_id)
            return run_id

        return self.attempt(open_stage, known or "")

    def open_stage(
        self, c: Any, name: str, known: str | None, params: dict[str, Any], title: str = "", once: str = ""
    ) -> str:
        """The run of a stage: the known one, or a new one with its parameters."""
        title = title or f"{self.run_name}/{name}"
        nested = lambda: {"mlflow.parentRunId": self._parent, "stage": name} if self._parent else {"stage": name}  # noqa: E731
        return self._open(c, known or "", title, nested, params, once or uuid.uuid4().hex)

    def _open(
        self, c: Any, known: str, name: str, tags: Callable[[], dict[str, str]], params: dict[str, Any], once: str
    ) -> str:
        """The known run if MLflow still has it, else a new one; tried again it takes the one that a lost answer has made."""
        if known:
            try:
                c.get_run(known)
                c.update_run(known, status="RUNNING")
                return known
            except Exception as error:
                if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                    raise
        experiment = self._experiment(c)
        found = c.search_runs([experiment], filter_string=f"tags.dfssd_once = '{once}'", max_results=1)
        run_id = (
            str(found[0].info.run_id) if found else self._create(c, experiment, name, {**tags(), "dfssd_once": once})
        )
        _log_params(c, run_id, params)
        return run_id

    def _experiment(self, client: Any) -> str:
        found = client.get_experiment_by_name(self.experiment)
        if found is not None:
            return str(found.experiment_id)
        # Without a location, MLflow would take ./mlruns of whichever process came first.
        place = f"{self.storage.uri}/mlartifacts" if self.uri.startswith("sqlite") else None
        # What MLflow's list shows as its type. Its page still opens with an overview of language models: links name the runs.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        return str(client.create_experiment(self.experiment, artifact_location=place, tags=kind))

    def _create(self, client: Any, experiment: str, name: str, tags: dict[str, str]) -> str:
        from dfssd.runtime.code_version import code_version

        code = code_version()
        known = {"mlflow.runName": name, "mlflow.user": _user(), "mlflow.source.type": "LOCAL", "code": code}
        known |= {"mlflow.source.name": sys.argv[0].rsplit("/", 1)[-1] or "python", "run_name": self.run_name}
        if "+g" in code:
            known["mlflow.source.git.commit"] = code.split("+g", 1)[1].rstrip("+")
        tags = {**self.tags, **tags, **known}
        return str(client.create_run(experiment, tags={k: mask(v) for k, v in tags.items()}).info.run_id)

    def end_parent(self, status: str) -> None:
        """End the pipeline's run, if this process has opened it."""
        self.post(lambda c: c.set_terminated(self._parent, status) if self._parent else None)

    def end(self, run_id: str, status: str, ended_ms: int | None = None) -> None:
        """Mark a run FINISHED, FAILED or KILLED, now or since a time (ms)."""
        if run_id:
            self.post(lambda c: c.set_terminated(run_id, status, ended_ms))

    def metrics(self, run_id: str, values: dict[str, float], step: int = 0) -> None:
        rows = metric_rows(values, step, int(time.time() * 1000))
        if run_id and rows:
            self.post(lambda c: log_rows(c, run_id, rows))

    def artefact(self, run_id: str, name: str, data: bytes) -> None:
        """Attach a file."""
        if run_id:
            self.post(lambda c: attach(c, run_id, name, data))

    def dataset(self, run_id: str, source: str, digest: str, profile: dict[str, Any]) -> None:
        """Log the split as a data set, by its digest."""
        import json

        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset("manifest", digest, "local", json.dumps({"uri": mask(source)}), profile=json.dumps(profile))
        entry = DatasetInput(data, tags=[InputTag("mlflow.data.context", "train, val, test")])
        if run_id:
            self.post(lambda c: c.log_inputs(run_id, [entry]))


def attach(client: Any, run_id: str, name: str, data: bytes) -> None:
    """Attach a file under this name, which may have folders."""
    import shutil
    import tempfile
    from pathlib import Path

    folder = Path(
        tempfile.mkdtemp()
    )  # a TemporaryDirectory is removed when the process begins to end, under this thread
    try:
        path = folder / name.rsplit("/", 1)[-1]
        path.write_bytes(data)
        client.log_artifact(run_id, str(path), name.rsplit("/", 1)[0] if "/" in name else None)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _log_params(client: Any, run_id: str, params: dict[str, Any]) -> None:
    from mlflow.entities import Param

    rows = [Param(k, mask(str(v))[:5000]) for k, v in params.items()]
    for first in range(0, len(rows), 100):  # MLflow takes 100 at a time
        client.log_batch(run_id, params=rows[first : first + 100])
