"""The MLflow model: pictures in, boxes out, on ONNX Runtime alone. MLflow stores this file with the model and runs it.

Input: a column `image` with pictures as encoded files (PNG, JPEG, ...), raw bytes or base64 text. Output: one row a box.
"""

import base64
from typing import Any

import cv2
import mlflow.pyfunc
import numpy as np
import pandas as pd

try:  # beside the model, where this project is not installed
    from detector import CLS, SCORE, XYXY, LineDetector
except ImportError:
    from dfssd.line.detector import CLS, SCORE, XYXY, LineDetector

COLUMNS = ["picture", "name", "score", "x1", "y1", "x2", "y2"]


class Served(mlflow.pyfunc.PythonModel):
    """Boxes at the operating point, or from `score` on (a parameter), in pixels of the picture."""

    def load_context(self, context: Any) -> None:
        self.detector = LineDetector(context.artifacts["onnx"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        score = float((params or {}).get("score", -1.0))
        tau_c = self.detector.thresholds(score) if score >= 0 else None
        pictures = [decoded(one, k) for k, one in enumerate(pd.DataFrame(model_input)["image"])]
        rows = [
            [k, self.detector.names[int(box[CLS])], float(box[SCORE]), *map(float, box[XYXY])]
            for k, boxes in enumerate(self.detector(pictures, tau_c))
            for box in boxes
        ]
        return pd.DataFrame(rows, columns=COLUMNS).astype({"picture": "int64", "name": "str"})


def decoded(one: Any, number: int) -> np.ndarray:
    """(H,W,3) BGR of an encoded picture, in as many bits as it has."""
    data = base64.b64decode(one) if isinstance(one, str) else bytes(one)
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)
    if picture is None:
        raise ValueError(f"picture {number} cannot be decoded: send the bytes of a PNG or JPEG file")
    return np.asarray(picture)


mlflow.models.set_model(Served())
