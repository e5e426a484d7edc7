"""What a trained network makes of images, in this process: its boxes, and its pooled neck features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dfssd.config import Config
from dfssd.data.manifest import Boxes, Row
from dfssd.models.families import family_of
from dfssd.pseudo.shards import decode_shard, fuse_views, shard_images, shards
from dfssd.pseudo.teachers import load_teachers
from dfssd.runtime.progress import Progress
from dfssd.runtime.storage import Storage


def look(
    config: Config, run: Storage, weights: str, names: Sequence[str], rows: Sequence[Row], what: str
) -> tuple[list[Boxes], np.ndarray]:
    """Candidates of a network on each image, and (n,d) unit vectors of its pooled neck features.

    Args:
        weights: file of the network, relative to the run.
        what: label of the progress line.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and config.run.gpu != "never" else "cpu")
    plain = config.model_copy(update={"pseudo": config.pseudo.model_copy(update={"tta": "none"})})
    teachers = load_teachers(plain, run, [weights], names, device)
    pooled: list[np.ndarray] = []

    def keep(maps: Sequence[torch.Tensor]) -> None:
        pooled.append(torch.cat([m.float().mean((2, 3)) for m in maps], 1).cpu().numpy())

    handle = family_of(teachers.models[0]).watch(teachers.models[0], keep)
    boxes: list[Boxes] = []
    progress = Progress(what, len(rows), "img")
    try:
        for shard in shards(list(rows), "look", shard_images(config.train.imgsz)):
            found = teachers(decode_shard(shard, config.train.imgsz, config.train))
            none = np.zeros((0, 7), np.float32)
            boxes += [none if b is None else b for b in fuse_views(found, plain.pseudo, config.train.imgsz)]
            progress.add(len(shard["ids"]))
    finally:
        handle.remove()
    features = np.concatenate(pooled) if pooled else np.zeros((0, 1))
    features = features - features.mean(0)  # what all images of a line share tells none from another
    return boxes, features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-9)
