"""From images to boxes: forward pass and NMS."""

from __future__ import annotations

from torch import Tensor, nn
from ultralytics.utils import nms

CONF, NMS_IOU, MAX_BOXES = 0.001, 0.7, 300  # the defaults of `yolo val`


def predict(model: nn.Module, images_bchw: Tensor, conf: float, iou: float, most: int) -> list[Tensor]:
    """Boxes after NMS, one (n,6) tensor [x1, y1, x2, y2 px of the input, score, class] an image.

    Ultralytics' NMS gives up after a wall-clock limit and returns what it has; the limit is set far out of reach.
    """
    output = model(images_bchw)
    boxes = output[0] if isinstance(output, tuple) else output
    found = nms.non_max_suppression(
        boxes.float(),
        conf,
        iou,
        multi_label=True,
        max_det=most,
        max_time_img=60.0,
        end2end=bool(getattr(model, "end2end", False)),
    )
    return [f[:, :6] for f in found]
