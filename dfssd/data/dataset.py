"""Images and boxes of a manifest as training and validation samples, augmented by Ultralytics.

Labels stay in memory; no txt and no cache file is written. A box travels through the augmentations as
(class, score, agreement); for labels of people score and agreement are 1.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from ultralytics.cfg import get_cfg
from ultralytics.data.augment import Compose, Mosaic
from ultralytics.data.dataset import YOLODataset

from dfssd.config import Train
from dfssd.data.cache import DiskCache
from dfssd.data.manifest import Boxes, Row
from dfssd.data.sampling import Draw
from dfssd.data.strong_view import strong_view
from dfssd.errors import DfssdError
from dfssd.runtime.storage import is_remote, read_uri, side_by_side

Sample = dict[str, Any]
VAL_BATCH = 16  # as in `yolo val`: with rectangular batches the batch size is part of the measurement


def disk_cache(train: Train) -> DiskCache | None:
    """The cache that the settings ask for."""
    return DiskCache(train.cache_dir, train.cache_dir_gib) if train.cache_dir else None


def decode(uri: str, cache: DiskCache | None = None) -> np.ndarray:
    """(H,W,3) uint8 BGR, turned as its EXIF data says.

    Raises:
        DfssdError: the image was there when `prepare` looked, and is not readable now.
    """
    try:
        data = cache.read(uri) if cache else read_uri(uri)
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except (OSError, cv2.error) as error:
        raise DfssdError(f"image cannot be read: {error}", where=uri, todo=_MOVED) from error
    if image is None:
        raise DfssdError("image cannot be decoded", where=uri, todo=_MOVED)
    return np.asarray(image)


_MOVED = "it was fine when prepare ran: bring it back, or run prepare again under a new --run-name"


def shrink(image_hwc: np.ndarray, imgsz: int) -> np.ndarray:
    """Scale the long side to `imgsz` (px), as Ultralytics does when it loads an image."""
    height, width = image_hwc.shape[:2]
    ratio = imgsz / max(height, width)
    if ratio == 1:
        return image_hwc
    size = min(int(np.ceil(width * ratio)), imgsz), min(int(np.ceil(height * ratio)), imgsz)
    return np.asarray(cv2.resize(image_hwc, size, interpolation=cv2.INTER_LINEAR))


class ManifestDataset(YOLODataset):
    """Rows of a manifest behind Ultralytics' dataset interface.

    Args:
        rows: images, in the order in which indices count them.
        boxes: for each row (n,5) labels or (n,7) candidates; None counts as no box.
        names: class names.
        train: training settings; None makes a validation set (rectangular batches, no augmentation).
        imgsz: side of the network input (px).
        cache_gib: memory for decoded images (GiB); the least recently used ones go first.
        disk: where files from an object store are kept.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        boxes: Sequence[Boxes | None],
        names: Sequence[str],
        imgsz: int,
        train: Train | None = None,
        cache_gib: float = 1.0,
        disk: DiskCache | None = None,
    ) -> None:
        self._disk = disk
        self._rows, self._boxes = list(rows), list(boxes)
        self.remote = any(is_remote(row.uri) for row in rows)
        self._cached: OrderedDict[int, tuple[np.ndarray, tuple[int, int]]] = OrderedDict()
        self._fetched: dict[int, tuple[np.ndarray, tuple[int, int]]] = {}  # of the batch that is being made
        self._cached_bytes, self._cache_limit = 0, int(cache_gib * 2**30)
        data = {"names": dict(enumerate(names)), "nc": len(names), "channels": 3}
        super().__init__(
            img_path="manifest",
            imgsz=imgsz,
            batch_size=VAL_BATCH,
            augment=train is not None,
            hyp=_hyp(train),
            rect=train is None,
            cache=None,
            stride=32,
            pad=0.0 if train else 0.5,
            data=data,
        )
        if train is None:
            return
        self.cache = "ram"  # mosaic partners come from the whole set, not from what happened to be loaded last
        self.with_mosaic = self.build_transforms(_hyp(train))
        self._mosaic = _first_mosaic(self.with_mosaic)
        self.without_mosaic = self.build_transforms(_hyp(train.model_copy(update={"mosaic": 0.0, "mixup": 0.0})))

    def get_img_files(self, img_path: str | list[str]) -> list[str]:
        return [row.uri for row in self._rows]

    def get_labels(self) -> list[dict[str, Any]]:
        labels: list[dict[str, Any]] = []
        for row, boxes in zip(self._rows, self._boxes, strict=True):
            own = np.zeros((0, 5), np.float32) if boxes is None else boxes
            extra = own[:, 5:7] if own.shape[1] == 7 else np.ones((len(own), 2), np.float32)
            labels.append(
                {
                    "im_file": row.uri,
                    "shape": (row.height, row.width),
                    "cls": np.concatenate([own[:, :1], extra], 1).astype(np.float32),
                    "bboxes": own[:, 1:5].astype(np.float32),
                    "segments": [],
                    "keypoints": None,
                    "normalized": True,
                    "bbox_format": "xywh",
                }
            )
        return labels

    def load_image(
        self, i: int, rect_mode: bool = True, resize_short: bool = False
    ) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
        """Decoded and shrunk image, its original and its present (height, width)."""
        if i in self._cached:
            self._cached.move_to_end(i)
            image, original = self._cached[i]
            return image, original, image.shape[:2]
        image, original = self._fetched.get(i) or self._decoded(i)
        self._cached[i] = image, original
        self._cached_bytes += image.nbytes
        while self._cached_bytes > self._cache_limit:
            _, (old, _) = self._cached.popitem(last=False)
            self._cached_bytes -= old.nbytes
        return image, original, image.shape[:2]

    def _decoded(self, i: int) -> tuple[np.ndarray, tuple[int, int]]:
        full = decode(self.im_files[i], self._disk)
        return shrink(full, self.imgsz), full.shape[:2]

    def fetch(self, indices: Iterable[int]) -> None:
        """Load the images of an object store that `load_image` will be asked for next, many at a time."""
        missing = sorted({i for i in indices if i not in self._cached and is_remote(self.im_files[i])})
        self._fetched = dict(zip(missing, side_by_side(self._decoded, missing, remote=True), strict=True))

    def parts(self, index: int, seed: int, mosaic: bool) -> list[int]:
        """Images that `augmented` makes this sample of: its own and its mosaic partners; those of mixup are not foreseen."""
        mixer = self._mosaic if mosaic else None
        if mixer is None:
            return [index]
        random.seed(seed)
        used = random.uniform(0, 1) <= mixer.p  # as Ultralytics draws it, first of all
        return [index, *mixer.get_indexes()] if used else [index]

    def augmented(self, index: int, seed: int, mosaic: bool) -> Sample:
        """One training sample; equal arguments give an equal sample, whatever was loaded before."""
        random.seed(seed)
        np.random.seed(seed)
        transforms = self.with_mosaic if mosaic else self.without_mosaic
        return dict(transforms(self.get_image_and_label(index)))


