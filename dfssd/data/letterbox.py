"""Images of a shard as the network's square input, and boxes back from there to the image.

Legend: n images of a shard; candidates are (n,7) arrays [cls, cx, cy, w, h (0..1 of the image), score, agreement].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dfssd.config import Train
from dfssd.data.fit import Fit, fit_of, into
from dfssd.data.manifest import Boxes
from dfssd.data.reading import decode, disk_cache
from dfssd.errors import DfssdError
from dfssd.runtime.storage import is_remote, side_by_side


def decode_shard(row: dict[str, Any], imgsz: int, train: Train | None = None) -> dict[str, Any]:
    """Read and letterbox the images of a shard on a CPU task.

    Args:
        row: uris, and where some have more than 8 bits whites, as in the manifest.
        train: settings that name a cache on disk; none: no cache.

    Returns:
        images: (n,imgsz,imgsz,3) uint8 RGB. sizes: (n,2) width, height (px), 0 of an image that cannot be read. Everything
        else is passed on.
    """
    cache = disk_cache(train) if train else None
    n = len(row["uris"])
    images = np.full((n, imgsz, imgsz, 3), 114, np.uint8)
    sizes = np.zeros((n, 2), np.float32)

    def load(place: tuple[str, float, str]) -> tuple[np.ndarray, Fit] | None:
        try:
            full = decode(place[0], cache, place[1], place[2])
        except DfssdError:
            return None  # becomes a row without boxes, and so a row of bad_files.parquet
        return into(full, (imgsz, imgsz))

    uris = [str(uri) for uri in row["uris"]]
    ids = [str(i) for i in row.get("ids", [""] * n)]
    places = list(zip(uris, map(float, row.get("whites", np.zeros(n))), ids, strict=True))
    for k, found in enumerate(side_by_side(load, places, any(map(is_remote, uris)))):
        if found is None:
            continue
        image, fit = found
        images[k] = image[..., ::-1]
        sizes[k] = fit.image_wh
    return {**row, "images": images, "sizes": sizes}


def out_of_letterbox(boxes: Boxes, size_wh: np.ndarray, side: int) -> Boxes:
    """Candidates in shares of the letterboxed input -> in shares of the image, cut at its edges."""
    width, height = (int(length) for length in size_wh)
    moved = fit_of((width, height), (side, side)).boxes_out(boxes[:, 1:5])
    columns = [boxes[:, :1], moved, boxes[:, 5:]]
    return np.asarray(np.concatenate(columns, 1).astype(np.float32)[(moved[:, 2:] > 0).all(1)])
