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
COMPARED = "compared_with"  # tag of a version: that of the champion when it came
PATIENCE_S = 60.0  # that a person who asked for a registered model waits for it


def log_model(
    runs: Runs,
    run_id: str,
    store: Storage,
    model: str,
    done: Mapping[str, Any],
    numbers: Mapping[str, Any],
    dataset_digest: str,
    register: str = "",
    logged: str = "",
) -> str:
    """Log the exported ONNX file as an MLflow model of a run, and register it where asked, each once.

    Args:
        store: folder that holds `<model>.onnx`.
        done: summary of the export. numbers: what the report measured of these weights ("val", "test").
        dataset_digest: of the split that the numbers were measured on.
        register: name in the registry; '' registers nothing. A version with the same file and numbers stays the only one.
        logged: URI of the model, where it was logged before.

    Returns:
        URI of the logged model; '' where MLflow is not reachable.
    """
    if not run_id:
        return ""
    metrics = {f"{split}/{k}": float(numbers[split][k]) for split in ("val", "test") for k in ("map50", MEASURE)}
    onnx = store.read(f"{model}.onnx")
    known = {
        "dataset": dataset_digest,
        f"val.{MEASURE}": repr(metrics[f"val/{MEASURE}"]),
        "onnx_sha256": hashlib.sha256(onnx).hexdigest(),
    }
    tags = {"model": model, "score": str(done["operating_point"]["score"])}
    name = model.replace("/", "_")

    def log(client: Any) -> str:
        before = _logged_before(client, run_id, known)
        uri = before.model_uri if before else _log(runs.uri, run_id, name, onnx, done, tags | known)
        if not (before and before.metrics):
            _log_metrics(client, run_id, uri, metrics)
        return str(uri)

    uri = logged or runs.attempt(log, "", PATIENCE_S)
    if uri and register:
        said = runs.attempt(lambda client: _register(client, runs.uri, uri, register, metrics, known), "", PATIENCE_S)
        print(said or f"WARNING: {register} was not registered", flush=True)
    return uri


def _logged_before(client: Any, run_id: str, known: Mapping[str, str]) -> Any:
    """The whole model of the run that has these tags, or None: an answer of MLflow that came too late has left one."""
    outputs = client.get_run(run_id).outputs
    for one in outputs.model_outputs if outputs else ():
        model = client.get_logged_model(one.model_id)
        if str(model.status) == "READY" and all(model.tags.get(key) == value for key, value in known.items()):
            return model
    return None


def _log_metrics(client: Any, run_id: str, uri: str, metrics: Mapping[str, float]) -> None:
    from mlflow.entities import Metric

    now, model_id = int(time.time() * 1000), uri.rsplit("/", 1)[-1]
    client.log_batch(run_id, metrics=[Metric(f"model/{k}", v, now, 0, model_id=model_id) for k, v in metrics.items()])


def _log(uri: str, run_id: str, name: str, onnx: bytes, done: Mapping[str, Any], tags: dict[str, str]) -> str:
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
                tags=tags,
            )
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
        mlflow.end_run(status="RUNNING")  # where one was opened; who asked for it ends it
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
    or where it is better on val of the same data set. Says what was done.

    A version is compared once: who gives the alias to another one by hand is not overruled by the same command.
    """
    import mlflow

    versions = client.search_model_versions(f"name = '{name}'")
    found = next((v for v in versions if all(v.tags.get(key) == value for key, value in known.items())), None)
    present = _champion(client, name)
    if found and present and (COMPARED in found.tags or str(found.version) == str(present.version)):
        return f"registered {name} before: it is version {found.version}"
    if found is None:
        with _tracking(store):
            found = mlflow.register_model(model_uri, name, tags=dict(known))
    wins, said = _against(present, float(metrics[f"val/{MEASURE}"]), known["dataset"])
    version = str(found.version)
    if wins:
        client.set_registered_model_alias(name, CHAMPION, version)
    client.set_model_version_tag(name, version, COMPARED, str(present.version) if present else "none")
    return f"registered {name}, version {version}{said}"


def _against(present: Any, own: float, dataset: str) -> tuple[bool, str]:
    """Does a version with this val mAP50-95 become champion instead of the present one, and why?"""
    if present is None:
        return True, f": the first one, so it is {CHAMPION}"
    stays = f"; {CHAMPION} stays version {present.version}"
    if present.tags.get("dataset") != dataset:
        how = "to change it: mlflow's client.set_registered_model_alias"
        return False, f"{stays}, which was measured on another data set ({how})"
    best = float(present.tags[f"val.{MEASURE}"])
    numbers = f"(val mAP50-95 {own:.4f}, that of version {present.version} {best:.4f})"
    return (True, f": it is {CHAMPION} now {numbers}") if own > best else (False, f"{stays} {numbers}")


def _champion(client: Any, name: str) -> Any:
    """The version that bears the alias, or None."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException:
        return None
