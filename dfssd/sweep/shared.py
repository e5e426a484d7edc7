"""Stages before the trials: each made once for all trials that need the same, found by a digest of what it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from dfssd.config import Config
from dfssd.pipeline.context import Context
from dfssd.pipeline.run import run_stage
from dfssd.pipeline.stages import make_stage
from dfssd.runtime.artefact_names import ArtefactName, is_finished
from dfssd.runtime.storage import Storage
from dfssd.sweep.points import Trial

KEY_CHARACTERS = 10


def chain(config: Config, name: ArtefactName, run: Storage) -> str:
    """Digest of the settings of a stage and of all stages before it."""
    stage = make_stage(config, run, name)
    text = json.dumps([str(name), stage.config, [chain(config, i, run) for i in stage.inputs]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_CHARACTERS]


def folder_of(config: Config, sweep: str, name: ArtefactName) -> str:
    """Run name of the folder in which a sweep makes the stage."""
    nowhere = Storage(config.run.storage_path).at(sweep)
    return f"{sweep}/shared/{name}-{chain(config, name, nowhere)}"


def inputs_of(trial: Trial, sweep: str) -> tuple[ArtefactName, ...]:
    """Artefacts that a trial reads."""
    return make_stage(trial.config, Storage(trial.config.run.storage_path).at(sweep), trial.stage).inputs


def needed(trials: Iterable[Trial], sweep: str) -> dict[str, tuple[Trial, ArtefactName]]:
    """By folder: (a trial it is for, stage), in the order in which they can be made; each folder once."""
    found: dict[str, tuple[Trial, ArtefactName]] = {}

    def add(trial: Trial, name: ArtefactName) -> None:
        place = folder_of(trial.config, sweep, name)
        if place in found:
            return
        for own in make_stage(trial.config, Storage(trial.config.run.storage_path).at(sweep), name).inputs:
            add(trial, own)
        found[place] = (trial, name)

    for trial in trials:
        for name in inputs_of(trial, sweep):
            add(trial, name)
    return found


def make(config: Config, sweep: str, name: ArtefactName, parent: str, experiment_tags: dict[str, str]) -> None:
    """Run one shared stage in its folder; its inputs are there or are copied from theirs.

    Args:
        parent: MLflow run of the sweep, that of the stage is nested in.
    """
    place = folder_of(config, sweep, name)
    own = config.model_copy(update={"run": config.run.model_copy(update={"run_name": place})})
    copy_inputs(own, sweep, name)
    adopt(own, parent)
    run_stage(Context(own, title=f"{sweep}/{name}", tags=experiment_tags), name)


def copy_inputs(config: Config, sweep: str, name: ArtefactName) -> None:
    """Copy the inputs of a stage into the run from where the sweep has made them."""
    storage = Storage(config.run.storage_path)
    run = storage.at(config.run.run_name)
    for own in make_stage(config, run, name).inputs:
        copy(storage.at(folder_of(config, sweep, own)), run, own)


def copy(source: Storage, target: Storage, name: ArtefactName) -> None:
    """Copy a finished artefact, `stage.json` last, so that one that was cut off does not count; without checkpoints."""
    if is_finished(target, name):
        return
    for file in (*source.read_json(f"{name}/stage.json")["outputs"], "started.json", "stage.json"):
        target.write(f"{name}/{file}", source.read(f"{name}/{file}"))


def adopt(config: Config, parent: str) -> None:
    """Make the sweep's MLflow run the parent of this run's stages."""
    run = Storage(config.run.storage_path).at(config.run.run_name)
    if parent and not run.exists("run.json"):
        run.write_json("run.json", {"mlflow_run_id": parent, "experiment": config.run.experiment})
