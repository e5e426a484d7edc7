"""The labelling job: Ray Data streams images through the teachers into shards of candidates.

    shards of uris -> decode (CPU tasks) -> teachers (actors) -> fuse and write (CPU tasks) -> pseudo/shard-00007.parquet

An actor only runs networks, so that a GPU waits for neither a decoder nor Python. A shard is written whole or not at all; a
resumed job labels only the shards that are missing. Memory holds the shards in flight, whatever the number of images. The
validation images are labelled in the same way (`val-00000.parquet`), for the quality report alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import ray
import ray.data

from dfssd.config import Config
from dfssd.data.manifest import Manifest
from dfssd.pseudo.shards import Log, Shard, Tally, decode_shard, decoding_memory, fuse_and_write, summarise, unfinished
from dfssd.pseudo.teachers import TeacherActor, check_teachers
from dfssd.runtime.cluster import actor_resources, free, nodes_now
from dfssd.runtime.progress import Silence
from dfssd.runtime.storage import Storage

DECODE_CPUS = 0.25  # several decode tasks share a core, so that they also start where an actor holds the other one
STORE_SHARE = 0.5  # of the object store that shards in flight may fill; above it decoding waits


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
    todo = unfinished(config, store, manifest, folder)
    if todo:
        check_teachers(run, weights, manifest.names)
        tally = Tally(config, folder, todo, len(manifest.unlabelled_rows()) + len(manifest.of_split("val")), log)
        _stream(config, run, folder, todo, weights, manifest.names, tally)
    return summarise(config, store, manifest)


def _stream(
    config: Config, run: Storage, folder: str, todo: list[Shard], weights: Sequence[str], names: Sequence[str],
    tally: Tally,
) -> None:  # fmt: skip
    """Run the Ray Data pipeline over the shards that are missing."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours survives a job's log, and goes on where a resumed job goes on
    context.raise_original_map_exception = True  # a user error of a task or an actor: inside Ray Data's own it is lost
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    actors, side = actor_resources(config.run, config.pseudo.num_actors), config.train.imgsz
    largest = int(max((node.memory_gib for node in nodes_now()), default=0.0) * 2**30)
    on = f"{actors.gpus:g} GPU(s)" if actors.gpus else f"{actors.threads} thread(s)"
    print(f"{folder}: {actors.count} labelling actor(s) with {on} each", flush=True)
    end = {"run_uri": run.uri, "folder": folder, "settings": config.pseudo, "side": side}
    dataset = (
        ray.data.from_items(todo, override_num_blocks=len(todo))
        .map(
            decode_shard,
            fn_kwargs={"imgsz": side, "train": config.train},
            num_cpus=DECODE_CPUS,
            memory=min(decoding_memory(todo, side), largest),  # what no node has, Ray would wait for
        )
        .map(
            TeacherActor,
            fn_constructor_args=(run.uri, config, tuple(weights), tuple(names), actors.threads, actors.gpus > 0),
            compute=ray.data.ActorPoolStrategy(size=actors.count),
            num_cpus=actors.cpus,
            num_gpus=actors.gpus or None,
        )
        .map(fuse_and_write, fn_kwargs=end, num_cpus=DECODE_CPUS)
    )
    store_bytes = float(ray.cluster_resources().get("object_store_memory", 2**30)) * STORE_SHARE
    limits = ray.data.ExecutionResources.for_limits(object_store_memory=store_bytes)
    dataset.context.execution_options.resource_limits = limits
    asked = f"{actors.count} actor(s) with {actors.cpus:g} CPUs" + (
        f" and {actors.gpus:g} GPU(s)" if actors.gpus else ""
    )
    with Silence(lambda waited: f"{folder}: no shard for {waited}; {asked} are asked for, {free()} free") as silence:
        for row in dataset.iter_rows():
            silence.heard()
            tally.add(row)
