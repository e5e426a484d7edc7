"""Models in MLflow: logged so that any of its tools can load and serve them, registered, and champion only by merit.

What is logged is a pyfunc on ONNX Runtime (`served.py`): it loads and answers without torch, Ray or this project.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dfssd.runtime.storage import Storage
from dfssd.runtime.tracking import Runs

HERE = Path(__file__).parent
MEASURE = "map50_95"
REQUIREMENTS = ("mlflow", "onnxruntime", "opencv-python-headless", "numpy", "pandas")
CHAMPION = "champion"
PATIENCE_S = 60.0  # that a person who asked for a registered model waits for it


def log_model(
    runs: Runs,
    run_id: str,
    store: Storage,
    model: str,
    done: Mapping[str, Any],
    measured: Mapping[str, Any],
    dataset_digest: str,
    register: str = "",
    logged: str = "",
) -> str:
    """Log the exported ONNX file as an MLflow model of a run, and register it where asked, each once.

    Args:
        store: folder that holds `<model>.onnx`.
        done: summary of the export. measured: numbers of all models (`report/metrics.json`).
        dataset_digest: of the split that the numbers were measured on.
        register: name in the registry; '' registers nothing. A version with the same file and numbers stays the only one.
        logged: URI of the model, where it was logged before.

    Returns:
        URI of the logged model; '' where MLflow is not reachable.
    """
    if not run_id:
        return ""
    numbers = measured[model]
    metrics = {f"{split}/{k}": float(numbers[split][k]) for split in ("val", "test") for k in ("map50", MEASURE)}
    tags = {"dataset": dataset_digest, "model": model, "score": str(done["operating_point"]["score"])}
    name = model.replace("/", "_")
    onnx = store.read(f"{model}.onnx")
    uri = logged or runs.attempt(lambda client: _log(runs.uri, run_id, name, onnx, done, metrics, tags), "", PATIENCE_S)
    known = {
        "dataset": dataset_digest,
        f"val.{MEASURE}": repr(metrics[f"val/{MEASURE}"]),
        "onnx_sha256": hashlib.sha256(onnx).hexdigest(),
    }
    if uri and register:
        said = runs.attempt(lambda client: _register(client, runs.uri, uri, register, metrics, known), "", PATIENCE_S)
        print(said or f"WARNING: {register} was not registered", flush=True)
    return uri


def _log(
    uri: str,
    run_id: str,
    name: str,
    onnx: bytes,
    done: Mapping[str, Any],
    metrics: Mapping[str, float],
    tags: dict[str, str],
) -> str:
    """Log one model with signature, input example and requirements; returns models:/m-..."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema(
            [
                ColSpec(DataType.long, "picture"),
                ColSpec(DataType.string, "name"),
                *(ColSpec(DataType.double, n) for n in ("score", "x1", "y1", "x2", "y2")),
            ]
        ),
        params=ParamSchema([ParamSpec("score", DataType.double, -1.0)]),
    )
    # The headless OpenCV is what a server needs, also where the other wheel is installed here.
    logging.getLogger("mlflow.utils.requirements_utils").setLevel(logging.ERROR)
    with _tracking(uri):
        mlflow.start_run(run_id=run_id, log_system_metrics=False)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            file.write_bytes(onnx)
            info = mlflow.pyfunc.log_model(
                name=name,
                python_model=str(HERE / "served.py"),
                artifacts={"onnx": str(file)},
                code_paths=[str(HERE / "detector.py")],
                signature=signature,
                input_example=_example(),
                pip_requirements=_requirements(),
                metadata={
                    "operating_point": done["operating_point"],
                    "names": list(done["operating_point"]["thresholds"]),
                },
            )
            client = mlflow.MlflowClient(uri)
            for key, value in tags.items():
                client.set_logged_model_tags(info.model_id, {key: value})
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            rows = [Metric(f"model/{k}", v, now, 0, model_id=info.model_id) for k, v in metrics.items()]
            client.log_batch(run_id, metrics=rows)
        return str(info.model_uri)


@contextmanager
def _tracking(uri: str) -> Iterator[None]:
    """MLflow's fluent interface on a store, and back."""
    import mlflow

    given = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.end_run(status="RUNNING")  # where one was opened; its stage ends it
        mlflow.set_tracking_uri(given or None)


def _example() -> Any:
    """One grey PNG."""
    import cv2
    import pandas as pd

    data = cv2.imencode(".png", np.full((32, 32), 128, np.uint8))[1].tobytes()
    return pd.DataFrame({"image": [data]})


def _requirements() -> list[str]:
    """What a server needs, in the versions that are here; either OpenCV wheel does."""
    found = []
    for name in REQUIREMENTS:
        try:
            found.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            version = importlib.metadata.version("opencv-python") if name.startswith("opencv") else ""
            found.append(f"{name}=={version}" if version else name)
    return found


def _register(
    client: Any, store: str, model_uri: str, name: str, metrics: Mapping[str, float], known: Mapping[str, str]
) -> str:
    """A new version, unless there is one with the same tags `known` (file, data set, val mAP50-95); `champion` where none is,
    or where it is better on val of the same data set. Says what was done."""
    import mlflow

    for one in client.search_model_versions(f"name = '{name}'"):
        if all(one.tags.get(key) == value for key, value in known.items()):
            return f"registered {name} before: it is version {one.version}"
    present = _champion(client, name)
    with _tracking(store):
        version = str(mlflow.register_model(model_uri, name).version)
    own = float(metrics[f"val/{MEASURE}"])
    for key, value in known.items():
        client.set_model_version_tag(name, version, key, value)
    if present is None:
        client.set_registered_model_alias(name, CHAMPION, version)
        return f"registered {name}, version {version}: the first one, so it is {CHAMPION}"
    if present.tags.get("dataset") != known["dataset"]:
        return (
            f"registered {name}, version {version}; {CHAMPION} stays version {present.version}, which was measured "
            f"on another data set (to change it: mlflow's client.set_registered_model_alias)"
        )
    best = float(present.tags[f"val.{MEASURE}"])
    numbers = f"val mAP50-95 {own:.4f}, that of version {present.version} {best:.4f}"
    if own > best:
        client.set_registered_model_alias(name, CHAMPION, version)
        return f"registered {name}, version {version}: it is {CHAMPION} now ({numbers})"
    return f"registered {name}, version {version}; {CHAMPION} stays version {present.version} ({numbers})"


def _champion(client: Any, name: str) -> Any:
    """The version that bears the alias, or None."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException:
        return None
