"""From decoded boxes to the ones that stay: NMS.

It is torchvision's. Ultralytics takes it only in a process that has imported torchvision, and elsewhere a loop in Python,
ten times slower: hence the import in `suppress`, where every process that looks for boxes comes by. It takes a second of a
core, which commands that look for none do not spend.
"""

from __future__ import annotations

import torch
from torch import Tensor
from ultralytics.utils import nms
from ultralytics.utils.ops import xywh2xyxy

from dfssd.data.boxes import CLASS_SCORES, DETECTION

CONF, NMS_IOU, MAX_BOXES = 0.001, 0.7, 300  # the defaults of `yolo val`
ONE_NMS = 30_000  # boxes: their overlaps take 113 MB as bits; Ultralytics' limit for one image too
APART = 7680.0  # px between boxes of different classes or images, which then do not overlap; as in Ultralytics


def suppress(boxes_bca: Tensor, conf: float, iou: float, most: int, end2end: bool = False) -> list[Tensor]:
    """NMS of a batch: (B,4+C,A) decoded boxes [cx, cy, w, h px, scores], or (B,n,6) of an end-to-end head.

    On a GPU all images go through one NMS, with three waits for the device; image by image there are some four an image.
    A CPU waits for nothing, and its NMS is quicker on few boxes. Ultralytics' NMS gives up after a wall-clock limit and
    returns what it has; the limit is set far out of reach.
    """
    import torchvision  # noqa: F401  # for Ultralytics to find

    if boxes_bca.device.type != "cpu" and not end2end:
        found = suppress_together(boxes_bca, conf, iou, most)
        if found is not None:
            return found
    found = nms.non_max_suppression(
        boxes_bca.float(), conf, iou, multi_label=True, max_det=most, max_time_img=60.0, end2end=end2end
    )
    return [f[:, DETECTION] for f in found]


def suppress_together(boxes_bca: Tensor, conf: float, iou: float, most: int) -> list[Tensor] | None:
    """The same for all images at once: their boxes are moved apart, in float64 so that no overlap changes by it.

    Returns:
        (n,6) for each image, best score first; None where there are too many boxes for one NMS.
    """
    import torchvision

    count, classes = len(boxes_bca), boxes_bca.shape[1] - 4
    scores_bac = boxes_bca[:, CLASS_SCORES].float().transpose(1, 2)
    image, anchor, cls = (scores_bac > conf).nonzero(as_tuple=True)
    if len(image) > ONE_NMS:
        return None
    xyxy = xywh2xyxy(boxes_bca[image, :4, anchor].float())
    score = scores_bac[image, anchor, cls]
    place = (image * classes + cls).double()[:, None] * APART
    kept = torchvision.ops.nms(xyxy.double() + place, score.double(), iou)
    kept = kept[image[kept].argsort(stable=True)]  # by image, and within it by score still
    columns = [xyxy[kept], score[kept, None], cls[kept, None].float()]
    each = torch.bincount(image[kept], minlength=count).tolist()
    return [own[:most] for own in torch.cat(columns, 1).split(each)]
