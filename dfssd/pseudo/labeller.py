"""The labelling job: Ray Data streams images through the teachers into shards of candidates.

    shards of image uris -> decode (CPU tasks) -> teachers (actor pool) -> pseudo/shard-00007.parquet

A shard is written whole or not at all, by the actor that labelled it; a resumed job labels only the shards that are
missing. Memory holds the shards in flight, whatever the number of images. The validation images are labelled in the
same way (`val-00000.parquet`), for the quality report alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data

from dfssd.config import Config
from dfssd.data.bad_files import write_bad
from dfssd.data.checks import Problem
from dfssd.data.letterbox import decode_shard
from dfssd.data.manifest import Boxes, Manifest, Row, boxes_from_arrow, read_table
from dfssd.errors import DfssdError, StorageError
from dfssd.pseudo.teachers import TeacherActor
from dfssd.pseudo.thresholds import ScoreCounts, score_bin
from dfssd.runtime.cluster import alive_nodes
from dfssd.runtime.progress import Progress
from dfssd.runtime.storage import Storage

SHARD = 64  # images
DECODE_CPUS = 0.25  # several decode tasks share a core, so that they also start where an actor holds the other one
STORE_SHARE = 0.5  # of the object store that shards in flight may fill; above it decoding waits

Log = Callable[[dict[str, float], int], None]


def shards(rows: Sequence[Row], prefix: str) -> list[dict[str, Any]]:
    """Rows cut into shards: file name, ids and uris."""
    parts = [rows[k : k + SHARD] for k in range(0, len(rows), SHARD)]
    return [
        {"file": f"{prefix}-{k:05d}.parquet", "ids": [r.image_id for r in part], "uris": [r.uri for r in part]}
        for k, part in enumerate(parts)
    ]


def read_shards(store: Storage, prefix: str) -> Iterator[tuple[str, Boxes | None]]:
    """(image_id, candidates) of every image labelled so far, shard by shard; None for an unreadable image."""
    for name in store.files(recursive=False):
        if name.startswith(f"{prefix}-"):
            table = read_table(store, name)
            yield from zip(table["image_id"].to_pylist(), boxes_from_arrow(table["boxes"]), strict=True)


def label(
    config: Config, run: Storage, folder: str, manifest: Manifest, weights: Sequence[str], log: Log
) -> dict[str, Any]:
    """Label all unlabelled images, and those of the val split for the quality report.

    Args:
        folder: artefact to write, e.g. "pseudo".
        weights: files of the teachers, relative to the run; several are an ensemble.
        log: takes (metrics, images done).

    Returns:
        numbers on what was found on the unlabelled images.

    Raises:
        DfssdError: more images than the limit could not be read, or a teacher does not know the classes.
    """
    store = run.at(folder)
    unlabelled = manifest.unlabelled_rows()
    val = sorted((r for r in manifest.of_split("val") if r.boxes is not None), key=lambda r: r.image_id)
    every = shards(unlabelled, "shard") + shards(val, "val")
    done = set(store.files(recursive=False))
    todo = [s for s in every if s["file"] not in done or not _is_whole(store, s)]
    if done and len(todo) < len(every):
        print(f"{folder}: resumed, {len(every) - len(todo)} of {len(every)} shards are there", flush=True)
    if todo:
        actor = (run.uri, folder, config, tuple(weights), tuple(manifest.names))
        _stream(config, folder, todo, actor, log, limit=config.pseudo.unreadable_limit * (len(unlabelled) + len(val)))
    return _summarise(config, store, manifest)


def _is_whole(store: Storage, shard: dict[str, Any]) -> bool:
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


def _actors(config: Config) -> tuple[int, float, bool]:
    """Number of actors, CPUs for each, and whether each has a GPU."""
    total = float(ray.cluster_resources().get("CPU", 1))
    gpus = int(ray.cluster_resources().get("GPU", 0)) if config.run.gpu != "never" else 0
    count = config.pseudo.num_actors or gpus or max(1, int(total // 8))
    # Actors start first and hold their CPUs; what is left must take the decode tasks, or nothing ever runs.
    cpus = 1.0 if total - count >= 4 * DECODE_CPUS else max(0.1, total / 2 / count)
    return count, cpus, gpus >= count


def _stream(
    config: Config, folder: str, todo: list[dict[str, Any]], actor: tuple[Any, ...], log: Log, limit: float
) -> None:
    """Run the Ray Data pipeline over the shards that are missing."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours survives a job's log, and goes on where a resumed job goes on
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    count, cpus, gpu = _actors(config)
    nodes = alive_nodes()
    threads = max(
        1, int(min(sum(n["CPU"] for n in nodes) // count, *(n["CPU"] for n in nodes)))
    )  # of one node, not of all
    dataset = (
        ray.data.from_items(todo, override_num_blocks=len(todo))
        .map(decode_shard, fn_kwargs={"imgsz": config.train.imgsz, "train": config.train}, num_cpus=DECODE_CPUS)
        .map(
            TeacherActor,
            fn_constructor_args=(*actor, threads),
            compute=ray.data.ActorPoolStrategy(size=count),
            num_cpus=cpus,
            num_gpus=1 if gpu else None,
        )
    )
    store_bytes = float(ray.cluster_resources().get("object_store_memory", 2**30)) * STORE_SHARE
    limits = ray.data.ExecutionResources.for_limits(object_store_memory=store_bytes)
    dataset.context.execution_options.resource_limits = limits
    progress, bad = Progress(folder, sum(len(t["ids"]) for t in todo), "img"), []
    for row in dataset.iter_rows():
        progress.add(int(row["images"]), f"{int(row['boxes'])} candidates in the last shard")
        log({"speed (img/s)": progress.rate, "images": progress.done}, progress.done)
        bad += [str(uri) for uri in row["bad"]]
        if len(bad) > limit:
            _too_many_bad(config, bad, progress.done)


def _too_many_bad(config: Config, bad: list[str], images: int) -> None:
    raise DfssdError(
        f"{len(bad)} of {images} images could not be read so far, the limit is {config.pseudo.unreadable_limit:.1%}",
        where=", ".join(bad[:5]) + (", ..." if len(bad) > 5 else ""),
        todo="bring the images back, or accept it with --unreadable-limit; the same command goes on from here",
    )


def _summarise(config: Config, store: Storage, manifest: Manifest) -> dict[str, Any]:
    """Count candidates by class and list unreadable images, from the shards on storage."""
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
