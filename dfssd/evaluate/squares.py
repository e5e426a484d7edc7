"""Any detector on any pictures, as a line would run it: decode, letterbox to a square, detect, boxes back to the picture.

`validation.collect` measures with the rectangular batches of `yolo val` (whose edges are wider even for square pictures);
exported models have a fixed square input. Scores of the two differ, so whatever is decided by a score that travels to the
line is measured here: operating point, escapes, rejects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from dfssd.data.boxes import CLS, DET_CLS, LABEL_COLUMNS, WH, XY, XYXY
from dfssd.data.dataset import decode
from dfssd.data.manifest import Row
from dfssd.evaluate.validation import record
from dfssd.line.detector import LineDetector, letterbox, network_input
from dfssd.models.families import predict
from dfssd.models.nms import CONF, MAX_BOXES, NMS_IOU, suppress

# (B,3,S,S) float32 0..1 RGB -> one (n,6) [x1, y1, x2, y2 px of the input, score, class] a picture.
SquareDetect = Callable[[np.ndarray], list[np.ndarray]]
BATCH = 16


def network(model: nn.Module, conf: float = CONF) -> SquareDetect:
    """A torch detector in fp32, on the device that it lies on."""
    device = next(model.parameters()).device

    @torch.no_grad()
    def detect(images_bchw: np.ndarray) -> list[np.ndarray]:
        found = predict(model, torch.from_numpy(images_bchw).to(device), conf, NMS_IOU, MAX_BOXES)
        return [f.cpu().numpy() for f in found]

    return detect


def exported(detector: LineDetector, conf: float = CONF) -> SquareDetect:
    """An exported model; its raw output goes through the NMS that the torch detector has."""

    def detect(images_bchw: np.ndarray) -> list[np.ndarray]:
        if detector.inside:
            return detector.boxes_of_input(images_bchw, conf)
        raw = torch.from_numpy(detector.raw(images_bchw))
        return [f.numpy() for f in suppress(raw, conf, NMS_IOU, MAX_BOXES)]

    return detect


def collect_squares(
    detect: SquareDetect, rows: Sequence[Row], imgsz: int, known: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """Records (see `validation.record`) of a detector on pictures with labels.

    Args:
        known: (classes of the detector,) class id in the rows' numbering, -1 for a class they do not have; none: the same.
    """
    records = []
    for first in range(0, len(rows), BATCH):
        part = rows[first : first + BATCH]
        ready = [letterbox(decode(row.uri, white=row.white), imgsz) for row in part]
        found = detect(network_input([square for square, _, _ in ready]))
        for row, boxes, (_, gain, edge) in zip(part, found, ready, strict=True):
            own = boxes.astype(np.float32).copy()
            if known is not None:
                own[:, DET_CLS] = known[own[:, DET_CLS].astype(int)]
                own = own[own[:, DET_CLS] >= 0]
            own[:, XYXY] = (own[:, XYXY] - np.tile(edge, 2)) / np.tile(gain, 2)
            labels = np.zeros((0, LABEL_COLUMNS), np.float32) if row.boxes is None else row.boxes
            centre, half = labels[:, XY] * [row.width, row.height], labels[:, WH] * [row.width, row.height] / 2
            truth = torch.from_numpy(np.concatenate([centre - half, centre + half], 1).astype(np.float32))
            one = record(torch.from_numpy(own), torch.from_numpy(labels[:, CLS].astype(np.float32)), truth, row.uri)
            extra = {"image_id": row.image_id, "group": row.group, "size": (row.width, row.height)}
            records.append({**one, **extra})
    return records
