"""A detector as ONNX: any batch size, NMS inside or outside, the operating point in its metadata.

`yolo predict model=student.onnx` reads the same file (without NMS inside): names, stride, size and task are written where
Ultralytics looks for them.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from ultralytics.utils.ops import xywh2xyxy

from dfssd.data.boxes import CLASS_SCORES
from dfssd.models.families import class_names, family_of
from dfssd.models.nms import NMS_IOU

OPSET = 17
INSIDE_CONF = 0.01  # least score of a box that a model with NMS inside gives out; operating points lie above


class Inside(nn.Module):
    """(n,7) [picture, x1, y1, x2, y2 px of the input, score, class] after NMS, of all pictures of a batch.

    Boxes of other classes and pictures are moved apart, so that one NMS serves any batch; a loop over pictures would fix the
    batch size in the graph. The shift is as small as may be: in float32 one of 7680 px a class
    rounds boxes to a thousandth of a pixel.

    Args:
        decoder: gives (B,4+C,A), see `Family.decoder`.
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, images: Tensor) -> Tensor:
        output = self.decoder(images)
        scores_bac = output[:, CLASS_SCORES].transpose(1, 2)
        picture, anchor, cls = (scores_bac > INSIDE_CONF).nonzero(as_tuple=True)
        xyxy = xywh2xyxy(output.transpose(1, 2)[picture, anchor, :4])
        score = scores_bac[picture, anchor, cls]
        place = (picture * scores_bac.shape[2] + cls).to(xyxy.dtype)[:, None] * (2.0 * images.shape[3])
        kept = torchvision.ops.nms(xyxy + place, score, NMS_IOU)
        columns = [picture[kept, None].float(), xyxy[kept], score[kept, None], cls[kept, None].float()]
        return torch.cat(columns, 1)


def onnx_bytes(model: nn.Module, imgsz: int, metadata: Mapping[str, Any], nms_inside: bool = False) -> bytes:
    """Content of an .onnx file: input `images` (batch,3,imgsz,imgsz) float32 0..1 RGB.

    Args:
        model: in eval mode, fused, on the CPU.
        metadata: JSON-ready, kept under "dfssd".
    """
    import onnx

    decoder = family_of(model).decoder(model)
    wrapped = (Inside(decoder) if nms_inside else decoder).eval()
    buffer = io.BytesIO()
    output = {0: "boxes" if nms_inside else "batch"}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of shapes that are meant to be constant
        torch.onnx.export(
            wrapped,
            (torch.zeros(2, 3, imgsz, imgsz),),
            buffer,  # type: ignore[arg-type]  # a stream is taken too
            opset_version=OPSET,
            input_names=["images"],
            output_names=["output0"],
            dynamic_axes={"images": {0: "batch"}, "output0": output},
            dynamo=False,
        )
    graph = onnx.load_from_string(buffer.getvalue())
    names = dict(enumerate(class_names(model)))
    known = {"names": str(names), "stride": "32", "imgsz": str([imgsz, imgsz]), "task": "detect", "batch": "1"}
    known |= {"nms": str(nms_inside), "dfssd": json.dumps({**metadata, "nms_inside": nms_inside})}
    for key, value in known.items():
        entry = graph.metadata_props.add()
        entry.key, entry.value = key, value
    return bytes(graph.SerializeToString())
