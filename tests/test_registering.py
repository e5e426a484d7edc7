"""What is logged and registered is so once, whatever failed in between; against a stand-in for MLflow's client."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from small import tiny_config

from dfssd.line import registry
from dfssd.pipeline.context import Context
from dfssd.pipeline.exporting import register_finished
from dfssd.pipeline.stages import make_stage
from dfssd.runtime.artefact_names import DATASET, EXPORT, REPORT, STUDENT

POINT = {"score": 0.4, "thresholds": {"pit": 0.4}}


class Client:
    """MLflow, as far as it is asked; `fails` names a call that fails the next time."""

    def __init__(self):
        self.models, self.versions, self.champion, self.ended, self.fails = {}, [], None, [], ""
        self.metrics = 0

    def _may_fail(self, name):
        if self.fails == name:
            self.fails = ""
            raise ConnectionError(name)

    def get_run(self, run_id):
        outputs = [SimpleNamespace(model_id=name) for name in self.models]
        return SimpleNamespace(outputs=SimpleNamespace(model_outputs=outputs) if outputs else None)

    def get_logged_model(self, name):
        return self.models[name]

    def log_batch(self, run_id, metrics):
        self._may_fail("log_batch")
        self.models[metrics[0].model_id].metrics = metrics
        self.metrics += 1

    def search_model_versions(self, text):
        return self.versions

    def get_model_version_by_alias(self, name, alias):
        from mlflow.exceptions import MlflowException

        if self.champion is None:
            raise MlflowException("none")
        return next(v for v in self.versions if v.version == self.champion)

    def set_registered_model_alias(self, name, alias, version):
        self._may_fail("alias")
        self.champion = version

    def set_model_version_tag(self, name, version, key, value):
        self.versions[int(version) - 1].tags[key] = value

    def set_terminated(self, run_id, status, end_time=None):
        self.ended.append((run_id, status, end_time))

    def register(self, uri, name, tags):
        self.versions.append(SimpleNamespace(version=str(len(self.versions) + 1), tags=dict(tags), source=uri))
        return self.versions[-1]

    def log(self, uri, run_id, name, onnx, done, tags):
        name = f"m-{len(self.models)}"
        self.models[name] = SimpleNamespace(model_uri=f"models:/{name}", status="READY", tags=tags, metrics=[])
        return f"models:/{name}"


@pytest.fixture
def client(monkeypatch):
    own = Client()
    monkeypatch.setattr(registry, "_tracking", lambda uri: nullcontext())
    monkeypatch.setattr(registry, "_log", own.log)
    monkeypatch.setattr("mlflow.register_model", own.register)
    return own


def _register(client, value, dataset="d", sha="1"):
    known = {"dataset": dataset, "val.map50_95": repr(value), "onnx_sha256": sha}
    return registry._register(client, "", "models:/m", "steel", {"val/map50_95": value}, known)


def test_a_champion_is_not_lost_where_its_alias_could_not_be_set(client):
    for value, version in ((0.4, "1"), (0.5, "2")):
        client.fails = "alias"
        with pytest.raises(ConnectionError):
            _register(client, value)
        said = _register(client, value)  # as the outbox does, or the same command
        assert client.champion == version and len(client.versions) == int(version) and "champion" in said
        assert _register(client, value) == f"registered steel before: it is version {version}"
    assert "stays version 2" in _register(client, 0.45) and len(client.versions) == 3
    client.champion = "1"  # a person wants another one
    assert "before" in _register(client, 0.5) and client.champion == "1"


@pytest.fixture
def exported(tmp_path, client):
    """A finished export of a student that publishes the label-only weights, and how to type its command again."""
    config = tiny_config(tmp_path)
    context = Context(config.model_copy(update={"export": config.export.model_copy(update={"register_as": "steel"})}))
    measured = (("label_only", 0.7), ("student", 0.6))
    numbers = {name: {split: {"map50": v, "map50_95": v} for split in ("val", "test")} for name, v in measured}
    context.run.write_json(f"{REPORT}/metrics.json", numbers)
    record = {"config": {}, "inputs": {}, "digest": "d", "summary": {"model": "student", "mlflow_model": ""}}
    record |= {"finished_utc": "2026-01-02T03:04:05Z", "mlflow_run_id": "run"}
    for name in (DATASET, STUDENT, REPORT, EXPORT):
        more = {"published": "label_only"} if name == STUDENT else {}
        context.run.write_json(f"{name}/stage.json", {**record, **more})
    context.run.write_json(f"{EXPORT}/export.json", {"model": "student", "operating_point": POINT})
    context.run.write(f"{EXPORT}/student.onnx", b"onnx")

    def again(answers=True):
        attempt = lambda call, default, patience=None: call(client) if answers else (call(client), default)[1]  # noqa: E731
        context.runs.attempt, context.runs.post = attempt, lambda call: call(client)
        register_finished(context, make_stage(context.config, context.run, EXPORT))
        return context.run.read_json(f"{EXPORT}/stage.json")["summary"]["mlflow_model"]

    return again


def test_a_finished_export_is_logged_once_and_its_run_is_ended(exported, client, capsys):
    assert exported(answers=False) == "" and len(client.models) == 1, "MLflow made it after we had gone on"
    assert client.ended == [("run", "FINISHED", 1767323045000)], "as it was: not running, nor ended today"
    assert exported() == "models:/m-0" and len(client.models) == 1 and client.metrics == 1
    assert exported() == "models:/m-0" and len(client.ended) == 2 and len(client.versions) == 1
    assert "registered steel, version 1" in capsys.readouterr().out


def test_what_is_registered_has_the_numbers_of_the_weights_that_were_exported(exported, client):
    exported()
    assert client.versions[0].tags["val.map50_95"] == "0.7", (
        "those of the label-only student, which --publish-best took"
    )
    assert client.models["m-0"].metrics[0].value == 0.7


def test_a_model_whose_numbers_were_not_taken_is_not_logged_again(exported, client):
    client.fails = "log_batch"
    with pytest.raises(ConnectionError):
        exported()
    assert not client.models["m-0"].metrics
    assert exported() == "models:/m-0" and len(client.models) == 1 and client.models["m-0"].metrics
