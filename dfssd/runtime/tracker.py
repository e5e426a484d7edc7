"""Numbers of one MLflow run, logged from a thread of the worker that trains."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterable
from typing import Any

from dfssd.runtime.metric_names import metric_name
from dfssd.runtime.outbox import RETRY_S, connect, first_line, hopeless
from dfssd.runtime.storage import Storage
from dfssd.runtime.system_metrics import SystemMetrics

BATCH = 500  # metrics in one call; MLflow accepts 1000
SLOW_S = 2.0  # a call that fails after longer is not repeated at once
CLOSE_S = 5.0  # that the end of a training waits for its last numbers; the driver delivers what then is missing
_refused: set[tuple[str, str]] = set()  # (run, metric) that the server does not take, said once
LOOK_S = 5.0  # between looks for a run id that the driver did not know when training began


class Tracker:
    """Logs metrics of one run from a background thread, each (metric, step) once, also where a worker was started again.

    Args:
        uri, run_id: of the MLflow run; uri '' logs nowhere.
        store: of the artefact; where run_id is '' the thread looks there for one that comes later.
        system: also log how busy this machine is.
    """

    def __init__(self, uri: str, run_id: str, store: Storage | None = None, system: bool = False) -> None:
        self.uri, self.run_id, self.store = uri, run_id, store
        self.undelivered: list[tuple[str, float, int, int]] = []
        self._queue: queue.Queue[list[tuple[str, float, int, int]] | None] = queue.Queue()
        self._known: set[tuple[str, int]] | None = None  # (metric, step) of earlier attempts
        self._wait = self._after = 0.0  # seconds between tries; monotonic time before which there is none
        self._hangs = self._said = False
        self._client: Any = None
        works = bool(uri and (run_id or store))
        self._system = SystemMetrics() if system and works else None
        self._thread = threading.Thread(target=self._work, daemon=True, name="mlflow-metrics") if works else None
        if self._thread:
            self._thread.start()

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Queue numbers of one step; NaN and infinities are left out (MLflow stores refuse some of them)."""
        if self._thread:
            busy = self._system.read() if self._system else {}
            self._queue.put(metric_rows({**metrics, **busy}, step, int(time.time() * 1000)))

    def _work(self) -> None:
        while True:
            rows = self._queue.get()
            self.undelivered += rows or []
            if rows is not None and not self._queue.empty() and len(self.undelivered) < BATCH:
                continue  # more is waiting: deliver together
            if rows is None and not self._hangs:
                self._after = 0.0
            for _ in range(1 if rows is not None else 3):  # at the end a server that fails fast gets some more tries
                if self._try() or self._hangs:
                    break
                if rows is None:
                    time.sleep(0.1)
                    self._after = 0.0
            if rows is None:
                return

    def _try(self) -> bool:
        """Deliver what there is, unless the server has just failed; is nothing left?"""
        if not self.undelivered or time.monotonic() < self._after:
            return not self.undelivered
        begun = time.monotonic()
        try:
            if not self._find_run():
                self._after = time.monotonic() + LOOK_S
                return False
            self._client = self._client or connect(self.uri)
            if self._known is None:
                self._known = delivered(self._client, self.run_id)
            self.undelivered = [row for row in self.undelivered if (row[0], row[3]) not in self._known]
            self._deliver(self._client)
        except Exception as error:  # whatever the store does, training goes on; the rows stay and are tried again
            took = time.monotonic() - begun
            self._hangs = took > SLOW_S or hopeless(error)
            self._wait = RETRY_S if self._hangs else min(max(2 * self._wait, 1.0), RETRY_S)
            if not self._said:
                print(f"WARNING: MLflow: {first_line(error)}; will try again", flush=True)
            self._said = True
            self._after = time.monotonic() + self._wait
            return False
        self._wait, self._after, self._said = 0.0, 0.0, False
        return True

    def _find_run(self) -> bool:
        if not self.run_id and self.store is not None and self.store.exists("started.json"):
            self.run_id = str(self.store.read_json("started.json").get("mlflow_run_id") or "")
        return bool(self.run_id)

    def _deliver(self, client: Any) -> None:
        while self.undelivered:
            part = self.undelivered[:BATCH]
            log_rows(client, self.run_id, part)
            del self.undelivered[: len(part)]

    def close(self, patience_s: float = CLOSE_S) -> None:
        """Deliver what is left, for at most `patience_s` seconds; a server that hangs is not waited for."""
        if not self._thread:
            return
        if self._system:
            self._system.close()
        self._queue.put(None)
        self._thread.join(patience_s)
        with self._queue.mutex:  # a call that hangs keeps the thread from what has come meanwhile
            left = len(self.undelivered) + sum(len(rows) for rows in self._queue.queue if rows)
        if left:
            print(
                f"WARNING: {left} numbers did not reach MLflow yet; they are in history.json",
                flush=True,
            )


def metric_rows(metrics: dict[str, Any], step: int, at_ms: int) -> list[tuple[str, float, int, int]]:
    """(name, value, ms since the epoch, step) of every finite number."""
    numbers = ((k, v) for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool))
    return [(metric_name(k), float(v), at_ms, step) for k, v in numbers if math.isfinite(v)]


def log_rows(client: Any, run_id: str, rows: Iterable[tuple[str, float, int, int]]) -> None:
    """Log one batch; the same rows again change nothing. A name that the server refuses loses itself alone: servers of other
    versions take other names than the one installed here, and refuse the whole batch.
    """
    from mlflow.entities import Metric

    rows = [row for row in rows if (run_id, row[0]) not in _refused]
    if not rows:
        return
    try:
        client.log_batch(run_id, metrics=[Metric(*row) for row in rows])
    except Exception as error:
        if getattr(error, "error_code", "") not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
            raise
        names = sorted({row[0] for row in rows})
        if len(names) == 1:
            if client.get_run(run_id).info.lifecycle_stage != "active":
                raise  # it is the run that is refused: it was deleted
            _refused.add((run_id, names[0]))
            print(f"WARNING: MLflow refuses the metric {names[0]!r}: {first_line(error)}", flush=True)
            return
        half = set(names[: len(names) // 2])
        log_rows(client, run_id, [row for row in rows if row[0] in half])
        log_rows(client, run_id, [row for row in rows if row[0] not in half])


def delivered(client: Any, run_id: str) -> set[tuple[str, int]]:
    """(metric, step) of all that MLflow has of a run."""
    names = client.get_run(run_id).data.metrics
    return {(name, row.step) for name in names for row in client.get_metric_history(run_id, name)}
