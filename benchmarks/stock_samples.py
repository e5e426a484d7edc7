"""Ultralytics' own data set over the same rows, boxes and settings as ours: what our samples are held against."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from ultralytics.cfg import get_cfg
from ultralytics.data.dataset import YOLODataset

from dfssd.config import Train
from dfssd.data.manifest import Boxes, Row


class StockSet(YOLODataset):
    """`YOLODataset` without label files.

    Args:
        train: settings of a training set; None: a validation set as of `yolo val`.
        everywhere: mosaic partners come from the whole set, as with cache="ram", and not from what was loaded last; images
            are then kept in memory.
    """

    def __init__(
        self, rows: Sequence[Row], boxes: Sequence[Boxes], names: Sequence[str], imgsz: int, train: Train | None = None,
        everywhere: bool = True,
    ) -> None:  # fmt: skip
        self._rows, self._boxes = rows, boxes
        settings: dict[str, Any] = {"task": "detect"}
        if train is not None:
            settings |= {k: getattr(train, k) for k in ("mosaic", "mixup", "scale", "translate", "fliplr", "flipud")}
            settings |= dict(zip(("hsv_h", "hsv_s", "hsv_v"), train.hsv, strict=True))
        data = {"names": dict(enumerate(names)), "nc": len(names), "channels": 3}
        super().__init__(
            img_path="rows", imgsz=imgsz, batch_size=16, augment=train is not None, hyp=get_cfg(overrides=settings),
            rect=train is None, cache=None, stride=32, pad=0.0 if train else 0.5, data=data,
        )  # fmt: skip
        if train is not None and everywhere:
            self.cache, self._kept = "ram", {}
            self.transforms = self.build_transforms(get_cfg(overrides=settings))

    def get_img_files(self, img_path: str | list[str]) -> list[str]:
        return [row.uri for row in self._rows]

    def get_labels(self) -> list[dict[str, Any]]:
        return [
            {"im_file": r.uri, "shape": (r.height, r.width), "cls": b[:, :1], "bboxes": b[:, 1:5], "segments": [],
             "keypoints": None, "normalized": True, "bbox_format": "xywh"}
            for r, b in zip(self._rows, self._boxes, strict=True)
        ]  # fmt: skip

    def load_image(self, i: int, *args: Any, **kwargs: Any) -> Any:
        if self.cache != "ram":
            return super().load_image(i, *args, **kwargs)
        if i not in self._kept:
            self._kept[i] = super().load_image(i, *args, **kwargs)
        return self._kept[i]

    def seeded(self, index: int, seed: int) -> dict[str, Any]:
        """The sample that Ultralytics makes after its generators were set to `seed`."""
        random.seed(seed)
        np.random.seed(seed)
        return dict(self[index])
