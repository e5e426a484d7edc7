"""Detection metrics on a set of images, equal to what `yolo val` measures on the same weights.

Rectangular batches, NMS and matching are Ultralytics'; only the loop is ours, so that workers can share the images.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from ultralytics.engine.validator import BaseValidator
from ultralytics.utils import ops
from ultralytics.utils.metrics import DetMetrics, box_iou

from dfssd.data.dataset import ManifestDataset, network_input
from dfssd.data.loaders import validation_batches
from dfssd.errors import DfssdError
from dfssd.models.predict import CONF, MAX_BOXES, NMS_IOU, predict
from dfssd.runtime.worker_group import WorkerGroup

IOU_LEVELS = torch.linspace(0.5, 0.95, 10)


def validate(
    model: nn.Module,
    dataset: ManifestDataset,
    names: dict[int, str],
    world: WorkerGroup,
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
    return summarise(collect(model, dataset, world, device), names)


@torch.no_grad()
def collect(
    model: nn.Module, dataset: ManifestDataset, world: WorkerGroup, device: torch.device
) -> list[dict[str, Any]]:
    """What matched what on each image, of all workers: scores, classes and hits at ten IoU levels."""
    stats: list[dict[str, Any]] = []
    for batch in validation_batches(dataset, world.rank, world.size, device):
        images = network_input(batch["img"], device)
        found = predict(model, images, CONF, NMS_IOU, MAX_BOXES)
        height, width = images.shape[2:]
        for k, boxes in enumerate(found):
            mine = batch["batch_idx"] == k
            truth = ops.xywh2xyxy(batch["bboxes"][mine]) * torch.tensor([width, height, width, height])
            stats.append(_match(boxes.cpu(), batch["cls"][mine], truth, batch["im_file"][k]))
    return [one for part in world.gather(stats) for one in part]


def _match(found: Tensor, classes: Tensor, truth_xyxy: Tensor, name: str) -> dict[str, Any]:
    """What Ultralytics' metrics want to know of one image."""
    hits = np.zeros((len(found), len(IOU_LEVELS)), bool)
    if len(found) and len(classes):
        judge = SimpleNamespace(iouv=IOU_LEVELS)
        iou = box_iou(truth_xyxy, found[:, :4])
        hits = BaseValidator.match_predictions(judge, found[:, 5], classes, iou).numpy()
    target = classes.numpy()
    return {
        "tp": hits,
        "conf": found[:, 4].float().numpy(),
        "pred_cls": found[:, 5].float().numpy(),
        "target_cls": target,
        "target_img": np.unique(target),
        "im_name": name,
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
