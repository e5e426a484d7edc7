"""The labelling teachers: what an actor of the labelling job holds, and how a decoded shard becomes candidates.

Legend: n images of a shard; candidates are (n,7) arrays [cls, cx, cy, w, h (0..1 of the image), score, agreement].
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfssd.config import Config, Train
from dfssd.data.dataset import decode, disk_cache, network_input, shrink
from dfssd.data.manifest import Boxes, pseudo_table, write_table
from dfssd.errors import DfssdError
from dfssd.models.detector import autocast_dtype, load_detector
from dfssd.models.predict import predict
from dfssd.pseudo.fusion import FLIPS, fuse, unflip
from dfssd.storage import Storage, is_remote, side_by_side

AUTO_BATCH = {"cpu": 16, "cuda": 64}  # images in a forward pass; halved where a GPU's memory does not hold them


def decode_shard(row: dict[str, Any], imgsz: int, train: Train | None = None) -> dict[str, Any]:
    """Read and letterbox the images of a shard on a CPU task.

    Args:
        train: settings that name a cache on disk; none: no cache.

    Returns:
        images: (n,imgsz,imgsz,3) uint8 RGB. geometry: (n,3) float [scale, left, top]: input px = image px * scale + edge;
        scale 0 marks an image that cannot be read. sizes: (n,2) width, height (px). Everything else is passed on.
    """
    cache = disk_cache(train) if train else None
    n = len(row["uris"])
    images = np.full((n, imgsz, imgsz, 3), 114, np.uint8)
    geometry, sizes = np.zeros((n, 3), np.float32), np.zeros((n, 2), np.float32)

    def load(uri: str) -> tuple[np.ndarray, tuple[int, ...]] | None:
        try:
            full = decode(uri, cache)
        except DfssdError:
            return None  # becomes a row without boxes, and so a row of bad_files.parquet
        return shrink(full, imgsz), full.shape

    uris = [str(uri) for uri in row["uris"]]
    for k, found in enumerate(side_by_side(load, uris, any(map(is_remote, uris)))):
        if found is None:
            continue
        small, (height, width, *_) = found
        top, left = (imgsz - small.shape[0]) // 2, (imgsz - small.shape[1]) // 2
        images[k, top : top + small.shape[0], left : left + small.shape[1]] = small[..., ::-1]
        geometry[k] = small.shape[1] / width, left, top
        sizes[k] = width, height
    return {**row, "images": images, "geometry": geometry, "sizes": sizes}


def digest(weights: Sequence[bytes]) -> str:
    """Identity of a set of teachers: 16 hex digits over the digests of their weights."""
    each = [hashlib.sha256(w).hexdigest() for w in weights]
    return each[0][:16] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()[:16]


def class_map(own: dict[int, str], names: Sequence[str], where: str) -> np.ndarray:
    """(C of the teacher,) class id of the data for each of the teacher's classes, by name; -1 where the data lacks it.

    Raises:
        DfssdError: the teacher does not know one of the data's classes.
    """
    known = [own[k] for k in sorted(own)]
    missing = sorted(set(names) - set(known))
    if missing:
        raise DfssdError(
            f"the teacher does not know the classes {missing}; it knows {known}",
            where=where,
            todo="give a teacher that was trained on these classes, under the same names",
        )
    return np.array([names.index(n) if n in names else -1 for n in known])


class TeacherActor:
    """Holds the teachers; turns a decoded shard into a parquet file of candidates.

    Args:
        run_uri: storage of the run.
        folder: artefact that the shards belong to.
        weights: files of the teachers, relative to the run.
        names: class names of the data.
        threads: torch threads.
    """

    def __init__(
        self, run_uri: str, folder: str, config: Config, weights: Sequence[str], names: Sequence[str], threads: int
    ) -> None:
        torch.set_num_threads(threads)
        run = Storage(run_uri)
        self.store, self.config = run.at(folder), config
        self.device = torch.device("cuda" if torch.cuda.is_available() and config.run.gpu != "never" else "cpu")
        self.half = self.device.type == "cuda" and autocast_dtype(config.train.amp, self.device) is not None
        self.models, self.maps = [], []
        files = [run.read(name) for name in weights]
        self.digest = digest(files)
        for name, data in zip(weights, files, strict=True):
            model = load_detector(data, run.path(name), config.train.imgsz)
            self.maps.append(class_map(model.names, names, run.path(name)))
            model = model.fuse(verbose=False).to(self.device, memory_format=torch.channels_last)
            self.models.append(model.half() if self.half else model)
        self.batch = config.pseudo.label_batch or AUTO_BATCH[self.device.type]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        boxes: list[Boxes | None] = []
        while len(boxes) < len(row["ids"]):
            part = slice(len(boxes), len(boxes) + self.batch)
            try:
                boxes += self.candidates(row["images"][part], row["geometry"][part], row["sizes"][part])
            except torch.cuda.OutOfMemoryError as error:
                if self.batch == 1 or self.config.pseudo.label_batch:
                    raise DfssdError(
                        f"{self.batch} images do not fit into the GPU's memory", todo="lower --label-batch or --imgsz"
                    ) from error
                self.batch //= 2
        write_table(self.store, str(row["file"]), pseudo_table([str(i) for i in row["ids"]], self.digest, boxes))
        bad = [str(uri) for uri, b in zip(row["uris"], boxes, strict=True) if b is None]
        return {"file": row["file"], "images": len(boxes), "boxes": sum(len(b) for b in boxes if b is not None),
                "bad": bad}  # fmt: skip

    def candidates(self, images_bhwc: np.ndarray, geometry: np.ndarray, sizes: np.ndarray) -> list[Boxes | None]:
        """Candidates of each image, seen by every teacher in every form; None for an unreadable image."""
        settings, side = self.config.pseudo, images_bhwc.shape[1]
        flips = FLIPS if settings.tta == "flips" else FLIPS[:1]
        views: list[list[Boxes]] = [[] for _ in images_bhwc]
        with torch.no_grad():
            images = network_input(torch.from_numpy(images_bhwc.transpose(0, 3, 1, 2).copy()), self.device)
            images = images.half() if self.half else images
            for model, classes in zip(self.models, self.maps, strict=True):
                for flip in flips:
                    turned = images.flip([d for d, on in zip((3, 2), flip, strict=True) if on]) if any(flip) else images
                    found = predict(model, turned, settings.floor, settings.nms_iou, settings.max_candidates)
                    for own, one in zip(views, found, strict=True):
                        own.append(unflip(in_shares(one, classes, side), *flip))
        fused = [fuse(own, settings.fuse_iou, settings.floor, settings.max_candidates) for own in views]
        return [
            None if scale == 0 else out_of_letterbox(one, scale, left, top, size, side)
            for one, (scale, left, top), size in zip(fused, geometry.tolist(), sizes, strict=True)
        ]


def in_shares(found: Tensor, classes: np.ndarray, side: int) -> Boxes:
    """(n,6) [x1, y1, x2, y2 px of the input, score, class of the teacher] -> candidates in shares of the input."""
    own = found.float().cpu().numpy()
    xyxy = (own[:, :4] / side).clip(0, 1)
    cls = classes[own[:, 5].astype(int)].astype(np.float32)
    columns = [cls[:, None], (xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2], own[:, 4:5]]
    return np.asarray(np.concatenate([*columns, np.ones((len(own), 1))], 1).astype(np.float32)[cls >= 0])


def out_of_letterbox(boxes: Boxes, scale: float, left: float, top: float, size_wh: np.ndarray, side: int) -> Boxes:
    """Candidates in shares of the letterboxed input -> in shares of the image, cut at its edges."""
    centre, half = boxes[:, 1:3] * side, boxes[:, 3:5] * side / 2
    edges = [((centre + s * half - [left, top]) / scale / size_wh).clip(0, 1) for s in (-1, 1)]
    wh = edges[1] - edges[0]
    columns = [boxes[:, :1], (edges[0] + edges[1]) / 2, wh, boxes[:, 5:]]
    return np.asarray(np.concatenate(columns, 1).astype(np.float32)[(wh > 0).all(1)])
