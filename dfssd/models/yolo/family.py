"""YOLO as a model family: Ultralytics' anchor-free heads on strides 8, 16, 32 (YOLOv8, YOLO11, YOLO12, YOLO26).

Nothing is computed here: it says which file of this folder does what.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from ultralytics.nn.tasks import DetectionModel

from dfssd.models.family import Family, Raw, TeacherNetwork, compile_part
from dfssd.models.pairing import Pairing
from dfssd.models.yolo import detector
from dfssd.models.yolo.detection_loss import DetectionLoss
from dfssd.models.yolo.detector import branches
from dfssd.models.yolo.pair import pair
from dfssd.models.yolo.predict import Decoder, decoding, predict
from dfssd.models.yolo.taps import Taps


class Yolo(Family):
    name = "YOLO"

    def claims(self, what: str | bytes | nn.Module) -> bool:
        if isinstance(what, str):
            return what.endswith((".yaml", ".yml", ".pt"))
        return what[:2] == b"PK" if isinstance(what, bytes) else isinstance(what, DetectionModel)

    def resolve(self, spec: str) -> tuple[str, bytes | None]:
        return detector.resolve_weights(spec)

    def build(self, spec: str, names: Sequence[str], imgsz: int, weights: bytes | None) -> tuple[nn.Module, str]:
        model, start = detector.started_detector(spec, names, imgsz, weights)
        return model, start.said() if start is not None else ""

    def load(self, data: bytes, where: str, imgsz: int) -> DetectionModel:
        return detector.load_detector(data, where, imgsz)

    def save(self, model: nn.Module, extra: dict[str, Any]) -> bytes:
        return detector.detector_bytes(model, extra)

    def names(self, model: Any) -> list[str]:
        return [model.names[k] for k in sorted(model.names)]

    def ready(
        self,
        model: Any,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> nn.Module:
        fused: Any = super().ready(model.fuse(verbose=False), device, dtype, memory_format)
        fused.model[-1].dfl.float()  # boxes are decoded in float32
        return fused  # type: ignore[no-any-return]

    def compile(self, model: Any) -> None:
        for layer in model.model:
            compile_part(layer)

    def raw(self, model: Any, images_bchw: Tensor) -> Raw:
        return branches(model(images_bchw))

    def loss(self, model: nn.Module, box_loss: str) -> DetectionLoss:
        return DetectionLoss(model, box_loss)

    def boxes(
        self,
        model: nn.Module,
        images_bchw: Tensor,
        conf: float,
        iou: float,
        most: int,
        dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        return predict(model, images_bchw, conf, iou, most, dtype)

    def decoder(self, model: nn.Module) -> Decoder:
        return Decoder(model)

    def kept_float(self, convolutions: Sequence[str]) -> list[str]:
        return decoding(convolutions)

    def watch(self, model: Any, see: Callable[[Sequence[Tensor]], None]) -> RemovableHandle:
        handle: RemovableHandle = model.model[-1].register_forward_pre_hook(lambda module, inputs: see(inputs[0]))
        return handle

    def channels(self, model: nn.Module) -> list[int]:
        return detector.feature_channels(model)

    def taps(self, model: nn.Module, layers: Sequence[int], who: str) -> Taps:
        return Taps(model, layers, who)

    def teacher(
        self,
        model: nn.Module,
        device: torch.device,
        layers: Sequence[int] = (),
        frozen: bool = True,
        dtype: torch.dtype | None = None,
    ) -> detector.Teacher:
        return detector.Teacher(model, device, layers, frozen, dtype)

    def pair(self, teacher: TeacherNetwork, student: Any, names: Sequence[str], prediction: str) -> Pairing:
        assert isinstance(teacher, detector.Teacher)
        return pair(teacher, student.model[-1], names, prediction)
