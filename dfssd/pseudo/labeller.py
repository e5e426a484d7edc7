"""The labelling job: Ray Data streams the unlabelled images through the teacher into shards of candidates.

    shards of image uris -> decode (CPU tasks) -> teacher (actor pool) -> pseudo/shard-00007.parquet

A shard is written whole or not at all, by the actor that labelled it; a resumed job labels only the shards that are
missing. Memory holds the shards in flight, whatever the number of images.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import ray
import ray.data

from dfssd.config import Config
from dfssd.data.checks import Problem
from dfssd.data.manifest import Boxes, Manifest, boxes_from_arrow, pseudo_table, read_table, write_table
from dfssd.errors import DfssdError
from dfssd.progress import Progress
from dfssd.storage import Storage

SHARD = 64  # images
DECODE_CPUS = 0.25  # several decode tasks share a core, so that they also start where an actor holds the other one


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.parquet"


def label(config: Config, run: Storage, manifest: Manifest, teacher_digest: str) -> dict[str, Any]:
    """Label all unlabelled images with `teacher/best.pt`; return numbers on what was found.

    Raises:
        DfssdError: more images than the limit could not be read.
    """
    store, rows = run.at("pseudo"), manifest.unlabelled_rows()
    shards = [rows[k : k + SHARD] for k in range(0, len(rows), SHARD)]
    done = set(store.files(recursive=False))
    todo = [
        {"shard": k, "ids": [r.image_id for r in shard], "uris": [r.uri for r in shard]}
        for k, shard in enumerate(shards)
        if shard_name(k) not in done
    ]
    if done and len(todo) < len(shards):
        print(f"pseudo: resumed, {len(shards) - len(todo)} of {len(shards)} shards are there", flush=True)
    if todo:
        _stream(config, run, store, todo, teacher_digest)
    return _summarise(config, store, manifest, len(shards))


def _stream(config: Config, run: Storage, store: Storage, todo: list[dict[str, Any]], digest: str) -> None:
    """Run the Ray Data pipeline over the shards that are missing."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours survives a job's log, and goes on where a resumed job goes on
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    total = float(ray.cluster_resources().get("CPU", 1))
    gpu = config.run.gpu == "auto" and ray.cluster_resources().get("GPU", 0) >= config.pseudo.num_actors
    # Actors start first and hold their CPUs; what is left must take the decode tasks, or nothing ever runs.
    cpus = (
        1.0 if total - config.pseudo.num_actors >= 4 * DECODE_CPUS else max(0.1, total / 2 / config.pseudo.num_actors)
    )
    imgsz = config.train.imgsz
    threads = max(1, int(total // config.pseudo.num_actors))
    dataset = (
        ray.data.from_items(todo, override_num_blocks=len(todo))
        .map(decode_shard, fn_kwargs={"imgsz": imgsz}, num_cpus=DECODE_CPUS)
        .map(
            TeacherActor,
            fn_constructor_args=(run.uri, config, digest, threads),
            compute=ray.data.ActorPoolStrategy(size=config.pseudo.num_actors),
            num_cpus=cpus,
            num_gpus=1 if gpu else None,
        )
    )
    progress = Progress("pseudo", sum(len(t["ids"]) for t in todo), "img")
    for row in dataset.iter_rows():
        progress.add(int(row["images"]), f"{int(row['boxes'])} candidates in the last shard")


def decode_shard(row: dict[str, Any], imgsz: int) -> dict[str, Any]:
    """Read and letterbox the images of a shard on a CPU task.

    Returns:
        images: (n,imgsz,imgsz,3) uint8 RGB. geometry: (n,3) float [scale, left, top]: input px = image px * scale + edge;
        scale 0 marks an image that cannot be read. sizes: (n,2) width, height (px).
    """
    from dfssd.data.dataset import decode, shrink

    n = len(row["ids"])
    images = np.full((n, imgsz, imgsz, 3), 114, np.uint8)
    geometry, sizes = np.zeros((n, 3), np.float32), np.zeros((n, 2), np.float32)
    for k, uri in enumerate(row["uris"]):
        try:
            full = decode(str(uri))
        except DfssdError:
            continue  # becomes a row without boxes, and so a row of bad_files.parquet
        small = shrink(full, imgsz)
        top, left = (imgsz - small.shape[0]) // 2, (imgsz - small.shape[1]) // 2
        images[k, top : top + small.shape[0], left : left + small.shape[1]] = small[..., ::-1]
        geometry[k] = small.shape[1] / full.shape[1], left, top
        sizes[k] = full.shape[1], full.shape[0]
    return {"shard": row["shard"], "ids": list(row["ids"]), "images": images, "geometry": geometry, "sizes": sizes}


class TeacherActor:
    """Holds the teacher; turns a decoded shard into a parquet file of candidates."""

    def __init__(self, run_uri: str, config: Config, digest: str, threads: int) -> None:
        import torch

        from dfssd.models.detector import autocast_dtype, load_detector

        torch.set_num_threads(threads)
        run = Storage(run_uri)
        self.store, self.config, self.digest = run.at("pseudo"), config, digest
        self.device = torch.device("cuda" if torch.cuda.is_available() and config.run.gpu == "auto" else "cpu")
        model = load_detector(run.read("teacher/best.pt"), run.path("teacher/best.pt"), config.train.imgsz)
        model = model.fuse(verbose=False).to(self.device, memory_format=torch.channels_last)
        half = self.device.type == "cuda" and autocast_dtype(config.train.amp, self.device) is not None
        self.model, self.half = model.half() if half else model, half

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        boxes: list[Boxes | None] = []
        for first in range(0, len(row["ids"]), self.config.pseudo.label_batch):
            part = slice(first, first + self.config.pseudo.label_batch)
            boxes += self._candidates(row["images"][part], row["geometry"][part], row["sizes"][part])
        table = pseudo_table([str(i) for i in row["ids"]], self.digest, boxes)
        write_table(self.store, shard_name(int(row["shard"])), table)
        found = sum(0 if b is None else len(b) for b in boxes)
        return {"shard": row["shard"], "images": len(row["ids"]), "boxes": found}

    def _candidates(self, images_bhwc: np.ndarray, geometry: np.ndarray, sizes: np.ndarray) -> list[Boxes | None]:
        """(n,7) arrays [cls, cx, cy, w, h (0..1 of the image), score, agreement]; None for an unreadable image."""
        import torch

        from dfssd.data.dataset import network_input
        from dfssd.models.predict import predict

        settings = self.config.pseudo
        with torch.no_grad():
            images = network_input(torch.from_numpy(images_bhwc.transpose(0, 3, 1, 2).copy()), self.device)
            images = images.half() if self.half else images
            found = predict(self.model, images, settings.floor, settings.nms_iou, settings.max_candidates)
        return [
            None if scale == 0 else to_candidates(one.cpu().numpy(), scale, left, top, size)
            for one, (scale, left, top), size in zip(found, geometry.tolist(), sizes, strict=True)
        ]


def to_candidates(found: np.ndarray, scale: float, left: float, top: float, size_wh: np.ndarray) -> Boxes:
    """(n,6) [x1, y1, x2, y2 px of the input, score, class] -> (n,7) candidates in shares of the image."""
    corners = ((found[:, :4] - [left, top, left, top]) / scale / np.tile(size_wh, 2)).clip(0, 1)
    wh = corners[:, 2:] - corners[:, :2]
    centre = corners[:, :2] + wh / 2
    one = np.ones((len(found), 1))  # agreement: 1 without test-time flips
    all_of_it = np.concatenate([found[:, 5:6], centre, wh, found[:, 4:5], one], 1).astype(np.float32)
    return np.asarray(all_of_it[(wh > 0).all(1)])


def _summarise(config: Config, store: Storage, manifest: Manifest, shards: int) -> dict[str, Any]:
    """Count candidates by class and list unreadable images, from the shards on storage."""
    uri_of = {r.image_id: r.uri for r in manifest.unlabelled_rows()}
    scores: list[list[np.ndarray]] = [[] for _ in manifest.names]
    bad, images, silent = [], 0, 0
    for k in range(shards):
        table = read_table(store, shard_name(k))
        for image_id, boxes in zip(table["image_id"].to_pylist(), boxes_from_arrow(table["boxes"]), strict=True):
            images += 1
            if boxes is None:
                bad.append((uri_of[image_id], Problem("unreadable", "when labelling")))
                continue
            silent += not len(boxes)
            for c in range(len(scores)):
                scores[c].append(boxes[boxes[:, 0] == c, 5])
    from dfssd.data.prepare import write_bad

    write_bad(store, bad)
    if images and len(bad) / images > config.pseudo.unreadable_limit:
        raise DfssdError(
            f"{len(bad)} of {images} unlabelled images could not be read, the limit is {config.pseudo.unreadable_limit:.1%}; "
            f"the first is {bad[0][0]}",
            where=store.path("bad_files.parquet"),
            todo="bring the images back and delete the shards that hold them, or accept them with --unreadable-limit",
        )
    joined = {n: np.concatenate(s) if s else np.zeros(0) for n, s in zip(manifest.names, scores, strict=True)}
    return {
        "images": images,
        "unreadable": len(bad),
        "without_candidate": silent,
        "candidates": {n: len(s) for n, s in joined.items()},
        "score_above_0.5": {n: int((s >= 0.5).sum()) for n, s in joined.items()},
    }
