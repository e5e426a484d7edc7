"""The trials that a space means: its points, each with all settings of a run."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from pydantic import ValidationError
from ray.tune.search.sample import Domain, Float, Integer, Sampler

from dfssd.config import Config
from dfssd.errors import DfssdError
from dfssd.runtime.artefact_names import LABEL_ONLY, STUDENT, ArtefactName
from dfssd.runtime.records import flatten
from dfssd.sweep.space import Space, values_of

METHODS = {"distill": STUDENT, "label_only": LABEL_ONLY}  # by what the method trains


@dataclass(frozen=True)
class Trial:
    """One point of a space with one seed.

    Args:
        row: what the table calls the point.
        settings: dotted key -> value, as drawn from the space.
        config: all settings of the run; its run name lies below that of the sweep.
        origin: id of the trial whose weights it goes on from (`population`), with a number of its own; '' for none.
    """

    row: str
    seed: int
    settings: dict[str, Any] = field(hash=False)
    config: Config = field(hash=False)
    origin: str = ""

    @property
    def stage(self) -> ArtefactName:
        return METHODS[self.settings.get("method", "distill")]

    @property
    def id(self) -> str:
        """Digest of what makes the trial: the same settings give the same folder, and so resume."""
        parts = [self.row, self.seed, self.settings, *([self.origin] if self.origin else [])]
        text = json.dumps(parts, sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


def points(space: Space) -> list[tuple[str, dict[str, Any]]]:
    """(row, settings) of all points in order: the grid, or as many as TRIALS drawn with the first seed.

    A search that learns from its results (`optuna`) has no points beforehand, and gives none.
    """
    if space.search == "optuna":
        return []
    rows = space.rows or {"": {}}
    if space.search == "grid":
        grids = [[(key, value) for value in values_of(axis) or []] for key, axis in space.axes.items()]
        drawn = [dict(point) for point in itertools.product(*grids)]
    else:
        rng = np.random.default_rng(space.seeds[0])
        drawn = [draw(space.axes, rng) for _ in range(space.trials)]
    return [(name_row(row, point), {**fixed, **point}) for row, fixed in rows.items() for point in drawn]


def draw(axes: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """One random point."""
    point: dict[str, Any] = {}
    for key, axis in axes.items():
        values = values_of(axis)
        if values is not None:
            point[key] = values[int(rng.integers(len(values)))]
        else:
            point[key] = axis.sample(random_state=rng) if isinstance(axis, Domain) else axis
    return point


def own_point(axes: Mapping[str, Any], config: Config) -> dict[str, Any] | None:
    """The config's own values on these axes, or None where one lies outside its axis."""
    settings, point = flatten(config.model_dump()), dict[str, Any]()
    for key, axis in axes.items():
        own = settings.get(key)
        values = values_of(axis) or getattr(axis, "categories", None)
        if values is not None:
            same = [v for v in values if v == own or (isinstance(v, list | tuple) and list(v) == list(own or ()))]
            if not same:
                return None
            point[key] = same[0]
        elif isinstance(axis, Float | Integer) and own is not None and within(axis, own) == own:
            point[key] = own
        else:
            return None
    return point


def within(axis: Any, value: Any) -> Any:
    """The value, moved into the range it was drawn from: multiplying may have left it."""
    if isinstance(axis, Float | Integer) and isinstance(axis, Domain):
        lower, upper = axis.lower, axis.upper - (1 if isinstance(axis, Integer) else 0)
        return type(value)(min(max(value, lower), upper))
    return value


def name_row(row: str, point: Mapping[str, Any]) -> str:
    """What the table calls a point: its row, and the settings of its own by their last name."""
    own = ", ".join(f"{key.rsplit('.', 1)[-1]} {short(value)}" for key, value in point.items())
    return ", ".join(part for part in (row, own) if part)


def short(value: Any) -> str:
    """A value as one writes it: few digits, layers with commas."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def apply(config: Config, settings: Mapping[str, Any]) -> Config:
    """A copy of the config with dotted keys set, checked as a whole.

    Raises:
        DfssdError: a value that the config does not allow, with its key.
    """
    tree = config.model_dump()
    for key, value in settings.items():
        if key == "method":
            if value not in METHODS:
                raise DfssdError(f"method is {value!r}", todo=f"give one of {', '.join(METHODS)}")
            continue
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place[section]
        place[name] = value
    try:
        return Config(**tree)
    except ValidationError as error:
        said = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()
        )
        raise DfssdError(f"the point {dict(settings)} is not allowed: {said}") from error


def make_trial(config: Config, sweep: str, row: str, seed: int, settings: dict[str, Any], origin: str = "") -> Trial:
    """A trial with its own run name, `<sweep>/trials/<id>`."""
    own = Trial(row, seed, settings, apply(config, settings), origin)
    run = own.config.run.model_copy(update={"seed": seed, "run_name": f"{sweep}/trials/{own.id}"})
    return replace(own, config=own.config.model_copy(update={"run": run}))


def trials(space: Space, config: Config, sweep: str) -> list[Trial]:
    """All trials of a grid or random search, the seeds of a point one after another."""
    found: dict[str, Trial] = {}
    for row, settings in points(space):
        for seed in space.seeds:
            trial = make_trial(config, sweep, row, seed, settings)
            found.setdefault(trial.id, trial)
    return list(found.values())


def in_words(axis: Any) -> str:
    """An axis in words that are the same in every process; `str` of Ray Tune's domains names an address in memory."""
    if isinstance(axis, Domain | Sampler):
        own = ", ".join(f"{k} {in_words(v)}" for k, v in sorted(vars(axis).items()))
        return f"{type(axis).__name__.strip('_')}({own})"
    return str(getattr(axis, "__qualname__", axis))
