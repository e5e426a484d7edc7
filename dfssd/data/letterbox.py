"""Images of a shard as the network's square input, and boxes back from there to the image.

Legend: n images of a shard; candidates are (n,7) arrays [cls, cx, cy, w, h (0..1 of the image), score, agreement].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from dfssd.config import Train
from dfssd.data.dataset import decode, disk_cache, shrink
from dfssd.data.manifest import Boxes
from dfssd.errors import DfssdError
from dfssd.runtime.storage import is_remote, side_by_side


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
