"""MLflow gets what happens, and can never stop it."""

import http.server
import json
import threading
import time

import pytest

from dfssd.runtime.storage import Storage
from dfssd.runtime.tracking import Runs, Tracker, _metric_name, tracking_uri


@pytest.fixture
def broken_server():
    """An HTTP server that answers everything with 500."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self):
            self.send_response(500)
            self.end_headers()

        do_GET = do_POST = _answer

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_stages_are_nested_and_metrics_arrive(tmp_path):
    from mlflow import MlflowClient

    storage = Storage(str(tmp_path))
    runs = Runs(storage, "exp", "my-run")
    run_id = runs.stage("teacher", None, {f"k{k}": k for k in range(130)})
    tracker = Tracker(runs.uri, run_id)
    for step in range(50):
        tracker.log({"loss/sup/box": 1.0 / (step + 1), "time/step (s)": 0.5, "bad": float("nan")}, step)
    tracker.close()
    runs.artefact(run_id, "weights/best.pt", b"weights")
    runs.dataset(run_id, "uri", "0123456789abcdef", {"images": 3})
    runs.end(run_id, "FINISHED")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and len(run.data.params) == 130
    assert run.data.tags["mlflow.parentRunId"] == runs.parent() == storage.read_json("my-run/run.json")["mlflow_run_id"]
    history = client.get_metric_history(run_id, "loss/sup/box")
    assert (
        [h.step for h in history] == list(range(50))
        and "time/step s" in run.data.metrics
        and "bad" not in run.data.metrics
    )
    assert run.inputs.dataset_inputs[0].dataset.digest == "0123456789abcdef"
    assert (tmp_path / "mlartifacts").exists() and client.list_artifacts(run_id)[0].path == "weights"


def test_a_resumed_stage_goes_on_in_its_run(tmp_path):
    storage = Storage(str(tmp_path))
    first = Runs(storage, "exp", "r").stage("student", None, {"a": 1})
    again = Runs(storage, "exp", "r")
    assert again.stage("student", first, {"a": 1}) == first
    assert again.stage("student", "0" * 32, {"a": 1}) not in ("", first)  # its run was deleted: a new one


@pytest.mark.parametrize("kind", ["500", "refused"])
def test_a_broken_server_stops_nothing(tmp_path, monkeypatch, broken_server, kind, capsys):
    uri = broken_server if kind == "500" else "http://127.0.0.1:1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    runs = Runs(Storage(str(tmp_path)), "exp", "r")
    assert runs.uri == uri
    assert runs.stage("teacher", None, {"a": 1}) == ""
    runs.metrics("x", {"a": 1.0})
    assert "not reachable" in capsys.readouterr().out
    tracker = Tracker(uri, "x" * 32)
    begun = time.monotonic()
    for step in range(200):
        tracker.log({"loss": 1.0}, step)
    assert time.monotonic() - begun < 0.5  # logging is a put into a queue
    tracker.close(patience_s=20)
    assert len(tracker.undelivered) == 200  # none lost silently
    assert "did not reach MLflow" in capsys.readouterr().out


def test_numbers_are_delivered_once_the_server_is_back(tmp_path, monkeypatch):
    runs = Runs(Storage(str(tmp_path)), "exp", "r")
    run_id = runs.stage("teacher", None, {})
    tracker = Tracker(runs.uri, run_id)
    deliver, failures = tracker._deliver, []

    def flaky(client):
        if len(failures) < 3:
            failures.append(1)
            raise ConnectionError("down")
        deliver(client)

    monkeypatch.setattr(tracker, "_deliver", flaky)
    for step in range(20):
        tracker.log({"loss": float(step)}, step)
        time.sleep(0.02)
    tracker.close()
    from mlflow import MlflowClient

    assert failures and not tracker.undelivered
    assert len(MlflowClient(runs.uri).get_metric_history(run_id, "loss")) == 20


def test_where_runs_go(tmp_path, monkeypatch, capsys):
    assert tracking_uri(Storage(str(tmp_path))) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri(Storage(str(tmp_path))) == "http://127.0.0.1:5000"
    assert _metric_name("time/data wait (s)") == "time/data wait s" and json.dumps(_metric_name("a%b"))
