"""Detection metrics on a set of images, equal to what `yolo val` measures on the same weights.

Rectangular batches, NMS and matching are Ultralytics'; only the loop is ours, so that workers can share the images.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from ultralytics.engine.validator import BaseValidator
from ultralytics.utils import ops
from ultralytics.utils.metrics import DetMetrics, box_iou

from dfssd.data.boxes import DET_CLS, DET_SCORE, XYXY
from dfssd.data.dataset import ManifestDataset, network_input
from dfssd.data.loaders import validation_batches
from dfssd.errors import DfssdError
from dfssd.models.families import predict
from dfssd.models.nms import CONF, MAX_BOXES, NMS_IOU
from dfssd.runtime.worker_group import WorkerGroup

IOU_LEVELS = torch.linspace(0.5, 0.95, 10)

# A detector, whatever it runs in: (B,3,H,W) images 0..1 -> one (n,6) [x1, y1, x2, y2 px of the input, score, class] each.
Detect = Callable[[Tensor], list[Tensor]]


def detecting(model: nn.Module) -> Detect:
    """A network with NMS as a detector, with the settings of `yolo val`."""
    return lambda images: predict(model, images, CONF, NMS_IOU, MAX_BOXES)


def validate(
    model: nn.Module,
    dataset: ManifestDataset,
    names: dict[int, str],
    workers: WorkerGroup,
    device: torch.device,
) -> dict[str, Any]:
    """Metrics of a detector in eval mode; every worker measures its share and all get the result.

    Always in fp32: decoded in bf16, a coordinate of 150 px would be off by up to half a pixel.

    Returns:
        map50, map50_95, precision, recall (all classes, at the score of best F1), and by class name map50, map50_95,
        boxes.

    Raises:
        DfssdError: the set has no box to find.
    """
    return summarise(collect(detecting(model), dataset, workers, device), names)


@torch.no_grad()
def collect(
    detect: Detect, dataset: ManifestDataset, workers: WorkerGroup, device: torch.device
) -> list[dict[str, Any]]:
    """What matched what on each image, of all workers: one record (see `record`) an image."""
    stats: list[dict[str, Any]] = []
    rows = {row.uri: row for row in dataset.rows}
    for batch in validation_batches(dataset, workers.rank, workers.size, device):
        images = network_input(batch["img"], device)
        found = detect(images)
        height, width = images.shape[2:]
        for k, boxes in enumerate(found):
            mine = batch["batch_idx"] == k
            truth = ops.xywh2xyxy(batch["bboxes"][mine]) * torch.tensor([width, height, width, height])
            one = record(boxes.cpu(), batch["cls"][mine], truth, batch["im_file"][k])
            row = rows[batch["im_file"][k]]
            for key in ("boxes", "truth"):
                one[key] = batch["letterbox"][k].pixels_out(one[key])
            stats.append({**one, "image_id": row.image_id, "group": row.group, "size": (row.width, row.height)})
    return [one for part in workers.gather(stats) for one in part]


def record(found: Tensor, classes: Tensor, truth_xyxy: Tensor, name: str) -> dict[str, Any]:
    """Detections of one image against its labels.

    Args:
        found: (n,6) [x1, y1, x2, y2, score, class]; truth_xyxy: (m,4) in the same pixels; classes: (m,).

    Returns:
        tp (n,10) bool by IoU level, conf (n,), pred_cls (n,), target_cls (m,), boxes (n,4), truth (m,4), im_name; `collect`
        adds image_id, group, size (width, height px), and gives boxes and truth in pixels of the picture.
    """
    hits = np.zeros((len(found), len(IOU_LEVELS)), bool)
    if len(found) and len(classes):
        judge = SimpleNamespace(iouv=IOU_LEVELS)
        iou = box_iou(truth_xyxy, found[:, XYXY])
        hits = BaseValidator.match_predictions(judge, found[:, DET_CLS], classes, iou).numpy()
    target = classes.numpy()
    return {
        "tp": hits,
        "conf": found[:, DET_SCORE].float().numpy(),
        "pred_cls": found[:, DET_CLS].float().numpy(),
        "target_cls": target,
        "target_img": np.unique(target),
        "im_name": name,
        "boxes": found[:, XYXY].float().numpy(),
        "truth": truth_xyxy.float().numpy(),
    }


def summarise(stats: list[dict[str, Any]], names: dict[int, str]) -> dict[str, Any]:
    """Metrics from the matches of all images."""
    if not any(len(s["target_cls"]) for s in stats):
        raise DfssdError(
            "the images to validate on hold no box at all",
            todo="label defects in the val and test images, or check that their labels are found",
        )
    metrics = DetMetrics(names)
    for one in stats:
        metrics.update_stats(one)
    metrics.process(plot=False)
    result = metrics.results_dict
    by_class = {}
    for k, c in enumerate(metrics.ap_class_index):
        _, _, map50, map50_95 = metrics.class_result(k)
        count = sum(int((s["target_cls"] == c).sum()) for s in stats)
        by_class[names[int(c)]] = {"map50": float(map50), "map50_95": float(map50_95), "boxes": count}
    return {
        "map50": float(result["metrics/mAP50(B)"]),
        "map50_95": float(result["metrics/mAP50-95(B)"]),
        "precision": float(result["metrics/precision(B)"]),
        "recall": float(result["metrics/recall(B)"]),
        "by_class": by_class,
    }
