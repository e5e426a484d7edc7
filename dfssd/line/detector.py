"""An exported detector: pictures in, boxes at the operating point out. One file that stands alone.

It needs numpy, OpenCV and ONNX Runtime (or OpenVINO), and nothing of this project: it is copied into the MLflow model, and
may be copied to a machine at the line. For TensorRT, `tensorrt_engine.py` has to lie beside it.

Legend: B pictures, A anchor points, C classes. Boxes are (n,6) float32 [x1, y1, x2, y2, score, class].
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when ONNX Runtime is imported: nothing is sent from the line

NMS_IOU, MOST = 0.7, 300  # as in `yolo val`
PAD = 114  # grey of the letterbox's edges
SCORE, CLS, XYXY = 4, 5, slice(4)  # columns of boxes, as those of detections in `dfssd.data.boxes`


def on_pictures(
    found: Sequence[np.ndarray],
    pictures: Sequence[np.ndarray],
    ready: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    tau_c: np.ndarray,
) -> list[np.ndarray]:
    """Boxes at or above their class's threshold, in px of the picture and cut at its edges, of boxes of the network's input.

    Args:
        found: (n,6) [x1, y1, x2, y2 (px of the input), score, class] a picture.
        ready: what `letterbox` returned for each picture. tau_c: (C,) thresholds.
    """
    result = []
    for boxes, picture, (_, gain, edge) in zip(found, pictures, ready, strict=True):
        own = boxes[boxes[:, SCORE] >= tau_c[boxes[:, CLS].astype(int)]].copy()
        size = np.array([picture.shape[1], picture.shape[0]])
        for k in (0, 2):
            own[:, k : k + 2] = ((own[:, k : k + 2] - edge) / gain).clip(0, size)
        result.append(own)
    return result


def letterbox(picture: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale the longer side to `side` and pad to a square, as Ultralytics does.

    Args:
        picture: (H,W,3) or (H,W) uint8.

    Returns:
        (side,side,3) uint8; gain (2,) and edge (2,): input px = picture px * gain + edge, in x and y (the two gains differ
        where a narrow strip is rounded to whole pixels).
    """
    picture = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, 2)
    height, width = picture.shape[:2]
    ratio = side / max(height, width)
    size = (min(int(np.ceil(width * ratio)), side), min(int(np.ceil(height * ratio)), side))
    small = picture if size == (width, height) else cv2.resize(picture, size, interpolation=cv2.INTER_LINEAR)
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    square = np.full((side, side, 3), PAD, np.uint8)
    square[top : top + size[1], left : left + size[0]] = small
    return square, np.array([size[0] / width, size[1] / height]), np.array([left, top], np.float64)


def to_uint8(picture: np.ndarray, white: float = 0.0) -> np.ndarray:
    """Grey levels of a camera of more than 8 bits as training has seen them: one white level for the whole data set.

    Args:
        picture: (H,W) or (H,W,3); uint8 is left as it is.
        white: value that becomes 255; 0: the largest of a 16-bit file (1 of floats).
    """
    if picture.dtype == np.uint8:
        return picture
    if picture.dtype.kind in "ui":
        scaled = picture.astype(np.float32) * (256 / ((white or 65535.0) + 1))
    else:
        scaled = np.nan_to_num(picture.astype(np.float32)) * (255 / (white or 1.0)) + 0.5
    return np.asarray(scaled.clip(0, 255).astype(np.uint8))


def network_input(squares: Sequence[np.ndarray]) -> np.ndarray:
    """(B,3,side,side) float32 0..1 RGB from BGR squares."""
    stacked = np.stack(squares)[..., ::-1].transpose(0, 3, 1, 2)
    return np.asarray(np.ascontiguousarray(stacked, np.float32) / np.float32(255))


def nms(boxes: np.ndarray, iou: float = NMS_IOU, most: int = MOST) -> np.ndarray:
    """Boxes by falling score without those that overlap a better one of their class by more than `iou`."""
    if not len(boxes):
        return boxes
    xyxy = boxes[:, XYXY]
    corner, size = xyxy[:, :2].astype(np.float64), (xyxy[:, 2:] - xyxy[:, :2]).clip(0).astype(np.float64)
    xywh = np.concatenate([corner, size], 1)
    kept = cv2.dnn.NMSBoxesBatched(
        xywh.tolist(), boxes[:, SCORE].tolist(), boxes[:, CLS].astype(int).tolist(), 0.0, iou
    )
    order = np.asarray(kept, int).ravel()
    return np.asarray(boxes[order[np.argsort(-boxes[order, SCORE], kind="stable")][:most]])


def decode(raw: np.ndarray, floor: float) -> list[np.ndarray]:
    """Boxes of each picture from (B,4+C,A) raw output [cx, cy, w, h, class scores], after NMS."""
    found = []
    for one in raw:
        classes, points = np.nonzero(one[4:] > floor)
        half = one[2:4, points] / 2
        columns = [one[:2, points] - half, one[:2, points] + half, one[4:][classes, points][None], classes[None]]
        found.append(nms(np.concatenate(columns).T.astype(np.float32)))
    return found


