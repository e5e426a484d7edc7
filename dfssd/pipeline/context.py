"""What the stages of one pipeline share."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dfssd.config import Config
from dfssd.runtime.artefact_names import DATASET, ArtefactName
from dfssd.runtime.records import flatten
from dfssd.runtime.storage import Storage
from dfssd.runtime.tracking import Runs

if TYPE_CHECKING:
    from dfssd.train.job import TrainJob

Planned = Collection[ArtefactName]
"""Stages that are planned before one, in a dry run."""

Result = tuple[dict[str, Any], list[str]]
"""What a body returns: the summary, and the names of the files it has left."""


@dataclass
class Context:
    """One pipeline: settings, storage of the run, MLflow runs.

    Args:
        fit: trains a job where it is not a worker group of Ray Train that shall do it, as in a sweep's trial.
        title, tags: name and further tags of the MLflow runs of stages; with tags they get all settings as parameters.
    """

    config: Config
    fit: Callable[[TrainJob], dict[str, Any]] | None = None
    title: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    run: Storage = field(init=False)
    runs: Runs = field(init=False)

    def __post_init__(self) -> None:
        run = self.config.run
        storage = Storage(run.storage_path)
        self.run = storage.at(run.run_name)
        self.runs = Runs(storage, run.experiment, run.run_name, flatten(self.config.model_dump(mode="json")), self.tags)

    def log_dataset(self, run_id: str) -> None:
        """Log the split, by its digest, as the data set of an MLflow run and of the pipeline's."""
        record = self.run.read_json(f"{DATASET}/stage.json")
        profile = {k: record["summary"][k] for k in ("images", "labelled_images", "groups")}
        for own in (run_id, self.runs.parent()):
            self.runs.dataset(own, self.run.path(str(DATASET), "manifest.parquet"), record["digest"], profile)
