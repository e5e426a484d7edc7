"""The driver of a sweep: resources, shared stages, Ray Tune, and what is left when it ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from dfssd.config import Config
from dfssd.errors import DfssdError
from dfssd.runtime.cluster import Resources
from dfssd.runtime.progress import clock
from dfssd.runtime.records import flatten
from dfssd.runtime.storage import Storage
from dfssd.runtime.tracking import Runs
from dfssd.sweep import population, shared
from dfssd.sweep.points import Trial, draw, make_trial, name_row, own_point
from dfssd.sweep.space import Space
from dfssd.sweep.trial import Plan, folder, run_once

TRIAL_MEMORY_GIB = 2.0  # one worker with its loader and cache at 640 px, seen
RETRIES = 2  # of a trial whose process died; it goes on from its newest checkpoint
NESTED = {"memory": 1_000_000}  # a trial that only waits for its worker group; Tune takes neither nothing nor 0 CPUs


def share(config: Config, trials: int, max_concurrent: int) -> tuple[int, Resources]:
    """How many trials run at a time, and what a worker of each gets; so many that all of them always fit.

    Raises:
        DfssdError: not even one fits.
    """
    from dfssd.runtime.cluster import ask_of, wait_for_room
    from dfssd.runtime.placement import place_trials

    run = config.run
    if run.elastic or run.num_workers == "auto":
        raise DfssdError(
            f"--num-workers {run.num_workers}: a trial has a fixed number of workers", todo="give a number"
        )
    ask = ask_of(run)
    bundle = {"CPU": float(max(1, ask.cpus)), **({"GPU": 1.0} if run.gpu == "require" else {})}
    return wait_for_room(
        run, lambda nodes: place_trials(nodes, ask, trials, max_concurrent, TRIAL_MEMORY_GIB), bundle, ask.low
    )


class Progress(tune.Callback):
    """A line for each trial that ends; what a scheduler has stopped is remembered as such."""

    def __init__(self, config: Config, sweep: str, count: int, runs: Runs, metric: str) -> None:
        self.config, self.sweep, self.count, self.metric = config, sweep, count, metric
        self.runs, self.begun, self.done = runs, time.monotonic(), 0
        self.reports: dict[str, list[dict[str, float]]] = {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        row = {k: v for k, v in result.items() if k == "step" or k.startswith("val/")}
        self.reports.setdefault(trial.trial_id, []).append(row)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        own = trial_of(trial.config, self.config, self.sweep)
        store, rows = folder(own), self.reports.get(trial.trial_id, [])
        self.done += 1
        said = "stopped early"
        if store.exists("failed.json"):
            said = "failed: " + store.read_json("failed.json")["error"].splitlines()[0]
        elif store.exists("result.json"):
            said = "finished"
        elif rows and not store.exists("stopped.json"):  # a resumed sweep reports it again, and may stop it sooner
            end = {"trial": own.id, "settings": flatten(own.settings), "reports": rows}
            store.write_json("stopped.json", end)
            started = f"{own.stage}/started.json"
            run_id = str(store.read_json(started).get("mlflow_run_id") or "") if store.exists(started) else ""
            self.runs.end(run_id, "KILLED")
        last = f" at step {rows[-1]['step']:.0f}, {self.metric} {rows[-1].get(self.metric, 0.0):.4f}" if rows else ""
        left = (time.monotonic() - self.begun) / self.done * (self.count - self.done)
        print(
            f"sweep: {self.done}/{self.count} trials  {own.row}, seed {own.seed}: {said}{last}  left {clock(left)}",
            flush=True,
        )


def trial_of(point: dict[str, Any], config: Config, sweep: str) -> Trial:
    """The trial that a point of Tune's parameter space means; one that a search has drawn is called by its settings."""
    own = point["point"]
    settings = dict(own["settings"])
    return make_trial(config, sweep, own["row"] or name_row("", settings), own["seed"], settings, own["origin"])


