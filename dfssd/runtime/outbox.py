"""Calls to MLflow, made in order by a background thread, so that no stage ever waits for a server that is dead or slow."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dfssd.errors import mask

T = TypeVar("T")
RETRY_S = 60.0  # between two tries while the server does not answer
ANSWER_S = 3.0  # that a stage waits for an id, once; a server that needs longer is not waited for again
SQLITE_S = 60.0  # of a file of our own, whose tables must be made first
FLUSH_S = 15.0  # that the end of a process waits for what is under way
HOPELESS = (  # what a second try would meet again
    *("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST"),
    *("PERMISSION_DENIED", "UNAUTHENTICATED", "FEATURE_DISABLED", "NOT_IMPLEMENTED"),
)


def connect(uri: str) -> Any:
    """A client whose calls fail within seconds: MLflow's own default is 7 retries of up to 120 s."""
    import logging

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    for name in ("alembic", "mlflow.tracking.fluent", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # whole stack traces of a locked or full file
    from mlflow import MlflowClient

    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        _make_tables(Path(uri.removeprefix("sqlite:///")))
    return MlflowClient(uri)


def _make_tables(place: Path) -> None:
    """Make MLflow's tables beside the place, and move them there whole.

    A process that is killed while they are made, which takes seconds, would leave a file that no MLflow ever opens again.
    """
    from mlflow import MlflowClient

    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_name(f"{place.name}.{uuid.uuid4().hex}.part")
    try:
        MlflowClient(f"sqlite:///{draft}").search_experiments(max_results=1)
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(draft, place)
    except OSError:
        if not place.exists():
            draft.replace(place)  # a filesystem without links
    finally:
        draft.unlink(missing_ok=True)


def hopeless(error: Exception) -> bool:
    """Would a second try meet the same?"""
    return getattr(error, "error_code", "") in HOPELESS or isinstance(error, TypeError | AttributeError | KeyError)


def first_line(error: BaseException) -> str:
    """What a warning says of an error, without passwords."""
    return mask((str(error).strip() or type(error).__name__).splitlines()[0])[:300]


@dataclass
class _Job:
    call: Callable[[Any], Any]
    done: bool = False
    value: Any = None
    tries: list[int] = field(default_factory=list)


class Outbox:
    """Calls in order; while the server is down they wait here, and one is tried each RETRY_S.

    Args:
        uri: of the tracking server or sqlite file.
        open_client: makes the client; for tests.
    """

    def __init__(self, uri: str, open_client: Callable[[str], Any] | None = None) -> None:
        self.uri, self.down, self.late = uri, False, False
        self._open, self._client = open_client or (lambda u: connect(u)), None
        self._jobs: deque[_Job] = deque()
        self._change = threading.Condition()
        self._closing = self._said = False
        self._thread: threading.Thread | None = None
        self._owner = 0

    def post(self, call: Callable[[Any], Any]) -> _Job:
        """Have `call(client)` made, some time."""
        job = _Job(call)
        with self._change:
            if self._thread is None or self._owner != os.getpid():  # a fork has no threads
                self._thread, self._owner = threading.Thread(target=self._work, daemon=True, name="mlflow"), os.getpid()
                self._thread.start()
                atexit.register(self.close)
            self._jobs.append(job)
            self._change.notify_all()
        return job

    def ask(self, call: Callable[[Any], T], default: T, patience_s: float | None = None) -> T:
        """`call(client)`, where it is answered soon; else `default`, and the call is made later all the same."""
        job = self.post(call)
        if patience_s is None:
            patience_s = SQLITE_S if self.uri.startswith("sqlite") else ANSWER_S
        with self._change:
            answered = self._change.wait_for(lambda: job.done or self.down, 0 if self.late else patience_s)
            self.late = not answered
            return job.value if job.done and job.value is not None else default

    def close(self, patience_s: float | None = None) -> bool:
        """Wait until all is delivered, not for a server that does not answer; say what is left. Later calls open it again."""
        if patience_s is None:
            patience_s = SQLITE_S if self.uri.startswith("sqlite") else FLUSH_S
        with self._change:
            self._change.wait_for(lambda: not self._jobs or self.down, 0 if self.late else patience_s)
            left = len(self._jobs)
            self._jobs.clear()
            self.down, self.late = False, False
        if left:
            print(
                "WARNING: MLflow has not got everything; the same command delivers it later, "
                "and so does `dfssd track replay RUN`",
                flush=True,
            )
        return not left

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: bool(self._jobs))
                job = self._jobs[0]
            try:
                self._client = self._client or self._open(self.uri)
                value = job.call(self._client)
            except Exception as error:  # tracking never stops a stage
                if not hopeless(error):
                    self._wait_after(error)
                    continue
                print(f"WARNING: MLflow refuses: {first_line(error)}", flush=True)
                value = None
            with self._change:
                job.done, job.value, self.down, self._said = True, value, False, False
                if self._jobs and self._jobs[0] is job:
                    self._jobs.popleft()
                if not self._jobs:
                    self.late = False
                self._change.notify_all()

    def _wait_after(self, error: Exception) -> None:
        if not self._said:
            print(
                f"WARNING: MLflow is not reachable, going on without: {first_line(error)}; what it misses is delivered later",
                flush=True,
            )
        with self._change:
            self._said = self.down = True
            self._client = None
            self._change.notify_all()
        time.sleep(RETRY_S)
