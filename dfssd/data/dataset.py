"""Images and boxes of a manifest as training and validation samples.

A box travels through the augmentations as (class, score, agreement); for labels of people score and agreement are 1.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dfssd.data.augment import Plan, Recipe, draw_plan, make_sample
from dfssd.data.boxes import AGREEMENT, CLS, SCORE, XYWH
from dfssd.data.cache import DiskCache
from dfssd.data.decoded import DecodedCache
from dfssd.data.letterbox import letterboxed
from dfssd.data.reading import Images, decode, disk_cache, shrink
from dfssd.data.sampling import Draw
from dfssd.data.strong_view import strong_view

if TYPE_CHECKING:  # what a loading process does not need, it does not import
    from dfssd.config import Train
    from dfssd.data.manifest import Boxes, Row

__all__ = ["decode", "disk_cache", "shrink"]  # from dfssd.data.reading

Sample = dict[str, Any]
VAL_BATCH = 16  # as in `yolo val`: with rectangular batches the batch size is part of the measurement
VAL_PAD, STRIDE = 0.5, 32  # of `yolo val`: strides that a batch is larger than its images; of the coarsest grid (px)


class BoxTable:
    """(n,5) labels or (n,7) candidates of many images in two tensors; None counts as no box."""

    def __init__(self, boxes: Sequence[Boxes | None]) -> None:
        full = [_seven(b) for b in boxes]
        flat = np.concatenate(full) if full else np.zeros((0, 7), np.float32)
        self._flat = torch.from_numpy(flat)
        self._ends = torch.from_numpy(np.cumsum([0, *(len(b) for b in full)]).astype(np.int64))

    def __getitem__(self, i: int) -> np.ndarray:
        """(n,7) [cls, cx, cy, w, h, score, agreement]."""
        first, last = self._ends[i : i + 2].tolist()
        return np.asarray(self._flat.numpy()[first:last])


def _seven(boxes: Boxes | None) -> np.ndarray:
    own = np.zeros((0, 7), np.float32) if boxes is None else boxes
    if own.shape[1] == 5:
        own = np.concatenate([own, np.ones((len(own), 2))], 1)
    return np.asarray(own, np.float32)


class TrainingSet:
    """Rows of a manifest as augmented samples.

    Args:
        rows: images, in the order in which indices count them.
        boxes: for each row (n,5) labels or (n,7) candidates; None counts as no box.
        train: training settings.
        files: where files from an object store are kept.
        decoded: where pixels are kept.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        boxes: Sequence[Boxes | None],
        train: Train,
        files: DiskCache | None = None,
        decoded: DecodedCache | None = None,
    ) -> None:
        self.images, self.boxes = Images(rows, train.imgsz, files, decoded), BoxTable(boxes)
        own = {name: getattr(train, name) for name in Recipe._fields}
        self.recipe, self.side = Recipe(**own), train.imgsz

    def __len__(self) -> int:
        return len(self.images)

    @property
    def remote(self) -> bool:
        return self.images.remote

    def plan(self, index: int, seed: int, mosaic: bool) -> Plan:
        return draw_plan(index, len(self), seed, self.side, self.recipe, mosaic)

    def augmented(self, index: int, seed: int, mosaic: bool) -> Sample:
        """One training sample; equal arguments give an equal sample, whatever was loaded before.

        Returns:
            img: (3,side,side) or, where everything in it is grey, (1,side,side) uint8 RGB, channels last in memory.
            cls: (n,3) class, score, agreement. bboxes: (n,4) cx, cy, w, h, 0..1. im_file.
        """
        plan = self.plan(index, seed, mosaic)
        image, boxes = make_sample(plan, self.side, self.images.size, self.images.load, self.boxes.__getitem__)
        return _sample(image, boxes) | {"im_file": self.images.uri(index)}


def _sample(image: np.ndarray, boxes: np.ndarray) -> Sample:
    pixels = torch.from_numpy(image if image.ndim == 3 else image[..., None]).permute(2, 0, 1)
    return {
        "img": pixels,
        "cls": torch.from_numpy(boxes[:, [CLS, SCORE, AGREEMENT]]),
        "bboxes": torch.from_numpy(boxes[:, XYWH]),
    }


