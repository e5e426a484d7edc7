"""Build, load and save Ultralytics detectors, and read their head's raw output.

Legend: B images, C classes.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from ultralytics.cfg import get_cfg
from ultralytics.nn.modules.head import Detect
from ultralytics.nn.tasks import DetectionModel, torch_safe_load, yaml_model_load

from dfssd.errors import DfssdError
from dfssd.models.head import MAIN, HeadOutput, TeacherOutput
from dfssd.models.yolo.layout import refuse_code, require_safe_loader
from dfssd.models.yolo.start import Start, detection_layout, take_over
from dfssd.models.yolo.taps import Taps
from dfssd.version import __version__

LOSS_EPOCHS = 100  # E2ELoss decays by epochs; one of ours is a hundredth of the training


def resolve_weights(spec: str) -> tuple[str, bytes | None]:
    """Check a --teacher or --student setting before anything is started.

    Args:
        spec: an Ultralytics detection yaml, or a .pt on disk or by name (fetched by Ultralytics where it can).

    Returns:
        (spec, file content of the .pt or None for a yaml).

    Raises:
        DfssdError: the name is unknown, the file is missing and could not be fetched, or it holds no detector.
    """
    if spec.endswith((".yaml", ".yml")):
        try:
            layout = yaml_model_load(spec)
        except (OSError, TypeError, KeyError) as error:
            raise DfssdError(
                f"no model of this name: {spec}", todo="give an Ultralytics yaml (yolov8n.yaml, yolo11s.yaml) or a .pt"
            ) from error
        refuse_code(layout, spec)
        return spec, None
    if not spec.endswith(".pt"):
        raise DfssdError(f"not a model: {spec}", todo="give an Ultralytics detection yaml or a .pt file")
    require_safe_loader()
    try:
        _, file = torch_safe_load(spec, safe_only=True)
    except (OSError, RuntimeError, TypeError, EOFError, ValueError, AttributeError, ImportError) as error:
        raise DfssdError(
            f"weights are not on disk and could not be fetched, or cannot be read: {str(error).splitlines()[0]}",
            where=spec,
            todo="give a path to a .pt file that is there, or train from scratch with a yaml (yolov8s.yaml)",
        ) from error
    data = Path(file).read_bytes()
    read_detector(data, spec)
    return spec, data


def build_detector(spec: str, names: Sequence[str], imgsz: int, weights: bytes | None = None) -> DetectionModel:
    """A trainable detector with C = len(names) classes, on the CPU, in fp32.

    Args:
        spec: yaml name, or the name of the .pt that `weights` came from.
        names: class names.
        imgsz: side of the network input (px).
        weights: content of a .pt; matching tensors are taken over, the rows of the class head by the names of the classes.

    Raises:
        DfssdError: the model is no YOLO detector with an anchor-free head on strides 8, 16, 32.
    """
    return started_detector(spec, names, imgsz, weights)[0]


def started_detector(
    spec: str, names: Sequence[str], imgsz: int, weights: bytes | None = None
) -> tuple[DetectionModel, Start | None]:
    """`build_detector`, and what it took over from the weights; None without any."""
    source = read_detector(weights, spec) if weights is not None else None
    layout, task = detection_layout(source) if source is not None else (yaml_model_load(spec), "")
    refuse_code(layout, spec)
    model = DetectionModel(layout, ch=3, nc=len(names), verbose=False)
    head = model.model[-1]
    if not isinstance(head, Detect) or head.stride.tolist() != [8.0, 16.0, 32.0]:
        raise DfssdError(
            f"{spec} is not a detector with strides 8, 16, 32",
            todo="take a YOLOv8, YOLO11, YOLO12 or YOLO26 detection model (no P2/P6, no RT-DETR)",
        )
    start = take_over(model, source, names, task) if source is not None else None
    configure(model, names, imgsz)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".dfl" not in name)  # the DFL kernel is the constant 0..15
    return model, start


def configure(model: DetectionModel, names: Sequence[str], imgsz: int) -> None:
    """Set what Ultralytics reads from a model: names and the settings of its loss."""
    model.names = dict(enumerate(names))
    model.nc, model.task = len(names), "detect"
    model.args = get_cfg(overrides={"task": "detect", "imgsz": imgsz, "epochs": LOSS_EPOCHS})


def read_detector(data: bytes, where: str) -> DetectionModel:
    """Load the detector of a .pt without running code from it: neither what is pickled in it (Ultralytics' allow-list of
    classes) nor what its layout asks for (`refuse_code`).

    Raises:
        DfssdError: the file holds no detector, or code.
    """
    require_safe_loader()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"
        path.write_bytes(data)
        try:
            checkpoint, _ = torch_safe_load(str(path), safe_only=True)
        except (TypeError, RuntimeError, EOFError, OSError, ValueError, AttributeError, ImportError) as error:
            raise DfssdError(f"cannot be loaded as a model: {error}", where=where, todo="give another .pt") from error
    if not isinstance(checkpoint, dict):
        raise DfssdError(f"holds a {type(checkpoint).__name__}, not a model", where=where, todo="give another .pt")
    model = checkpoint.get("ema") or checkpoint.get("model")
    if not isinstance(model, DetectionModel):
        raise DfssdError(
            f"holds a {type(model).__name__}, not a detector", where=where, todo="give the .pt of a detection model"
        )
    refuse_code(getattr(model, "yaml", None), where)
    return model.float()


def load_detector(data: bytes, where: str, imgsz: int) -> DetectionModel:
    """Load a finished detector for inference: eval mode, fp32, no gradients."""
    model = read_detector(data, where)
    configure(model, [model.names[k] for k in sorted(model.names)], imgsz)
    return model.eval().requires_grad_(False)


def detector_bytes(model: DetectionModel, extra: dict[str, Any]) -> bytes:
    """Content of a .pt that stock Ultralytics loads: the module in half precision, and `extra` under "dfssd".

    NHWC-strided weights crash some released versions when they fuse, hence the contiguous copy.
    """
    from copy import deepcopy

    model.criterion = None
    copy = deepcopy(model).to("cpu").half().to(memory_format=torch.contiguous_format).requires_grad_(False)
    arguments = {"task": "detect", "imgsz": int(model.args.imgsz), "data": None, "model": None}
    copy.args = dict(arguments)
    buffer = io.BytesIO()
    torch.save(
        {
            "epoch": -1,
            "best_fitness": None,
            "model": copy,
            "ema": None,
            "updates": None,
            "optimizer": None,
            "train_args": arguments,
            "train_metrics": {},
            "train_results": {},
            "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "version": f"dfssd {__version__}",
            "license": "AGPL-3.0",
            "dfssd": extra,
        },
        buffer,
    )
    return buffer.getvalue()


def feature_channels(model: DetectionModel) -> list[int]:
    """Channels of the neck outputs P3, P4, P5 that enter the head."""
    return [int(m[0].conv.in_channels) for m in model.model[-1].cv2]


class Teacher:
    """A teacher at work: eval mode, raw head output of all its branches, no gradients.

    Switching only the head's own flag to training gives the raw output and skips decoding, while batch norm stays in
    eval mode.

    Args:
        layers: layers to tap; none: the neck's outputs, which the head hands over anyway.
        frozen: its weights never change, so that batch norm may be fused into the convolutions, and weights are held in the
            precision in which they are used: the same numbers as under autocast, which casts them anew at every step.
        dtype: precision of its pass; None: float32.
    """

    def __init__(
        self,
        model: DetectionModel,
        device: torch.device,
        layers: Sequence[int] = (),
        frozen: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype, self.device = dtype, device
        self.names = [model.names[k] for k in sorted(model.names)]
        self.head = model.model[-1]
        self.reg_max = int(self.head.reg_max)
        self.branches = ("one2many", "one2one") if hasattr(self.head, "one2one_cv2") else ("one2many",)
        neck = feature_channels(model)
        self.model = model.eval().requires_grad_(False)
        if frozen:
            self.head.fuse = lambda: None  # it would throw the branch away that is not used for inference
            self.model = self.model.fuse(verbose=False)
        self.model.to(device, memory_format=torch.channels_last)
        if frozen and dtype is not None:
            self.model.to(dtype)
        self.taps = Taps(self.model, layers, "teacher") if layers else None
        self.channels = self.taps.channels if self.taps else neck
        self.frozen, self.head.training = frozen, frozen

    @torch.no_grad()  # not inference_mode: its tensors cannot be saved for the student's backward pass
    def __call__(self, images_bchw: Tensor) -> TeacherOutput:
        """What it says of images in float32, or in the precision of its pass."""
        self.head.training = True
        kind = self.device.type
        if self.dtype is None or self.frozen:
            with torch.autocast(kind, enabled=False):
                output = self.model(images_bchw if self.dtype is None else images_bchw.to(self.dtype))
        else:
            with torch.autocast(kind, self.dtype):
                output = self.model(images_bchw)
        self.head.training = self.frozen  # an average is validated in between, and must then decode
        raw = branches(output)
        return TeacherOutput(raw, self.taps.take() if self.taps else raw[MAIN].feats)


def branches(output: Any) -> dict[str, HeadOutput]:
    """Raw output by branch: {"one2many": ...} and, for end-to-end heads, {"one2one": ...}."""
    raw = output[1] if isinstance(output, tuple) else output
    named = {k: v for k, v in raw.items() if k in ("one2many", "one2one") and v} or {MAIN: raw}
    return {k: HeadOutput(b["boxes"].float(), b["scores"].float(), b["feats"]) for k, b in named.items()}
