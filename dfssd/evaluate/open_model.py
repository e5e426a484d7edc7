"""Open any model for `dfssd predict`: an exported one, or a .pt (which needs torch) behind the same call."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dfssd.errors import DfssdError
from dfssd.line.detector import LineDetector, letterbox, network_input, on_pictures
from dfssd.line.predict import Detector


def open_model(file: str, imgsz: int = 0, threads: int = 0) -> Detector:
    """A detector from an .onnx file, an OpenVINO folder, a TensorRT .engine or a .pt.

    Args:
        imgsz: side of the input (px), of a .pt only: exported models know theirs. 0: as its run measured it, else 640.
        threads: CPU threads; 0: as the runtime chooses. An .engine has none.

    Raises:
        DfssdError: it is not there, not a model of this kind, or has no use for what was asked.
    """
    path = model_path(file)
    if path.suffix == ".pt":
        return _Network(path, imgsz, threads)
    if threads and path.suffix == ".engine":
        raise DfssdError("--threads has no effect on an .engine, which computes on the GPU", todo="leave it out")
    model = open_exported(path, threads)
    if imgsz not in (0, model.imgsz):
        raise DfssdError(
            f"--imgsz {imgsz}: the input of this model is {model.imgsz} px, and nothing changes it",
            where=file,
            todo="leave --imgsz out; a .pt takes any",
        )
    return model


def model_path(file: str) -> Path:
    """Path of a model that is there.

    Raises:
        DfssdError: it is not.
    """
    path = Path(file)
    if not path.exists():
        raise DfssdError(
            "there is no such model", where=file, todo="give an .onnx file, an OpenVINO folder, an .engine or a .pt"
        )
    return path


def open_exported(path: Path, threads: int) -> LineDetector:
    """An exported model.

    Raises:
        DfssdError: it is none, or its runtime is not installed.
    """
    try:
        return LineDetector(path, threads)
    except (ValueError, RuntimeError, StopIteration, ImportError) as error:
        raise DfssdError(
            f"cannot be opened: {(str(error).splitlines() or ['there is no model in it'])[0]}",
            where=str(path),
            todo="write it with dfssd export",
        ) from error


class _Network:
    """A .pt: it works at the operating point that its run's report chose for it; from elsewhere, score 0.25 is meant.

    Args:
        imgsz: side of the input (px); 0: that of its operating point, without one 640.
        threads: CPU threads of torch, in this whole process; 0: its own choice.
    """

    def __init__(self, path: Path, imgsz: int, threads: int) -> None:
        import torch

        from dfssd.evaluate.origin import origin_of
        from dfssd.models.families import ready_model

        if threads:
            torch.set_num_threads(threads)
        origin = origin_of(path)
        self.imgsz = imgsz or (origin.imgsz if origin else None) or 640
        self.model: Any
        data = path.read_bytes()
        self.model, self.names = ready_model(data, str(path), self.imgsz)
        self.metadata: dict[str, Any] = {"weights_sha256": hashlib.sha256(data).hexdigest()}
        self.point = None
        if origin:
            self.metadata["white"] = max((row.white for row in origin.manifest.rows), default=0.0)
            self.point = origin.point if origin.imgsz == self.imgsz else None

    def thresholds(self, score: float | None = None) -> np.ndarray:
        if score is None and self.point:
            from dfssd.evaluate.escapes import thresholds_of

            return thresholds_of(self.point, self.names).astype(np.float32)
        if score is None:
            print(
                f"WARNING: no operating point was chosen for this .pt at {self.imgsz} px: score 0.25 is taken. --score and "
                "--imgsz give others; dfssd export writes a model that brings its own",
                flush=True,
            )
        return np.full(len(self.names), 0.25 if score is None else score, np.float32)

    def __call__(self, pictures: Sequence[np.ndarray], tau_c: np.ndarray | None = None) -> list[np.ndarray]:
        from dfssd.evaluate.squares import network

        tau_c = self.thresholds() if tau_c is None else tau_c
        ready = [letterbox(p, self.imgsz) for p in pictures]
        found = network(self.model, float(tau_c.min()) * 0.999)(network_input([r[0] for r in ready]))
        return on_pictures(found, pictures, ready, tau_c)
