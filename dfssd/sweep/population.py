"""Population based training: a poor trial goes on from a good one's weights, with settings near the good one's.

Jaderberg et al., Population Based Training of Neural Networks, 2017. Ray Tune decides who takes over from whom. A trial
that takes over is a trial of its own here, with a folder, a run in MLflow and an origin: so it resumes like any other, and
the table shows which settings trained which part of a model. `population.json` keeps who is in the population now, for a
sweep that is resumed.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray import tune
from ray.tune.schedulers import PopulationBasedTraining

from dfssd.config import Config
from dfssd.pipeline.training import train_job
from dfssd.runtime.storage import Storage
from dfssd.runtime.tracking import Runs
from dfssd.sweep.points import Trial, make_trial, name_row, within
from dfssd.sweep.space import Space, values_of
from dfssd.train import checkpoint

FILE = "population.json"
CLOCK = "population_step"  # 0 in the report of a finished trial, which is no longer in the game


def scheduler(space: Space, config: Config, sweep: str) -> PopulationBasedTraining:
    """Ray Tune's PBT on the points of this space.

    A quarter of the population takes over from the best quarter every `space.perturb` of the steps; a setting is
    multiplied by 0.8 or 1.2, or drawn anew with probability 0.25 (the paper's `perturb` and `resample`).
    """
    mutations = {k: list(v) if (v := values_of(axis)) is not None else axis for k, axis in space.axes.items()}
    return PopulationBasedTraining(
        time_attr=CLOCK,
        perturbation_interval=max(1, round(space.perturb * config.train.steps)),
        hyperparam_mutations={"point": {"settings": mutations}},
        custom_explore_fn=explorer(space.axes, config, sweep),
        log_config=False,
    )


def explorer(axes: Mapping[str, Any], config: Config, sweep: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What makes a new trial of a point that Ray Tune has copied from the good one and changed."""

    def explore(point: dict[str, Any]) -> dict[str, Any]:
        own = dict(point["point"])
        settings = {key: within(axes[key], value) for key, value in own["settings"].items()}
        # Two trials may take the same settings over from the same origin: only the number tells them apart.
        origin = f"{own['id']}/{uuid.uuid4().hex[:6]}"
        row = name_row("", settings)
        return {"point": {**own, **identity(make_trial(config, sweep, row, own["seed"], settings, origin))}}

    return explore


def identity(trial: Trial) -> dict[str, Any]:
    """What a point of Tune's parameter space holds of a trial."""
    return {
        "row": trial.row,
        "seed": trial.seed,
        "settings": dict(trial.settings),
        "id": trial.id,
        "origin": trial.origin,
    }


def members(storage: Storage, sweep: str, points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The population: as it was when the driver ended, or as planned."""
    place = storage.at(sweep)
    if not place.exists(FILE):
        return list(points)
    known = place.read_json(FILE)
    return [known.get(str(k), point) for k, point in enumerate(points)]


class Census(tune.Callback):
    """Writes down who is in the population, whenever a trial starts, and ends the MLflow run of who no longer is."""

    def __init__(self, storage: Storage, sweep: str, points: Sequence[dict[str, Any]], runs: Runs) -> None:
        self.store, self.now = storage.at(sweep), {str(k): dict(p) for k, p in enumerate(points)}
        self.runs = runs
        self.member: dict[str, str] = {}  # of Tune's trial; its point's own id changes

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        own = dict(trial.config["point"])
        place = self.member.get(trial.trial_id)
        if place is None:
            place = next(k for k, p in self.now.items() if p["id"] == own["id"])
            self.member[trial.trial_id] = place
        elif self.now[place]["id"] != own["id"]:
            said = f"sweep: {self.now[place]['row']} ends here; goes on as {own['row']} from trial {own['origin']}"
            print(said, flush=True)
            started = f"trials/{self.now[place]['id']}/student/started.json"
            if self.store.exists(started):
                self.runs.end(str(self.store.read_json(started).get("mlflow_run_id") or ""), "KILLED")
        self.now[place] = own
        self.store.write_json(FILE, self.now)


def take_over(trial: Trial, sweep: str) -> None:
    """Put the origin's newest checkpoint where the trial will look for its own, unless it has one."""
    if not trial.origin:
        return
    trials = Storage(trial.config.run.storage_path).at(f"{sweep}/trials")
    own = trials.at(f"{trial.id}/{trial.stage}/train")
    if any(name.startswith("step_") for name in own.folders()):
        return
    origin = trial.origin.split("/")[0]
    state = checkpoint.load_newest(trials.at(f"{origin}/{trial.stage}/train"), None)
    if state is None:
        print(f"WARNING: trial {origin} has left no checkpoint, {trial.row} trains from the beginning", flush=True)
        return
    fingerprint = train_job(trial.config, trials.at(trial.id), trial.stage).fingerprint()
    checkpoint.store_newest(own, state["step"], {**state, "fingerprint": fingerprint}, keep=1)
