"""From images to boxes: forward pass, decoding in float32, NMS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules.head import Detect

from dfssd.models.nms import suppress


def predict(
    model: nn.Module, images_bchw: Tensor, conf: float, iou: float, most: int, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Boxes after NMS, one (n,6) tensor [x1, y1, x2, y2 px of the input, score, class] an image.

    Args:
        conf: least score.
        iou: overlap above which two boxes of a class are one.
        most: boxes an image.
        dtype: precision of the network under autocast; None: as weights and images are. Boxes are decoded in float32
            whatever it is: in bf16 a coordinate of 150 px would be off by up to half a pixel.
    """
    with torch.autocast(images_bchw.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        output = _raw(model, images_bchw)
    boxes = _decode(model, output)
    return suppress(boxes, conf, iou, most, end2end=bool(getattr(model, "end2end", False)))


def _raw(model: nn.Module, images_bchw: Tensor) -> Any:
    """The model's output, not yet decoded where its head is Ultralytics' own.

    Only the head's own flag is set to training, which leaves batch norm in eval mode.
    """
    head = _head(model)
    if head is None:
        return model(images_bchw)
    head.training = True
    try:
        return model(images_bchw)
    finally:
        head.training = False


def _decode(model: nn.Module, output: Any) -> Tensor:
    """(B,4+C,A) float32 boxes and scores, or (B,n,6) of an end-to-end head."""
    head = _head(model)
    if head is None:
        boxes: Tensor = output[0] if isinstance(output, tuple) else output
        return boxes.float()
    raw = output["one2one" if head.end2end else "one2many"] if "one2one" in output else output
    # Of the features only shape and type are looked at: anchor points are made in their type.
    shapes = [f.new_empty((), dtype=torch.float32).expand(f.shape) for f in raw["feats"]]
    decoded: Tensor = head._inference({"boxes": raw["boxes"].float(), "scores": raw["scores"].float(), "feats": shapes})
    return head.postprocess(decoded.permute(0, 2, 1)) if head.end2end else decoded


def _head(model: nn.Module) -> Detect | None:
    layers = getattr(model, "model", None)
    head = layers[-1] if isinstance(layers, nn.Sequential) else None
    return head if isinstance(head, Detect) else None


class Decoder(nn.Module):
    """(B,4+C,A) decoded boxes and scores, or an end-to-end head's (B,n,6), in the form that ONNX can hold."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        head: Any = _head(self.model)
        before = {key: getattr(head, key) for key in ("export", "format") if hasattr(head, key)}
        head.export, head.format = True, "onnx"
        try:
            output = self.model(images)
        finally:
            for key, value in before.items():
                setattr(head, key, value)
        boxes: Tensor = output[0] if isinstance(output, tuple) else output
        return boxes


def decoding(convolutions: Sequence[str]) -> list[str]:
    """Names of the convolutions of an exported graph (that of `Decoder`) which end its head, or add up the bins."""
    head = max((int(n.split("/model.")[-1].split("/")[0]) for n in convolutions if "/model." in n), default=-1)
    own = [n for n in convolutions if f"/model.{head}/" in n]
    return [n for n in own if "dfl" in n or n.endswith(".2/Conv")]