def _hyp(train: Train | None) -> Any:
    """Ultralytics' settings namespace."""
    settings: dict[str, Any] = {"task": "detect"}
    if train is not None:
        settings |= {k: getattr(train, k) for k in ("mosaic", "mixup", "scale", "translate", "fliplr", "flipud")}
        settings |= dict(zip(("hsv_h", "hsv_s", "hsv_v"), train.hsv, strict=True))
    return get_cfg(overrides=settings)


def _first_mosaic(transforms: Any) -> Mosaic | None:
    """The mosaic among nested transforms, where it comes first."""
    while isinstance(transforms, Compose) and transforms.transforms:
        transforms = transforms.transforms[0]
    return transforms if isinstance(transforms, Mosaic) else None


class Streams(torch.utils.data.Dataset):
    """The labelled and the unlabelled training images; an item is named by a `Draw`.

    Args:
        strong: strength of a strong view of each unlabelled image beside the weak one, as `img_strong`; 0: none.
    """

    def __init__(self, streams: dict[str, ManifestDataset], strong: float = 0.0) -> None:
        self.streams, self.strong = streams, strong

    def __getitem__(self, draw: Draw) -> Sample:
        sample = self.streams[draw.stream].augmented(draw.image, draw.seed, draw.mosaic)
        if self.strong and draw.stream == "unlabelled":
            weak = sample["img"].permute(1, 2, 0).numpy()
            sample["img_strong"] = torch.from_numpy(strong_view(weak, draw.seed, self.strong)).permute(2, 0, 1)
        return sample

    def __getitems__(self, draws: Sequence[Draw]) -> list[Sample]:
        """The samples of a batch, whose images are fetched together."""
        for name, stream in self.streams.items():
            if not stream.remote:
                continue
            own = (stream.parts(d.image, d.seed, d.mosaic) for d in draws if d.stream == name)
            stream.fetch(chain.from_iterable(own))
        return [self[draw] for draw in draws]


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Stack samples.

    Returns:
        img: (B,3,H,W) uint8 RGB. cls, score, agreement, batch_idx: (N,). bboxes: (N,4) cx, cy, w, h, 0..1.
        Files and shapes of validation samples as lists.
    """
    columns = [s["cls"].reshape(-1, 3) if s["cls"].numel() else torch.zeros(0, 3) for s in samples]
    index = [torch.full((len(c),), float(i)) for i, c in enumerate(columns)]
    attributes = torch.cat(columns).float()
    batch: dict[str, Any] = {
        "img": torch.stack([s["img"] for s in samples]),
        "cls": attributes[:, 0],
        "score": attributes[:, 1],
        "agreement": attributes[:, 2],
        "bboxes": torch.cat([s["bboxes"].reshape(-1, 4) for s in samples]).float(),
        "batch_idx": torch.cat(index),
    }
    strong = [s["img_strong"] for s in samples if "img_strong" in s]
    if strong:
        batch["img_strong"] = torch.stack(strong)
    for key in ("im_file", "ori_shape", "ratio_pad"):
        batch[key] = [s.get(key) for s in samples]
    return batch


def validation_batches(dataset: ManifestDataset, rank: int = 0, world: int = 1) -> Iterator[dict[str, Any]]:
    """Batches of a validation set in its rectangular order; each rank takes every world-th batch."""
    for first in range(rank * VAL_BATCH, len(dataset), world * VAL_BATCH):
        batch = range(first, min(first + VAL_BATCH, len(dataset)))
        dataset.fetch(batch)
        yield collate([dataset[i] for i in batch])


def network_input(images_uint8: Tensor, device: torch.device) -> Tensor:
    """(B,3,H,W) float32 0..1, channels last."""
    return images_uint8.to(device, non_blocking=True).float().div_(255).contiguous(memory_format=torch.channels_last)
