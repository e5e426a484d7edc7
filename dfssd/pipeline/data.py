"""Stage `dataset`."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from dfssd.config import Data
from dfssd.data.formats import read_source
from dfssd.data.prepare import prepare
from dfssd.data.source import unlabelled_items
from dfssd.pipeline.context import Context, Result
from dfssd.pipeline.stages import Planned
from dfssd.report.tables import split_table
from dfssd.runtime.artefact import Stage


class Found(NamedTuple):
    """What the data holds: images in all, those with a label file, and the format."""

    images: int
    labelled: int
    format: str


@lru_cache(1)
def count_images(config: Data) -> Found:
    """Read the data's list of images and labels, without opening an image.

    Raises:
        DfssdError: it cannot be read, or it is of no known format.
    """
    source = read_source(config.data, config.format, config.names)
    labelled = sum(item.label is not None for item in source.items)
    return Found(len(source.items) + len(unlabelled_items(config)[0]), labelled, source.format)


def needs(context: Context, stage: Stage, planned: Planned) -> list[str]:
    """The data can be read.

    Raises:
        DfssdError: it cannot.
    """
    found = count_images(context.config.data)
    return [f"data: {found.images} images ({found.labelled} with a label file) as {found.format}"]


def prepare_stage(context: Context, stage: Stage, run_id: str) -> Result:
    """Check, group, split; leave the manifest."""
    summary = prepare(context.config.data, context.config.run.seed, stage.store)
    print(split_table(summary), flush=True)
    for name in ("groups.png", "split.csv"):
        context.runs.artefact(run_id, name, stage.store.read(name))
    return summary, [f for f in stage.store.files() if f != "started.json"]
