"""MLflow gets what happens, each number once, and can never stop or slow it."""

import http.server
import json
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dfssd.errors import DfssdError
from dfssd.pipeline import replay as replay_module
from dfssd.pipeline.replay import deliver, deliver_later, replay, summary_numbers
from dfssd.runtime import outbox as outbox_module
from dfssd.runtime import system_metrics
from dfssd.runtime import tracker as tracker_module
from dfssd.runtime.artefact import Stage
from dfssd.runtime.artefact_names import ArtefactName
from dfssd.runtime.metric_names import metric_name
from dfssd.runtime.outbox import Outbox, connect
from dfssd.runtime.storage import Storage
from dfssd.runtime.tracker import Tracker
from dfssd.runtime.tracking import Runs, tracking_uri


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """An empty mlflow.db: MLflow needs seconds to make its tables."""
    folder = tmp_path_factory.mktemp("tables")
    connect(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def storage(tmp_path, tables):
    shutil.copy(tables, tmp_path / "mlflow.db")
    return Storage(str(tmp_path))


@pytest.fixture
def mlflow(storage):
    return connect(f"sqlite:///{storage.root}/mlflow.db")


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


@pytest.fixture
def hanging_server():
    """Accepts, and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


class Switch:
    """The client of a real store behind a switch: what happens while it is off fails as a dead server's calls do, and while
    `answers` is not set nobody gets an answer."""

    def __init__(self, monkeypatch):
        self.on, self.calls, self.answers = True, 0, threading.Event()
        self.answers.set()
        real = outbox_module.connect

        def open_client(uri):
            inner, switch = real(uri), self

            class Client:
                def __getattr__(self, name):
                    call = getattr(inner, name)

                    def checked(*args, **kwargs):
                        switch.calls += 1
                        switch.answers.wait(120)
                        if not switch.on:
                            raise ConnectionError("http://user:URIPASS@host does not answer")
                        return call(*args, **kwargs)

                    return checked

            return Client()

        for module in (outbox_module, tracker_module):
            monkeypatch.setattr(module, "connect", open_client)
            monkeypatch.setattr(module, "RETRY_S", 0.2)


def _wait_until_idle(runs):
    """A call that was under way when an outbox was closed goes on by itself: it must have failed before the server is back,
    or it would make a run that nobody knows of. Then the outbox's thread waits for further calls."""
    box, deadline = runs.outbox, time.monotonic() + 120
    while box._jobs or not box._change._waiters:
        assert time.monotonic() < deadline, box._jobs
        time.sleep(0.01)


def _finish(run, name="label_only", steps=6):
    """A finished training stage without MLflow: a history, a summary, files."""
    stage = Stage(run, ArtefactName(name), {"lr": 0.1})
    stage.begin(False)
    history = [{"step": k, "loss/total": 1.0 / k, "lr": 0.1} for k in range(1, steps + 1)] + [
        {"step": 3, "val/map50": 0.5}
    ]
    stage.store.write_json("history.json", history)
    stage.store.write("best.pt", b"weights")
    stage.finish(["history.json", "best.pt"], {"best": {"map50": 0.5}})
    return stage


def test_a_summary_is_a_few_columns_and_its_tables_stay_in_files():
    cell = {"per_image": 1.5, "tau": None}
    quality = {
        "chosen": "gmm",
        "policies": {p: dict.fromkeys(("pit", "all"), cell) for p in ("gmm", "ema")},
        "warnings": [],
    }
    assert summary_numbers(quality) == {"quality/per_image": 1.5}
    data = {
        "images": 9,
        "splits": {"val": {"images": 2, "boxes": {"pit": 7}}},
        "labelled_boxes": {"pit": 3},
        "notes": ["x"],
        "data_settings": {"bad_limit": 0.01},
    }
    assert summary_numbers(data) == {"summary/images": 9.0, "summary/labelled_boxes.pit": 3.0}


def test_how_busy_the_machine_is_goes_with_the_numbers(storage, mlflow, monkeypatch):
    """The data set lies on the stage's run and on the pipeline's, where people look for it."""
    monkeypatch.setattr(system_metrics, "EVERY_S", 0.02)
    runs = Runs(storage, "e", "r", {}, {})
    run_id = runs.stage("student", None, {})
    for one in (run_id, runs.parent()):
        runs.dataset(one, "data/manifest.parquet", "d1", {"images": 9})
        runs.dataset(one, "data/manifest.parquet", "d1", {"images": 9})  # by each stage
    assert runs.close(60)
    # A call that fails after more than SLOW_S, as a busy machine's may, is repeated after a minute.
    tracker, deadline, step = Tracker(runs.uri, run_id, system=True), time.monotonic() + 200, 0
    while "system/cpu_utilization_percentage" not in (found := mlflow.get_run(run_id)).data.metrics:
        assert time.monotonic() < deadline, (found.data.metrics, tracker.undelivered)
        step += 1
        tracker.log({"loss/total": 1.0}, step)
        time.sleep(0.05)
    tracker.close(60)
    assert {"loss/total", "system/system_memory_usage_percentage", "system/disk_usage_percentage"} <= set(
        found.data.metrics
    )
    for one in (found, mlflow.get_run(runs.parent())):
        assert [(d.dataset.name, d.dataset.digest) for d in one.inputs.dataset_inputs] == [("manifest", "d1")]
        assert one.data.tags["mlflow.user"] and one.data.tags["mlflow.source.name"]
    experiment = mlflow.get_experiment_by_name("e")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert storage.at("r").read_json("run.json")["experiment_id"] == experiment.experiment_id


def _steps(mlflow, run_id, name):
    return sorted(row.step for row in mlflow.get_metric_history(run_id, name))


def test_stages_are_nested_and_metrics_arrive(storage, mlflow, tmp_path):
    runs = Runs(storage, "exp", "my-run")
    run_id = runs.stage("teacher", None, {f"k{k}": k for k in range(130)})
    tracker = Tracker(runs.uri, run_id)
    for step in range(50):
        tracker.log({"loss/sup/box": 1.0 / (step + 1), "time/step (s)": 0.5, "bad": float("nan")}, step)
    tracker.close(60)
    runs.artefact(run_id, "weights/best.pt", b"weights")
    runs.dataset(run_id, "uri", "0123456789abcdef", {"images": 3})
    runs.end(run_id, "FINISHED")
    assert runs.close(60)
    run = mlflow.get_run(run_id)
    assert run.info.status == "FINISHED" and len(run.data.params) == 130
    assert run.data.tags["mlflow.parentRunId"] == runs.parent() == storage.read_json("my-run/run.json")["mlflow_run_id"]
    assert _steps(mlflow, run_id, "loss/sup/box") == list(range(50))
    assert "time/step s" in run.data.metrics and "bad" not in run.data.metrics
    assert run.inputs.dataset_inputs[0].dataset.digest == "0123456789abcdef"
    assert (tmp_path / "mlartifacts").exists() and mlflow.list_artifacts(run_id)[0].path == "weights"


ODD = ["scratch/", "+", "划痕", "/a", "..", "a//b", "%"]


def test_odd_class_names_arrive_by_worker_and_driver(storage, mlflow):
    runs = Runs(storage, "exp", "r")
    run_id = runs.stage("teacher", None, {})
    tracker = Tracker(runs.uri, run_id)
    tracker.log({f"by_class/{name}/map50": float(k) for k, name in enumerate(ODD)}, 3)
    tracker.close(60)
    runs.metrics(run_id, {f"summary/{name}": float(k) for k, name in enumerate(ODD)})
    assert runs.close(60)
    found = mlflow.get_run(run_id).data.metrics
    for k, name in enumerate(ODD):
        assert found[metric_name(f"by_class/{name}/map50")] == found[metric_name(f"summary/{name}")] == k


def test_one_refused_name_does_not_lose_the_others(storage, mlflow, monkeypatch, capsys):
    """As of a server that takes other names than the MLflow that is installed here."""
    monkeypatch.setattr(tracker_module, "metric_name", lambda name: name)  # nothing is spelt out: MLflow refuses `a//b`
    monkeypatch.setattr(tracker_module, "_refused", set())
    runs = Runs(storage, "exp", "r")
    run_id = runs.stage("teacher", None, {})
    tracker = Tracker(runs.uri, run_id)
    for step in range(5):
        tracker.log({"map50/a//b": 0.5, "map50/划痕": 0.1, "loss": float(step), "map50/+": 0.2}, step)
    tracker.close(60)
    runs.metrics(run_id, {"summary/x//y": 1.0, "summary/boxes": 2.0})
    assert runs.close(60)
    said = capsys.readouterr().out
    assert not tracker.undelivered and _steps(mlflow, run_id, "loss") == _steps(mlflow, run_id, "map50/划痕")
    assert _steps(mlflow, run_id, "loss") == list(range(5))
    assert mlflow.get_run(run_id).data.metrics["summary/boxes"] == 2.0
    refused = [line for line in said.splitlines() if "refuses the metric" in line]
    assert sorted(line.split("'")[1] for line in refused) == ["map50/+", "map50/a//b", "summary/x//y"]
    assert "not reachable" not in said and "try again" not in said


def test_a_run_that_was_deleted_is_not_taken_for_metrics_that_are_refused(storage, mlflow, capsys):
    runs = Runs(storage, "exp", "r")
    run_id = runs.stage("teacher", None, {})
    assert runs.close(60)
    mlflow.delete_run(run_id)
    with pytest.raises(Exception, match="active"):
        tracker_module.log_rows(mlflow, run_id, [("loss", 1.0, 1, 1), ("lr", 1.0, 1, 1)])
    assert "refuses" not in capsys.readouterr().out
    mlflow.restore_run(run_id)
    tracker_module.log_rows(mlflow, run_id, [("loss", 1.0, 1, 1)])
    assert _steps(mlflow, run_id, "loss") == [1]


def test_a_resumed_stage_goes_on_in_its_run(storage):
    first = Runs(storage, "exp", "r").stage("student", None, {"a": 1})
    again = Runs(storage, "exp", "r")
    assert again.stage("student", first, {"a": 1}) == first
    assert again.stage("student", "0" * 32, {"a": 1}) not in ("", first)  # its run was deleted: a new one


@pytest.mark.parametrize("kind", ["500", "refused", "hangs"])
def test_a_broken_server_stops_nothing_and_costs_seconds_once(
    tmp_path, monkeypatch, broken_server, hanging_server, kind, capsys
):
    uri = {"500": broken_server, "refused": "http://127.0.0.1:1", "hangs": hanging_server}[kind]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(outbox_module, "ANSWER_S", 0.5)
    import mlflow  # noqa: F401  (its import is not what is timed)

    runs, waits = Runs(Storage(str(tmp_path)), "exp", "r"), []
    _note_waits(runs.outbox, waits)
    for stage in ("dataset", "teacher", "label_only", "pseudo", "quality", "student", "report"):
        assert runs.stage(stage, None, {"a": 1}) == ""
        runs.metrics("x", {"a": 1.0})
        runs.artefact("x", "best.pt", b"weights")
        runs.end("x", "FINISHED")
    assert runs.stage("student", "known", {"a": 1}) == "known"  # never replaced by nothing
    runs.end_parent("FINISHED")
    assert not runs.close()
    assert sum(waits) <= 0.5, "seven stages wait for it once"
    said = capsys.readouterr().out
    assert "dfssd track replay" in said
    asked_by, real = set(), tracker_module.connect
    note = lambda to: (asked_by.add(threading.current_thread().name), real(to))[1]  # noqa: E731
    monkeypatch.setattr(tracker_module, "connect", note)
    tracker = Tracker(uri, "x" * 32)
    for step in range(200):
        tracker.log({"loss": 1.0}, step)  # a put into a queue
    begun = time.monotonic()
    tracker.close(patience_s=200)
    assert time.monotonic() - begun < 100, "it is given up after one call that hangs"
    assert len(tracker.undelivered) == 200 and asked_by == {"mlflow-metrics"}  # none lost silently
    said, deadline = said + capsys.readouterr().out, time.monotonic() + 60
    while "not reachable" not in said:  # a busy machine's 500 comes later than what waits for it
        assert time.monotonic() < deadline, said
        time.sleep(0.05)
        said += capsys.readouterr().out
    assert "200 numbers did not reach MLflow" in said


def _note_waits(box, waits):
    """Note for how long each call was ready to wait, where what it waits for was not there yet."""
    wait_for = box._change.wait_for

    def noted(condition, timeout=None):
        if timeout is not None and not condition():
            waits.append(timeout)
        return wait_for(condition, timeout)

    box._change.wait_for = noted


def test_what_waits_for_a_hanging_call_is_counted_among_what_is_missing(monkeypatch, capsys):
    """The thread has not yet seen it when the training ends."""
    called, answer = threading.Event(), threading.Event()

    def hang(uri):
        called.set()
        answer.wait(120)
        raise ConnectionError("no answer")

    monkeypatch.setattr(tracker_module, "connect", hang)
    tracker = Tracker("http://127.0.0.1:1", "x" * 32)
    tracker.log({"loss": 1.0, "lr": 0.1}, 1)
    assert called.wait(60)
    tracker.log({"loss": 1.0, "lr": 0.1}, 2)
    tracker.close(patience_s=0.1)
    answer.set()
    tracker._thread.join(60)
    assert "4 numbers did not reach MLflow" in capsys.readouterr().out


def test_numbers_are_delivered_once_the_server_is_back(storage, mlflow, monkeypatch):
    runs = Runs(storage, "exp", "r")
    run_id = runs.stage("teacher", None, {})
    monkeypatch.setattr(tracker_module, "SLOW_S", 1e9)  # it fails at once, however slow this machine is
    tracker = Tracker(runs.uri, run_id)
    deliver_rows, failures, failed = tracker._deliver, [], threading.Event()

    def flaky(client):
        if len(failures) < 3:
            failures.append(1)
            failed.set()
            raise ConnectionError("down")
        deliver_rows(client)

    monkeypatch.setattr(tracker, "_deliver", flaky)
    for step in range(20):
        tracker.log({"loss": float(step)}, step)
        assert failed.wait(60)
    tracker.close(60)
    assert len(failures) == 3 and not tracker.undelivered
    assert _steps(mlflow, run_id, "loss") == list(range(20))


def test_a_worker_that_was_started_again_logs_no_step_twice(storage, mlflow):
    runs = Runs(storage, "exp", "r")
    run_id = runs.stage("teacher", None, {})
    for steps in (range(1, 9), range(5, 13)):  # killed at 8, resumed from the checkpoint of 4
        tracker = Tracker(runs.uri, run_id)
        for step in steps:
            tracker.log({"loss": float(step), "lr": 0.1}, step)
        tracker.close(60)
    assert _steps(mlflow, run_id, "loss") == _steps(mlflow, run_id, "lr") == list(range(1, 13))


def test_what_was_missed_is_delivered_when_the_stage_is_skipped(storage, mlflow, monkeypatch):
    """Down from the beginning to the end; the same command later delivers all, once, and ends the run."""
    switch, run = Switch(monkeypatch), storage.at("r")
    switch.on = False
    runs = Runs(storage, "exp", "r")
    stage = _finish(run)
    assert runs.stage("label_only", None, {"lr": 0.1}, keep=stage.record_run_id) == ""
    deliver_later(runs, run, "label_only")
    runs.close(1)
    _wait_until_idle(runs)
    switch.on = True
    for _ in range(2):  # and once more: nothing is there twice
        run.delete(replay_module.MARKS)
        again = Runs(storage, "exp", "r")
        deliver_later(again, run, "label_only")
        assert again.close(60)
    run_id = stage.recorded_run_id()
    found = mlflow.get_run(run_id)
    assert (
        found.info.status == "FINISHED"
        and found.data.params == {"lr": "0.1"}
        and found.data.tags["stage"] == "label_only"
    )
    assert _steps(mlflow, run_id, "loss/total") == [1, 2, 3, 4, 5, 6] and _steps(mlflow, run_id, "val/map50") == [3]
    assert _steps(mlflow, run_id, "summary/best.map50") == [0]
    assert {a.path for a in mlflow.list_artifacts(run_id)} == {"stage.json", "weights"}
    experiment = mlflow.get_experiment_by_name("exp").experiment_id
    assert len(mlflow.search_runs([experiment])) == 2, "one run of the stage, one of the pipeline"
    calls = switch.calls
    deliver_later(Runs(storage, "exp", "r"), run, "label_only")
    assert switch.calls == calls, "what is marked as delivered asks nobody"


def test_a_hole_in_the_middle_is_filled(storage, mlflow):
    run, runs = storage.at("r"), Runs(storage, "exp", "r")
    stage = _finish(run)
    run_id = runs.stage("label_only", None, {}, keep=stage.record_run_id)
    tracker = Tracker(runs.uri, run_id)
    for step in (1, 2, 5):
        tracker.log({"loss/total": 1.0 / step}, step)
    tracker.close(60)
    done = deliver(mlflow, runs, run, "label_only")
    assert done.run_id == run_id and done.numbers == 3 + 6 + 1 + 1
    assert _steps(mlflow, run_id, "loss/total") == [1, 2, 3, 4, 5, 6]
    assert deliver(mlflow, runs, run, "label_only").numbers == 0


def test_killed_resumed_while_mlflow_is_down_and_resumed_again_is_one_run(storage, mlflow, monkeypatch):
    switch, run = Switch(monkeypatch), storage.at("r")
    first = Runs(storage, "exp", "r")
    stage = Stage(run, ArtefactName("label_only"), {"lr": 0.1})
    stage.begin(False)
    run_id = first.stage("label_only", None, {"lr": 0.1}, keep=stage.record_run_id)
    assert first.close(60) and stage.recorded_run_id() == run_id
    switch.on = False
    second = Runs(storage, "exp", "r")
    assert second.stage("label_only", stage.recorded_run_id(), {}, keep=stage.record_run_id) == run_id
    stage.record_run_id("")
    assert stage.recorded_run_id() == run_id and not second.close(0.5)
    _wait_until_idle(second)
    switch.on = True
    third = Runs(storage, "exp", "r")
    assert third.stage("label_only", stage.recorded_run_id(), {}, keep=stage.record_run_id) == run_id
    _finish(run)
    deliver_later(third, run, "label_only")
    assert third.close(60) and _steps(mlflow, run_id, "loss/total") == [1, 2, 3, 4, 5, 6]
    assert len(mlflow.search_runs([mlflow.get_experiment_by_name("exp").experiment_id])) == 2


def test_an_id_that_comes_late_reaches_the_worker(storage, mlflow, monkeypatch):
    """A slow server: the stage does not wait for it, and its numbers arrive all the same."""
    monkeypatch.setattr(outbox_module, "SQLITE_S", 0.2)
    monkeypatch.setattr(tracker_module, "LOOK_S", 0.1)
    switch, waits = Switch(monkeypatch), []
    run = storage.at("r")
    stage = Stage(run, ArtefactName("label_only"), {"lr": 0.1})
    stage.begin(False)
    runs = Runs(storage, "exp", "r")
    _note_waits(runs.outbox, waits)
    switch.answers.clear()
    assert runs.stage("label_only", None, {"lr": 0.1}, keep=stage.record_run_id) == ""
    assert sum(waits) <= 0.2
    tracker = Tracker(runs.uri, "", stage.store)
    for step in range(1, 7):
        tracker.log({"loss/total": 1.0}, step)
    switch.answers.set()
    deadline = time.monotonic() + 100
    while not stage.recorded_run_id():
        assert time.monotonic() < deadline, runs.outbox._jobs
        time.sleep(0.1)
    tracker.close(60)
    assert not tracker.undelivered and _steps(mlflow, stage.recorded_run_id(), "loss/total") == [1, 2, 3, 4, 5, 6]


def test_a_create_whose_answer_was_lost_is_not_made_twice(storage, mlflow, monkeypatch):
    made = []

    class Lossy:
        def __getattr__(self, name):
            def call(*args, **kwargs):
                value = getattr(mlflow, name)(*args, **kwargs)
                if name == "create_run" and not made:
                    made.append(value.info.run_id)
                    raise TimeoutError("read timed out")
                return value

            return call

    monkeypatch.setattr(outbox_module, "RETRY_S", 0.1)
    box = Outbox("sqlite:///x", lambda uri: Lossy())
    runs = Runs(storage, "exp", "r")
    box.post(lambda c: made.append(runs._open(c, "", "name", dict, {"a": 1}, "once")))
    deadline = time.monotonic() + 100
    while len(made) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(made) == 2 and made[0] == made[1] and mlflow.get_run(made[0]).data.params == {"a": "1"}


@pytest.mark.slow  # sqlite waits for the lock
@pytest.mark.faults
def test_a_locked_sqlite_file_stops_nothing_and_gets_everything_later(storage, mlflow):
    """Another program holds the file, as a backup or a browser of databases does."""
    run, runs = storage.at("r"), Runs(storage, "exp", "r")
    stage = _finish(run)
    run_id = runs.stage("label_only", None, {}, keep=stage.record_run_id)
    assert runs.close(60)
    other = sqlite3.connect(f"{storage.root}/mlflow.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    begun = time.monotonic()
    tracker = Tracker(runs.uri, run_id)
    for step in range(1, 7):
        tracker.log({"loss/total": 1.0 / step}, step)
    tracker.close(patience_s=1)
    again = Runs(storage, "exp", "r")
    assert again.stage("label_only", stage.recorded_run_id(), {}, keep=stage.record_run_id) == run_id
    assert not again.close(1) and len(tracker.undelivered) == 6
    assert time.monotonic() - begun < 60
    other.execute("COMMIT")
    other.close()
    later = Runs(storage, "exp", "r")
    deliver_later(later, run, "label_only")
    assert later.close(60) and _steps(mlflow, run_id, "loss/total") == [1, 2, 3, 4, 5, 6]
    assert len(mlflow.search_runs([mlflow.get_experiment_by_name("exp").experiment_id])) == 2


def test_replay_by_hand(storage, mlflow, monkeypatch):
    _finish(storage.at("r"))
    done = replay(str(storage.root), "r", "exp")
    assert [d.stage for d in done] == ["label_only"] and done[0].numbers == 14 and done[0].files == 2
    assert replay(str(storage.root), "r", "exp")[0].numbers == 0
    parent = mlflow.get_run(done[0].run_id).data.tags["mlflow.parentRunId"]
    assert mlflow.get_run(parent).info.status == "FINISHED"
    with pytest.raises(DfssdError, match="no finished stage"):
        replay(str(storage.root), "nothing")
    switch = Switch(monkeypatch)
    switch.on = False
    monkeypatch.setattr("dfssd.runtime.outbox.connect", outbox_module.connect)
    with pytest.raises(DfssdError, match="does not answer"):
        replay(str(storage.root), "r", "exp")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": 1}', b'{"mlflow_run_id"'])
def test_a_damaged_run_json_is_a_user_error(tmp_path, content):
    storage = Storage(str(tmp_path))
    storage.write("r/run.json", content)
    with pytest.raises(DfssdError) as caught:
        Runs(storage, "exp", "r").parent()
    assert "r/run.json" in caught.value.where and "delete the file" in caught.value.todo


def test_no_secret_is_printed_or_logged(storage, mlflow, monkeypatch, capsys):
    switch = Switch(monkeypatch)
    runs = Runs(storage, "exp", "r", tags={"data": "s3://KEY:STOREPASS@b/x"})
    params = {"run.storage_path": "s3://KEY:STOREPASS@b/x?secret_key=QUERYPASS&region=eu"}
    run_id = runs.stage("teacher", None, params)
    runs.dataset(run_id, "s3://KEY:STOREPASS@b/x", "0123456789abcdef", {})
    assert runs.close(60)
    run = mlflow.get_run(run_id)
    assert run.data.params["run.storage_path"] == "s3://***@b/x?secret_key=***&region=eu"
    assert "PASS" not in str(run.data.tags) + str(run.inputs.dataset_inputs[0].dataset.source)
    switch.on = False
    other = Runs(storage, "exp", "other")
    assert other.stage("teacher", None, {}) == "" and not other.close(0)
    _wait_until_idle(other)
    said = capsys.readouterr().out
    assert "not reachable" in said and "URIPASS" not in said and "//***@host" in said
    assert "PASS" not in str(DfssdError("x", where="http://user:URIPASS@h/x", todo="see s3://b?access_key=URIPASS"))
    assert "PASS" not in str(Storage("file:///tmp/x?secret_key=PASS"))


def test_where_runs_go(tmp_path, monkeypatch, capsys):
    assert tracking_uri(Storage(str(tmp_path))) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri(Storage(str(tmp_path))) == "http://127.0.0.1:5000"
    assert metric_name("time/data wait (s)") == "time/data wait s" and json.dumps(metric_name("a%b"))


HALF_MADE = """
import os, signal, sys
from pathlib import Path
from sqlalchemy import event
from sqlalchemy.engine import Engine
from dfssd.runtime.outbox import connect

@event.listens_for(Engine, "before_cursor_execute")
def look(*_):
    if sum(f.stat().st_size for f in Path(sys.argv[1]).glob("mlflow.db.*.part")) > 50_000:
        os.kill(os.getpid(), signal.SIGKILL)

connect(f"sqlite:///{sys.argv[1]}/mlflow.db")
"""


def test_a_process_killed_while_the_tables_are_made_leaves_no_half_file(tmp_path):
    """A half-made mlflow.db is never opened again: its migration fails for ever."""
    command = [sys.executable, "-c", HALF_MADE, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr[-3000:]
    assert any(tmp_path.iterdir()) and not (tmp_path / "mlflow.db").exists()