def parameters(space: Space, points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tune's parameter space: the trials one by one, or what a search draws from."""
    if space.search == "optuna":
        axes = {k: tune.choice(list(v)) if isinstance(v, list | tuple) else v for k, v in space.axes.items()}
        return {"point": {"row": "", "seed": space.seeds[0], "order": 0, "settings": axes, "origin": ""}}
    return {"point": tune.grid_search(points)}


def tune_config(
    space: Space, config: Config, sweep: str, concurrent: int, known: Sequence[tuple[dict[str, Any], float]]
) -> tune.TuneConfig:
    """Search and scheduler.

    Args:
        known: (settings, last metric) of trials that an earlier start of this sweep has ended; a search learns from them.
    """
    scheduler = search = None
    if space.scheduler == "asha":
        scheduler = ASHAScheduler(
            time_attr="step",
            max_t=config.train.steps + 1,  # reaching max_t would count as stopped
            grace_period=max(1, round(space.grace * config.train.steps)),
            reduction_factor=space.reduction,
        )
    elif space.scheduler == "pbt":
        scheduler = population.scheduler(space, config, sweep)
    samples = 1
    if space.search == "optuna":
        first = own_point(space.axes, config)  # so that the table says what the search is better than
        points = [settings for settings, _ in known] or ([first] if first else [])
        search = OptunaSearch(
            metric=space.metric,
            mode=space.mode,
            points_to_evaluate=[{f"point/settings/{k}": v for k, v in point.items()} for point in points] or None,
            evaluated_rewards=[value for _, value in known] or None,
            seed=space.seeds[0] + len(known),
        )
        samples = space.trials - len(known)
    return tune.TuneConfig(
        metric=space.metric,
        mode=space.mode,
        num_samples=samples,
        # A population must be there as a whole: its trials take turns, and CPUs bound how many run at a time.
        max_concurrent_trials=None if space.scheduler == "pbt" else concurrent,
        scheduler=scheduler,
        search_alg=search,
        trial_dirname_creator=lambda trial: trial.trial_id,
    )


def records(storage: Storage, sweep: str) -> list[dict[str, Any]]:
    """Results of all finished trials, in the order of the table."""
    found = _left(storage, sweep, "result.json")
    return sorted(found, key=lambda record: (record["order"], record["row"], record["seed"]))


def stopped(storage: Storage, sweep: str) -> list[dict[str, Any]]:
    """What is left of the trials that a scheduler has stopped: settings and reports."""
    return _left(storage, sweep, "stopped.json")


def _left(storage: Storage, sweep: str, name: str) -> list[dict[str, Any]]:
    """This file of each trial that has left one."""
    place = storage.at(f"{sweep}/trials")
    return [place.read_json(f"{trial}/{name}") for trial in place.folders() if place.exists(f"{trial}/{name}")]


def ended(storage: Storage, sweep: str, metric: str) -> list[tuple[dict[str, Any], float]]:
    """(settings, last value of the metric) of each trial that has run to its end or was stopped early."""
    done = [(record["settings"], record["result"][metric]) for record in records(storage, sweep)]
    early = [(one["settings"], one["reports"][-1]) for one in stopped(storage, sweep)]
    return done + [(settings, last[metric]) for settings, last in early if metric in last]


def steps_run(storage: Storage, sweep: str, done: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """(steps that all trials ran, trials that a scheduler stopped early)."""
    early = stopped(storage, sweep)
    ends = [record["reports"][-1]["step"] for record in early] + [record["result"]["step"] for record in done]
    return int(sum(ends)), len(early)


def check_shareable(space: Space, config: Config, sweep: str) -> None:
    """A search draws its points one by one, so what comes before the trials must not depend on them.

    Raises:
        DfssdError: it does.
    """
    if space.search != "optuna" and space.scheduler != "pbt":
        return
    if space.scheduler == "pbt" and config.run.workers[0] > 1:
        raise DfssdError("SCHEDULER pbt runs trials of one worker", todo="set --num-workers 1, or take asha")
    rng = np.random.default_rng(0)
    drawn = [make_trial(config, sweep, "", space.seeds[0], draw(space.axes, rng)) for _ in range(8)]
    if len({tuple(shared.needed([trial], sweep)) for trial in drawn}) > 1:
        raise DfssdError(
            f"{'SCHEDULER pbt' if space.scheduler == 'pbt' else 'SEARCH optuna'} over a setting that data set, teacher or "
            "pseudo-labels depend on",
            where=", ".join(space.axes),
            todo='take SEARCH = "grid" or "random" without it, which make them once for each value beforehand',
        )


def probes(space: Space, config: Config, sweep: str, trials: Sequence[Trial]) -> Sequence[Trial]:
    """Trials from which the shared stages follow: all that are known, or any one of a search."""
    if space.search != "optuna":
        return trials
    return [make_trial(config, sweep, "", space.seeds[0], draw(space.axes, np.random.default_rng(0)))]


def run_trials(config: Config, space: Space, sweep: str, trials: Sequence[Trial], limit: int, runs: Runs) -> list[str]:
    """Make what the trials share, then run them; return what failed, a line each.

    Args:
        limit: most trials at a time; 0: as many as fit.
    """
    parent, storage = runs.parent(), Storage(config.run.storage_path)
    known = ended(storage, sweep, space.metric)
    wanted = space.trials if space.search == "optuna" else len(trials)
    count, resources = share(config, wanted, limit)
    tags = {"sweep": sweep, "space": space.name, "kind": "shared"}
    for trial, name in shared.needed(probes(space, config, sweep, trials), sweep).values():
        shared.make(trial.config, sweep, name, parent, tags)
    if space.search == "optuna" and len(known) >= space.trials:
        return []
    own = config.run.workers[0] == 1
    print(
        f"sweep: {wanted} trials, {len(known)} of them ended before; {count} at a time, each "
        f"{resources.describe(config.run.num_workers)}",
        flush=True,
    )
    plan = Plan.of(sweep, space, parent, resources)

    def trainable(point: dict[str, Any]) -> None:
        run_once(trial_of(point, config, sweep), plan, point["point"]["order"])

    callbacks: list[tune.Callback] = [Progress(config, sweep, wanted, runs, space.metric)]
    points: list[dict[str, Any]] = [{"order": k, **population.identity(trial)} for k, trial in enumerate(trials)]
    if space.scheduler == "asha":
        points = for_asha(points, space, config)
    if space.scheduler == "pbt":
        points = population.members(storage, sweep, points)
        callbacks.append(population.Census(storage, sweep, points, runs))
        points = [p for p in points if not storage.exists(f"{sweep}/trials/{p['id']}/result.json")]
        if not points:
            return []
    needs = {"cpu": resources.cpus, **({"gpu": 1} if resources.gpu else {})} if own else NESTED
    tuner = tune.Tuner(
        tune.with_resources(trainable, needs),
        param_space=parameters(space, points),
        tune_config=tune_config(space, config, sweep, count, known),
        run_config=tune.RunConfig(
            name=f"{time.time_ns()}",  # our own folders make a resumed sweep, so that a cut snapshot of Tune harms none
            storage_path=storage.at(sweep, "tune").uri,
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            callbacks=callbacks,
            verbose=0,
        ),
    )
    return [line for outcome in tuner.fit() for line in failure(outcome, config, sweep)]


def for_asha(points: Sequence[dict[str, Any]], space: Space, config: Config) -> list[dict[str, Any]]:
    """The points in the order in which ASHA should meet them.

    It measures a trial against those before it: sorted by a setting, as a grid is, each could be the best so far, so they
    are shuffled. And it never stops the first one: that had better be the config's own values, where they are among them,
    which are hard to beat and what the others are compared with (docs/results.md has what that saves).
    """
    own = own_point(space.axes, config)
    shuffled = [points[k] for k in np.random.default_rng(space.seeds[0]).permutation(len(points))]
    return sorted(shuffled, key=lambda p: {k: v for k, v in p["settings"].items() if k in space.axes} != own)


def failure(outcome: tune.Result, config: Config, sweep: str) -> list[str]:
    """Why a trial failed, as one line of a list; none where it did not."""
    trial = trial_of(outcome.config, config, sweep)
    said = str(outcome.error or "").strip().splitlines()[-1:]
    if folder(trial).exists("failed.json"):
        said = [folder(trial).read_json("failed.json")["error"].replace("\n", "\n      ")]
    return [f"{trial.row}, seed {trial.seed}: {line}" for line in said]
