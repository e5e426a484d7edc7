"""Stage `dataset`."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from dfssd.config import Config, Data
from dfssd.data.formats.listing import refuse_query
from dfssd.data.formats.read import read_source
from dfssd.data.formats.source import Item, Source, unlabelled_items
from dfssd.data.formats.unpack import resolve_zip
from dfssd.data.preparation.corrections import added_classes, digest_of, read_corrections, with_new_classes
from dfssd.data.preparation.prepare import prepare
from dfssd.data.preparation.versions import as_previous, changes, content_digest, keep_version, listing_digest
from dfssd.errors import DfssdError
from dfssd.pipeline.context import Context, Planned, Result
from dfssd.report.audit_page import write_audit
from dfssd.report.tables import split_table
from dfssd.runtime.artefact import Stage
from dfssd.runtime.artefact_names import DATASET, is_finished
from dfssd.runtime.records import differences
from dfssd.runtime.storage import Storage, is_remote


class Found(NamedTuple):
    """What the data holds: images in all, those whose labels are known, and the format."""

    images: int
    labelled: int
    format: str


@lru_cache(1)
def _read(config: Data, run: str) -> tuple[Source, list[Item]]:
    """Labels and list of images, without opening an image; a .zip is unpacked below the run."""
    source = read_source(resolve_zip(config.data, Storage(run)), config.format, config.names)
    source.names = with_new_classes(source.names, added_classes(Storage(run)))
    return source, unlabelled_items(config)[0]


def _run_of(config: Config) -> str:
    return Storage(config.run.storage_path).at(config.run.run_name).uri


def content(config: Config) -> str:
    """Digest of the data's images and labels; '' where no data is named, as in jobs that read the artefact alone.

    Raises:
        DfssdError: the data cannot be read.
    """
    if not config.data.data:
        return ""
    for uri in (config.data.data, *config.data.unlabelled):
        refuse_query(uri)
    if is_remote(config.data.data) and not config.data.data.endswith((".yaml", ".yml", ".zip")):
        digest = listing_digest([config.data.data, *config.data.unlabelled])
    else:
        digest = content_digest(*_read(config.data, _run_of(config)))
    corrected = digest_of(read_corrections(Storage(_run_of(config))))
    return digest + (f"+{corrected}" if corrected else "")


def count_images(config: Config) -> Found:
    """Read the data's list of images and labels, without opening an image.

    Raises:
        DfssdError: it cannot be read, or it is of no known format.
    """
    source, extra = _read(config.data, _run_of(config))
    background = config.data.missing_labels == "background"
    labelled = sum(background or item.label is not None for item in source.items)
    return Found(len(source.items) + len(extra), labelled, source.format)


def needs(context: Context, stage: Stage, planned: Planned) -> list[str]:
    """The data can be read.

    Raises:
        DfssdError: it cannot.
    """
    found = count_images(context.config)
    return [f"data: {found.images} images ({found.labelled} labelled) as {found.format}"]


def renew(context: Context, stage: Stage) -> None:
    """The finished data set differs from what is asked for. Where only images or labels have changed, say what, and with
    `--update` make room for the next version; else leave it to the caller.

    Raises:
        DfssdError: they have changed, and no update is asked for.
    """
    if not is_finished(context.run, DATASET):
        return
    recorded = stage.store.read_json("stage.json")
    if any(
        not line.startswith("config.data.data:")
        for line in differences({"config": recorded["config"]}, {"config": stage.config})
    ):
        return
    previous, corrections = as_previous(stage.store, 0), read_corrections(context.run)
    source, extra = _read(context.config.data, _run_of(context.config))
    lines = changes(previous, source, extra, corrections).lines()
    lines = lines or ["files have changed, but no label of an image that was there before"]
    again = [
        folder
        for folder in context.run.folders()
        if context.run.exists(f"{folder}/stage.json") and folder != str(DATASET)
    ]
    then = (
        f"made from the earlier labels, to be made again: {', '.join(again)}"
        if again
        else "nothing was made from it yet"
    )
    if not context.config.data.update:
        raise DfssdError(
            "the data has changed since it was prepared:\n    " + "\n    ".join(lines) + f"\n  {then}",
            where=stage.store.uri,
            todo="add --update for the next version of the data set (every earlier image keeps its split), and --overwrite "
            "to make again what was made from it; or take a new --run-name",
        )
    number = keep_version(stage.store)
    print(f"{DATASET}: version {number + 1}: " + "; ".join(lines) + f". {then}", flush=True)
    stage.store.delete("stage.json")
    stage.store.write_json("started.json", {**stage.key(), "mlflow_run_id": None})


def prepare_stage(context: Context, stage: Stage, run_id: str) -> Result:
    """Check, group, split; leave the manifest."""
    summary = prepare(context.config.data, context.config.run.seed, stage.store, context.config.run)
    print(split_table(summary), flush=True)
    write_audit(stage.store, summary, context.config.train.imgsz)
    print(f"what to look at before training: {stage.store.path('audit.html')}", flush=True)
    for name in ("groups.png", "split.csv", "audit.html"):
        context.runs.artefact(run_id, name, stage.store.read(name))
    # Pages for people and earlier versions are no part of what later stages depend on.
    return summary, [f for f in stage.store.files() if f not in ("started.json", "audit.html") and "/" not in f]
