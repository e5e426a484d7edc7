"""dfssd: train a small, fast defect detector from few labels and many unlabelled images, on a Ray cluster."""

import importlib
import os
from typing import TYPE_CHECKING

# Ultralytics would pip-install what it misses in the middle of a job; it reads this when it is imported.
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
os.environ.setdefault("YOLO_VERBOSE", "false")
# It would evaluate a word of a model's layout as Python, and unpickle anything; read when it is imported, too.
os.environ.setdefault("ULTRALYTICS_SAFE_LOAD", "1")
# ONNX Runtime and MLflow would tell their makers what runs here; both read it when they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from dfssd.runtime.environment import set_driver_environment
from dfssd.version import __version__

set_driver_environment()  # Ray reads it when it is imported, so it is set before any module of this package can do so

if TYPE_CHECKING:
    from dfssd.api import FinishedRun, open_run, run, settings
    from dfssd.errors import DfssdError

__all__ = ["DfssdError", "FinishedRun", "__version__", "open_run", "run", "settings"]


def __getattr__(name: str) -> object:
    """What a notebook needs, imported when it is asked for: `import dfssd` alone imports nothing slow."""
    if name not in __all__:
        raise AttributeError(f"module 'dfssd' has no attribute {name!r}")
    module = "dfssd.errors" if name == "DfssdError" else "dfssd.api"
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