class ManifestDataset(torch.utils.data.Dataset):
    """Rows of a manifest as validation samples: not augmented, in the rectangular batches of `yolo val`.

    Images of like shape share a batch, which is as high and wide as they need; a test holds pixels and boxes against
    Ultralytics' `YOLODataset(rect=True, pad=0.5)`.

    Args:
        rows: images.
        boxes: for each row (n,5) labels; None counts as no box.
        names: class names.
        imgsz: long side of the network's input (px), before padding.
        files: where files from an object store are kept.
        decoded: where pixels are kept.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        boxes: Sequence[Boxes | None],
        names: Sequence[str],
        imgsz: int,
        files: DiskCache | None = None,
        decoded: DecodedCache | None = None,
    ) -> None:
        self.names = dict(enumerate(names))
        tall = np.array([row.height / row.width for row in rows])
        order = tall.argsort().tolist()  # as Ultralytics sorts, so that batches hold the same images
        self.rows = [rows[i] for i in order]  # by index
        self.images = Images(self.rows, imgsz, files, decoded)
        self.boxes = BoxTable([boxes[i] for i in order])
        parts = [tall[order[k : k + VAL_BATCH]] for k in range(0, len(rows), VAL_BATCH)]
        shapes = [[p.max(), 1] if p.max() < 1 else [1, 1 / p.min()] if p.min() > 1 else [1, 1] for p in parts]
        high_wide = np.ceil(np.array(shapes).reshape(-1, 2) * imgsz / STRIDE + VAL_PAD).astype(int) * STRIDE
        self.batch_shapes = high_wide.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getstate__(self) -> dict[str, Any]:
        """What loading processes get: not the rows themselves."""
        return {**vars(self), "rows": []}

    def __getitem__(self, index: int) -> Sample:
        """One sample, as `TrainingSet.augmented`; img has the shape of its batch, `letterbox` says where in it."""
        small = self.images.load(index)
        image, letterbox = letterboxed(small, self.batch_shapes[index // VAL_BATCH], enlarge=False)
        boxes = self.boxes[index].copy()
        boxes[:, XYWH] = letterbox.boxes_in(boxes[:, XYWH])
        width, height = self.images.sizes_wh[index].tolist()
        return _sample(image, boxes) | {
            "im_file": self.images.uri(index),
            "letterbox": letterbox._replace(image_wh=(width, height)),
        }

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of a batch, whose images are fetched together."""
        self.images.fetch(indices)
        samples = [self[i] for i in indices]
        self.images.forget()
        return samples

    def batches(self, rank: int = 0, world_size: int = 1) -> list[list[int]]:
        """Batches in rectangular order; each rank takes every `world_size`-th one."""
        firsts = range(rank * VAL_BATCH, len(self), world_size * VAL_BATCH)
        return [list(range(first, min(first + VAL_BATCH, len(self)))) for first in firsts]


class Streams(torch.utils.data.Dataset):
    """The labelled and the unlabelled training images; an item is named by a `Draw`.

    Args:
        strong: strength of a strong view of each unlabelled image beside the weak one, as `img_strong`; 0: none.
    """

    def __init__(self, streams: dict[str, TrainingSet], strong: float = 0.0) -> None:
        self.streams, self.strong = streams, strong

    def __getitem__(self, draw: Draw) -> Sample:
        sample = self.streams[draw.stream].augmented(draw.image, draw.seed, draw.mosaic)
        if self.strong and draw.stream == "unlabelled":
            weak = sample["img"].permute(1, 2, 0).numpy()
            sample["img_strong"] = torch.from_numpy(strong_view(weak, draw.seed, self.strong)).permute(2, 0, 1)
        return sample

    def __getitems__(self, draws: Sequence[Draw]) -> list[Sample]:
        """The samples of a batch, whose images are fetched together; the first one says how long it took, as `load_s`."""
        begun = time.perf_counter()
        for name, stream in self.streams.items():
            if stream.remote:
                own = (stream.plan(d.image, d.seed, d.mosaic).images for d in draws if d.stream == name)
                stream.images.fetch(chain.from_iterable(own))
        samples = [self[draw] for draw in draws]
        for stream in self.streams.values():
            stream.images.forget()
        samples[0]["load_s"] = time.perf_counter() - begun
        return samples


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Stack samples.

    Returns:
        img: (B,3,H,W) or, where all are grey, (B,1,H,W) uint8 RGB, channels last in memory. cls, score, agreement,
        batch_idx: (N,). bboxes: (N,4) cx, cy, w, h, 0..1. im_file: list. Where samples have them: img_strong as img,
        letterbox: list, load_s.
    """
    columns = [s["cls"] for s in samples]
    index = [torch.full((len(c),), float(i)) for i, c in enumerate(columns)]
    cls, score, agreement = torch.cat(columns).float().unbind(1)
    batch: dict[str, Any] = {
        "img": stack([s["img"] for s in samples]),
        "cls": cls,
        "score": score,
        "agreement": agreement,
        "bboxes": torch.cat([s["bboxes"] for s in samples]).float(),
        "batch_idx": torch.cat(index),
        "im_file": [s["im_file"] for s in samples],
    }
    strong = [s["img_strong"] for s in samples if "img_strong" in s]
    if strong:
        batch["img_strong"] = stack(strong)
    if "load_s" in samples[0]:
        batch["load_s"] = samples[0]["load_s"]
    if "letterbox" in samples[0]:
        batch["letterbox"] = [s["letterbox"] for s in samples]
    return batch


def stack(images_chw: Sequence[Tensor]) -> Tensor:
    """(B,C,H,W), channels last in memory; in a loading process written straight into shared memory."""
    _, height, width = images_chw[0].shape
    shape = (len(images_chw), height, width, max(len(image) for image in images_chw))
    if torch.utils.data.get_worker_info() is None:
        out = torch.empty(shape, dtype=torch.uint8)
    else:  # as PyTorch's own collate does
        count = int(np.prod(shape))
        storage = torch.UntypedStorage._new_shared(count)
        out = torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]
    for row, image in zip(out, images_chw, strict=True):
        row.copy_(image.permute(1, 2, 0))  # grey among colour: the one channel goes into all three
    return out.permute(0, 3, 1, 2)


def network_input(images_uint8: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B,3,H,W) 0..1, channels last; of (B,1,H,W) three times the one channel.

    Args:
        dtype: half precision gives what rounding the float32 values gives, without making them.
    """
    images = images_uint8.to(device, non_blocking=True)
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    return images.to(dtype, memory_format=torch.channels_last).div_(255)
