"""Shards of the labelling job: images that are labelled together, and the parquet file that comes of them.

A shard passes three stages, each a function from row to row, wherever it runs (Ray Data tasks and actors, or threads of one
process): decode (`decode_shard`), networks (`pseudo.teachers.Teachers`), and fusion and writing (`fuse_and_write`).

Legend: candidates are (n,7) arrays [cls, cx, cy, w, h (0..1 of the image), score, agreement]; found boxes, as the networks
leave them, are (N,8) float32 arrays [image, view, x1, y1, x2, y2 px of the network's input, score, class of the data].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from dfssd.config import Config, Pseudo, Train
from dfssd.data.boxes import DET_CLS, DET_SCORE, XYXY, unflip
from dfssd.data.checks import Problem
from dfssd.data.images import memory_of
from dfssd.data.large import LARGE
from dfssd.data.letterbox import GREY, Letterbox, letterboxed, out_of_letterbox
from dfssd.data.manifest import Boxes, Manifest, Row, boxes_from_arrow, pseudo_table, read_table, write_table
from dfssd.data.preparation.bad_files import write_bad
from dfssd.data.reading import disk_cache, opened
from dfssd.errors import DfssdError, StorageError
from dfssd.pseudo.fusion import FLIPS, fuse
from dfssd.pseudo.scores import score_bin
from dfssd.pseudo.thresholds import ScoreCounts
from dfssd.runtime.progress import Progress
from dfssd.runtime.storage import Storage, is_remote, side_by_side

SHARD = 64  # images of up to 640 px; fewer of larger ones, so that a decoded shard never holds more than 80 MB
FULL_SIDE = 640
# Columns of found boxes: which image and view it is, then a detection.
IMAGE, VIEW, DETECTION = 0, 1, 2

Shard = dict[str, Any]
Log = Callable[[dict[str, float], int], None]


def shard_images(imgsz: int) -> int:
    """Images of a shard at this side of the network's input (px)."""
    return max(4, min(SHARD, SHARD * FULL_SIDE**2 // imgsz**2))


def decoded_bytes(imgsz: int) -> int:
    """Size of a decoded shard."""
    return shard_images(imgsz) * imgsz**2 * 3


def decoding_memory(todo: Sequence[Shard], imgsz: int) -> int:
    """Bytes that a task which decodes one of these shards takes: its images, their copy on the way into the object store, and
    its largest picture as the file holds it, where that is large."""
    places = [place for shard in todo for place in zip(shard["pixels"], shard["whites"], strict=True)]
    large = [memory_of(pixels, white) for pixels, white in places if pixels >= LARGE]
    return 2 * decoded_bytes(imgsz) + max(large, default=0)


def shards(rows: Sequence[Row], prefix: str, size: int = SHARD) -> list[Shard]:
    """Rows cut into shards: file name, ids and uris."""
    parts = [rows[k : k + size] for k in range(0, len(rows), size)]
    return [
        {
            "file": f"{prefix}-{k:05d}.parquet",
            "ids": [r.image_id for r in part],
            "uris": [r.uri for r in part],
            "whites": [r.white for r in part],
            "pixels": [r.width * r.height for r in part],
        }
        for k, part in enumerate(parts)
    ]


def unfinished(config: Config, store: Storage, manifest: Manifest, folder: str) -> list[Shard]:
    """Shards of the unlabelled images, and of the val split for the quality report, that are still to be labelled."""
    size = shard_images(config.train.imgsz)
    val = sorted((r for r in manifest.of_split("val") if r.boxes is not None), key=lambda r: r.image_id)
    every = shards(manifest.unlabelled_rows(), "shard", size) + shards(val, "val", size)
    done = set(store.files(recursive=False))
    todo = [s for s in every if s["file"] not in done or not _is_whole(store, s)]
    if done and len(todo) < len(every):
        print(f"{folder}: resumed, {len(every) - len(todo)} of {len(every)} shards are there", flush=True)
    return todo


def _is_whole(store: Storage, shard: Shard) -> bool:
    """Is every image of the shard in its file, and read? A damaged file is made again, and so is one with images that could
    not be read: somebody may have brought them back."""
    try:
        table = read_table(store, shard["file"])
        return sorted(table["image_id"].to_pylist()) == sorted(shard["ids"]) and table["boxes"].null_count == 0
    except StorageError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        why = str(error).splitlines()[0][:200]
        print(f"WARNING: {store.path(shard['file'])} is damaged ({why}) and is labelled again", flush=True)
        return False


def read_shards(store: Storage, prefix: str) -> Iterator[tuple[str, Boxes | None]]:
    """(image_id, candidates) of every image labelled so far, shard by shard; None for an unreadable image."""
    for name in store.files(recursive=False):
        if name.startswith(f"{prefix}-"):
            table = read_table(store, name)
            yield from zip(table["image_id"].to_pylist(), boxes_from_arrow(table["boxes"]), strict=True)


def decode_shard(row: Shard, imgsz: int, train: Train | None = None) -> Shard:
    """Read and letterbox the images of a shard on a CPU task.

    Args:
        row: uris, and as in the manifest whites, where some have more than 8 bits, and pixels, where some are large.
        train: settings that name a cache on disk; none: no cache.

    Returns:
        images: (n,imgsz,imgsz,3) uint8 RGB. sizes: (n,2) width, height (px), 0 of an image that cannot be read. Everything
        else is passed on.
    """
    cache = disk_cache(train) if train else None
    n = len(row["uris"])
    images = np.full((n, imgsz, imgsz, 3), GREY, np.uint8)
    sizes = np.zeros((n, 2), np.float32)

    def load(place: tuple[str, int, float, str]) -> tuple[np.ndarray, Letterbox] | None:
        uri, pixels, white, image_id = place
        try:
            with opened(uri, pixels, cache, white, image_id) as full:
                return letterboxed(full, (imgsz, imgsz))
        except DfssdError:
            return None  # becomes a row without boxes, and so a row of bad_files.parquet

    uris = [str(uri) for uri in row["uris"]]
    ids = [str(i) for i in row.get("ids", [""] * n)]
    pixels = map(int, row.get("pixels", np.zeros(n)))
    places = list(zip(uris, pixels, map(float, row.get("whites", np.zeros(n))), ids, strict=True))
    for k, found in enumerate(side_by_side(load, places, any(map(is_remote, uris)))):
        if found is None:
            continue
        image, frame = found
        images[k] = image[..., ::-1]
        sizes[k] = frame.image_wh
    return {**row, "images": images, "sizes": sizes}


def fuse_views(row: Shard, settings: Pseudo, side: int) -> list[Boxes | None]:
    """Candidates of each image from what the networks found in its views; None for an unreadable image.

    Args:
        row: found, views (how many looked at each image), and sizes as `decode_shard` gives them.
        side: of the network's input (px).
    """
    found, views = np.asarray(row["found"], np.float32).reshape(-1, 8), int(row["views"])
    boxes = _in_shares(found, side)
    key = found[:, IMAGE].astype(np.int64) * views + found[:, VIEW].astype(np.int64)
    order = np.argsort(key, kind="stable")
    edges = np.searchsorted(key[order], np.arange(len(row["ids"]) * views + 1))
    own = [boxes[order[a:b]] for a, b in pairwise(edges)]
    result: list[Boxes | None] = []
    for k, size_wh in enumerate(np.asarray(row["sizes"])):
        if not size_wh.all():
            result.append(None)
            continue
        turned = [
            unflip(one, *FLIPS[v % len(FLIPS)] if settings.tta == "flips" else FLIPS[0])
            for v, one in enumerate(own[k * views : (k + 1) * views])
        ]
        one = fuse(turned, settings.fuse_iou, settings.floor, settings.max_candidates)
        result.append(out_of_letterbox(one, size_wh, side))
    return result


def _in_shares(found: np.ndarray, side: int) -> Boxes:
    """Found boxes as candidates in shares of the network's input, cut at its edges."""
    own = found[:, DETECTION:]
    xyxy = (own[:, XYXY] / side).clip(0, 1)
    low, high = xyxy[:, :2], xyxy[:, 2:]
    columns = [own[:, DET_CLS, None], (low + high) / 2, high - low, own[:, DET_SCORE, None]]
    return np.concatenate([*columns, np.ones((len(found), 1), np.float32)], 1).astype(np.float32)


def fuse_and_write(row: Shard, run_uri: str, folder: str, settings: Pseudo, side: int) -> Shard:
    """Fuse the views of a shard's images and write its file, which appears whole or not at all; runs on a CPU task.

    Returns:
        file, images, boxes (how many), bad (uris of unreadable images).
    """
    boxes = fuse_views(row, settings, side)
    table = pseudo_table([str(i) for i in row["ids"]], str(row["teacher"]), boxes)
    write_table(Storage(run_uri).at(folder), str(row["file"]), table)
    bad = [str(uri) for uri, b in zip(row["uris"], boxes, strict=True) if b is None]
    count = sum(len(b) for b in boxes if b is not None)
    return {"file": row["file"], "images": len(boxes), "boxes": count, "bad": bad}


class Tally:
    """Counts what has been labelled, and stops when too many images cannot be read."""

    def __init__(self, config: Config, folder: str, todo: Sequence[Shard], images: int, log: Log) -> None:
        self.config, self.log, self.bad = config, log, list[str]()
        self.limit = config.pseudo.unreadable_limit * images
        self.progress = Progress(folder, sum(len(t["ids"]) for t in todo), "img")

    def add(self, row: Shard) -> None:
        """
        Raises:
            DfssdError: more images than the limit could not be read.
        """
        progress = self.progress
        progress.add(int(row["images"]), f"{int(row['boxes'])} candidates in the last shard")
        self.log({"speed (img/s)": progress.rate, "images": progress.done}, progress.done)
        self.bad += [str(uri) for uri in row["bad"]]
        if len(self.bad) > self.limit:
            _too_many_bad(self.config, self.bad, progress.done)


def _too_many_bad(config: Config, bad: list[str], images: int) -> None:
    raise DfssdError(
        f"{len(bad)} of {images} images could not be read so far, the limit is {config.pseudo.unreadable_limit:.1%}",
        where=", ".join(bad[:5]) + (", ..." if len(bad) > 5 else ""),
        todo="bring the images back, or accept it with --unreadable-limit; the same command goes on from here",
    )


def summarise(config: Config, store: Storage, manifest: Manifest) -> dict[str, Any]:
    """Count candidates by class and list unreadable images, from the shards on storage.

    Raises:
        DfssdError: more images than the limit could not be read.
    """
    uri_of = {r.image_id: r.uri for r in manifest.rows}
    scores, bad, silent = ScoreCounts.empty(len(manifest.names)), [], 0
    for prefix in ("shard", "val"):
        for image_id, boxes in read_shards(store, prefix):
            if boxes is None:
                bad.append((uri_of[image_id], Problem("unreadable", "when labelling")))
            elif prefix == "shard":
                scores.add(boxes)
                silent += not len(boxes)
    write_bad(store, bad)
    images = len(manifest.unlabelled_rows())
    if len(bad) > config.pseudo.unreadable_limit * (images + len(manifest.of_split("val"))):
        _too_many_bad(config, [uri for uri, _ in bad], images)
    return {
        "images": images,
        "unreadable": len(bad),
        "without_candidate": silent,
        "candidates": dict(zip(manifest.names, scores.counts.sum(1).tolist(), strict=True)),
        "score_above_0.5": dict(zip(manifest.names, scores.counts[:, score_bin(0.5) :].sum(1).tolist(), strict=True)),
    }
