"""The labelling teachers: what an actor of the labelling job holds, and how a decoded shard becomes candidates.

Legend: n images of a shard; candidates are (n,7) arrays [cls, cx, cy, w, h (0..1 of the image), score, agreement].
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dfssd.config import Config
from dfssd.data.boxes import unflip
from dfssd.data.dataset import network_input
from dfssd.data.letterbox import in_shares, out_of_letterbox
from dfssd.data.manifest import Boxes, pseudo_table, write_table
from dfssd.errors import DfssdError
from dfssd.models.detector import autocast_dtype, load_detector
from dfssd.models.predict import predict
from dfssd.pseudo.fusion import FLIPS, fuse
from dfssd.runtime.storage import Storage

AUTO_BATCH = {"cpu": 16, "cuda": 64}  # images in a forward pass; halved where a GPU's memory does not hold them


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
