"""MLflow models: any of its tools loads them, without torch; a champion is one by merit; a server answers over HTTP."""

import json
import subprocess
import sys
import time
import urllib.request

import cv2
import numpy as np
import pytest
from test_export import META, NAMES, POINT, _weights

from dfssd.export.onnx_model import onnx_bytes
from dfssd.line.registry import log_model
from dfssd.models.yolo.detector import load_detector
from dfssd.runtime.storage import Storage
from dfssd.runtime.tracking import Runs

pytestmark = pytest.mark.slow  # a minute: MLflow makes its database, and a server starts

NO_TORCH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "ultralytics", "ray", "dfssd"):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
import mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/steel@champion")
data = open(sys.argv[2], "rb").read()
found = model.predict(pandas.DataFrame({"image": [data, data]}), params={"score": 0.4})
print(found.to_json())
"""


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Four versions: the first, a better one, a worse one, and one that was measured on another data set."""
    place = tmp_path_factory.mktemp("mlflow")
    store = Storage(str(place)).at("r")
    runs = Runs(Storage(str(place)), "e", "r", {}, {})
    run_id = runs.stage("export", None, {})
    net = load_detector(_weights(), "made up", 64).fuse(verbose=False)
    store.write("student.onnx", onnx_bytes(net, 64, META))
    uris = []
    for value, digest in ((0.4, "d1"), (0.5, "d1"), (0.3, "d1"), (0.9, "d2")):
        numbers = {s: {"map50": value, "map50_95": value} for s in ("val", "test")}
        uris.append(log_model(runs, run_id, store, "student", {"operating_point": POINT}, numbers, digest, "steel"))
    picture = np.random.default_rng(0).integers(0, 255, (48, 80, 3), np.uint8)
    cv2.imwrite(str(place / "picture.png"), picture)
    return place, runs, uris, run_id


def test_the_champion_is_one_by_merit_on_the_same_data(logged):
    _, runs, uris, _ = logged
    from mlflow import MlflowClient

    client = MlflowClient(runs.uri)
    assert all(uri.startswith("models:/m-") for uri in uris)
    assert client.get_model_version_by_alias("steel", "champion").version in (2, "2")
    assert len(client.search_model_versions("name = 'steel'")) == 4
    model = client.get_logged_model(uris[1].rsplit("/", 1)[-1])
    assert model.tags["dataset"] == "d1" and {m.key for m in model.metrics} >= {"model/val/map50_95"}


def test_the_same_file_is_registered_once(logged, capsys):
    """The same command typed again, and --register of an export that was logged before."""
    _, runs, uris, run_id = logged
    store = Storage(str(logged[0])).at("r")
    numbers = {s: {"map50": 0.5, "map50_95": 0.5} for s in ("val", "test")}
    done = {"operating_point": POINT}
    for name in ("steel", "brass", "brass"):
        again = log_model(runs, "run", store, "student", done, numbers, "d1", name, logged=uris[1])
        assert again == uris[1]
    # The first answer came too late, so nobody knows the URI: the run in MLflow tells.
    assert log_model(runs, run_id, store, "student", done, numbers, "d1") == uris[1]
    said = capsys.readouterr().out
    assert "registered steel before: it is version 2" in said and "brass, version 1: the first one" in said
    assert "registered brass before: it is version 1" in said


def test_it_loads_and_predicts_without_torch_or_this_project(logged, tmp_path):
    place, runs, *_ = logged
    script = tmp_path / "load.py"
    script.write_text(NO_TORCH)
    done = subprocess.run(
        [sys.executable, str(script), runs.uri, str(place / "picture.png")],
        capture_output=True, text=True, cwd=tmp_path, timeout=120, env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    table = json.loads(done.stdout.splitlines()[-1])
    assert (
        len(table["score"]) and set(table["picture"].values()) == {0, 1} and set(table["name"].values()) <= set(NAMES)
    )
    assert min(table["score"].values()) >= 0.4


def test_what_is_logged_says_what_it_needs_and_takes(logged):
    import mlflow

    _, runs, uris, _ = logged
    mlflow.set_tracking_uri(runs.uri)
    info = mlflow.models.get_model_info(uris[0])
    assert info.signature.inputs.input_names() == ["image"] and "score" in info.signature.outputs.input_names()
    assert info.saved_input_example_info is not None
    needs = mlflow.pyfunc.get_model_dependencies(uris[0])
    text = open(needs).read()  # noqa: PTH123, SIM115
    assert "onnxruntime==" in text and "torch" not in text and "ultralytics" not in text


def test_mlflow_models_serve_answers_with_a_picture(logged):
    import base64
    import socket

    place, runs, *_ = logged
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/steel@champion", "--env-manager", "local",
               "-h", "127.0.0.1", "-p", str(port)]  # fmt: skip
    import os
    import signal

    env = {**os.environ, "MLFLOW_TRACKING_URI": runs.uri, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    server = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        data = base64.b64encode((place / "picture.png").read_bytes()).decode()
        body = json.dumps(
            {"dataframe_split": {"columns": ["image"], "data": [[data]]}, "params": {"score": 0.4}}
        ).encode()
        deadline = time.monotonic() + 120
        while True:
            try:
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
                )
                answer = json.loads(urllib.request.urlopen(request, timeout=30).read())
                break
            except urllib.error.HTTPError as error:
                raise AssertionError(error.read().decode()) from error
            except OSError:
                assert time.monotonic() < deadline and server.poll() is None, "the server did not come up"
                time.sleep(1)
        assert answer["predictions"] and set(answer["predictions"][0]) == {
            "picture",
            "name",
            "score",
            "x1",
            "y1",
            "x2",
            "y2",
        }
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)