def quiet_openvino() -> Any:
    """OpenVINO without its telemetry.

    Importing it would send a message to its maker from a forked process, which may hang where other threads run, and then the
    whole program never ends. It does without where this module is not to be found.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: "not installed"
    import openvino

    return openvino


class LineDetector:
    """An ONNX, OpenVINO or TensorRT model that `dfssd export` has written.

    Args:
        file: `.onnx` file, the folder or `.xml` of an OpenVINO model, or a TensorRT `.engine`.
        threads: CPU threads of the runtime; 0: its own choice.
        providers: ONNX Runtime's execution providers; none: CUDA where there is one, else the CPU.

    Attributes:
        names: class names. imgsz: side of the square input (px). inside: is NMS part of the model? white: value of a deep
        picture that becomes 255 (0: see `to_uint8`). metadata: what the export wrote (operating_point, reference statistics,
        digest of the weights).

    Raises:
        ValueError: the model was not written by `dfssd export`, is damaged, or its kind is not known.
    """

    def __init__(self, file: str | Path, threads: int = 0, providers: Sequence[str] = ()) -> None:
        self.file, self._most = Path(file), 0  # pictures in a batch at most; 0: any number
        self._run: Callable[[np.ndarray], Any]
        if self.file.suffix == ".onnx":
            meta = self._open_onnx(threads, providers)
        elif self.file.suffix == ".xml" or self.file.is_dir():
            meta = self._open_openvino(threads)
        elif self.file.suffix == ".engine":
            meta = self._open_tensorrt()
        else:
            raise ValueError(f"not an exported model: {file} (give an .onnx file, an OpenVINO folder or an .engine)")
        if "dfssd" not in meta:
            raise ValueError(f"{file} holds no operating point: it was not written by dfssd export")
        self.metadata: dict[str, Any] = json.loads(meta["dfssd"])
        self.names: list[str] = self.metadata["names"]
        self.imgsz, self.inside = int(self.metadata["imgsz"]), bool(self.metadata["nms_inside"])
        self.white = float(self.metadata.get("white", 0.0))
        self.tau_c = self.thresholds()

    def _open_onnx(self, threads: int, providers: Sequence[str]) -> Mapping[str, str]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        known = onnxruntime.get_available_providers()
        wanted = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in known]
        try:
            session = onnxruntime.InferenceSession(str(self.file), options, providers=list(providers) or wanted)
        except Exception as error:  # its errors have no base of their own
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"ONNX Runtime cannot read {self.file}: {said}") from error
        name = session.get_inputs()[0].name
        self._run = lambda images: session.run(None, {name: images})[0]
        self.precision = "fp32"
        return dict(session.get_modelmeta().custom_metadata_map)

    def _open_openvino(self, threads: int) -> Mapping[str, str]:
        openvino = quiet_openvino()
        xml = next(self.file.glob("*.xml")) if self.file.is_dir() else self.file
        # Without the hint OpenVINO computes in bf16 on CPUs that have it: boxes are off by pixels.
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        core = openvino.Core()
        try:
            model = core.read_model(xml)
        except RuntimeError as error:  # places in its own source come first
            said = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise ValueError(f"OpenVINO cannot read {xml}: {said}") from error
        compiled = core.compile_model(model, "CPU", settings)
        self._run = lambda images: compiled(images)[0]
        self.precision = str(compiled.get_property("INFERENCE_PRECISION_HINT"))
        return {"dfssd": model.get_rt_info(["dfssd"]).astype(str)} if model.has_rt_info(["dfssd"]) else {}

    def _open_tensorrt(self) -> Mapping[str, str]:
        try:  # beside this file, where it was copied
            from tensorrt_engine import Engine
        except ImportError:
            from dfssd.line.tensorrt_engine import Engine
        engine = Engine(self.file)
        self._run, self._most = engine, engine.most
        self.precision = "fp32"  # TF32 was switched off when it was built
        known: Mapping[str, str] = engine.metadata
        return known

    def thresholds(self, score: float | None = None) -> np.ndarray:
        """(C,) scores from which a box counts: the model's operating point, or one for all classes."""
        point = self.metadata["operating_point"]
        values = [point["thresholds"].get(n, point["score"]) if score is None else score for n in self.names]
        return np.array(values, np.float32)

    def raw(self, images_bchw: np.ndarray) -> np.ndarray:
        """(B,4+C,A) output of a model without NMS inside."""
        step = self._most or len(images_bchw)
        return np.concatenate([self._run(images_bchw[k : k + step]) for k in range(0, len(images_bchw), step)])

    def boxes_of_input(self, images_bchw: np.ndarray, floor: float) -> list[np.ndarray]:
        """Boxes (px of the input) of each picture, scores above `floor`."""
        if not self.inside:
            return decode(self.raw(images_bchw), floor)
        rows = self._run(images_bchw)  # (n,7) [picture, x1, y1, x2, y2, score, class] of all pictures
        found = [rows[rows[:, 0] == k, 1:] for k in range(len(images_bchw))]
        return [f[np.argsort(-f[:, SCORE], kind="stable")][:MOST] for f in (f[f[:, SCORE] > floor] for f in found)]

    def __call__(self, pictures: Sequence[np.ndarray], tau_c: np.ndarray | None = None) -> list[np.ndarray]:
        """Boxes (px of the picture, cut at its edges) at or above their class's threshold.

        Args:
            pictures: (H,W,3) BGR or (H,W) each, of any size; uint8, or as a deeper file holds them.
            tau_c: (C,) thresholds; none: the operating point.
        """
        tau_c = self.tau_c if tau_c is None else tau_c
        ready = [letterbox(to_uint8(p, self.white), self.imgsz) for p in pictures]
        found = self.boxes_of_input(network_input([r[0] for r in ready]), float(tau_c.min()) * 0.999)
        return on_pictures(found, pictures, ready, tau_c)
