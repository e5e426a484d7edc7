"""What a file in `tune_spaces/` says, checked, and the trials that it means.

A space is plain Python with upper-case names:

    SPACE      dotted config keys -> a list, `tune.grid_search([...])` or a `tune` domain
    ROWS       label -> {dotted key: value}; every row is combined with every point of SPACE
    BASE       dotted key -> value that all trials share; the command line goes before it
    METRIC     what is compared, default "val/map50"; MODE "max" or "min"
    SEEDS      seeds of the whole run (split, teacher, student); every point is run with each
    SEARCH     "grid", "random" or "optuna" (TPE); TRIALS: how many points the last two draw
    SCHEDULER  "none" or "asha"; GRACE: share of the steps that no trial is stopped before; REDUCTION: ASHA's eta
    X          keys that a curve is drawn over, the first one that a trial sets; none: dots

`method` beside the config's keys is "distill" or "label_only": the student, or the same student on labels alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import runpy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from ray.tune.search.sample import Domain

from dfssd.config import Config
from dfssd.errors import DfssdError, nearest

METHODS = ("distill", "label_only")
CHOICES = {
    "MODE": ("max", "min"),
    "SEARCH": ("grid", "random", "optuna"),
    "SCHEDULER": ("none", "asha"),
}
DEFAULTS: dict[str, Any] = {
    "SPACE": {},
    "ROWS": {},
    "BASE": {},
    "METRIC": "val/map50",
    "MODE": "max",
    "SEEDS": (0,),
    "SEARCH": "grid",
    "TRIALS": 0,
    "SCHEDULER": "none",
    "GRACE": 0.2,
    "REDUCTION": 3,
    "X": (),
}


@dataclass(frozen=True)
class Space:
    """A checked space; see the module for the fields."""

    name: str
    doc: str
    axes: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    base: dict[str, Any]
    metric: str
    mode: str
    seeds: tuple[int, ...]
    search: str
    trials: int
    scheduler: str
    grace: float
    reduction: int
    x: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """One point of a space with one seed.

    Args:
        row: what the table calls the point.
        settings: dotted key -> value, as drawn from the space.
        config: all settings of the run; its run name lies below that of the sweep.
    """

    row: str
    seed: int
    settings: dict[str, Any] = field(hash=False)
    config: Config = field(hash=False)

    @property
    def stage(self) -> str:
        return "label_only" if self.settings.get("method") == "label_only" else "student"

    @property
    def id(self) -> str:
        """Digest of what makes the trial: the same settings give the same folder, and so resume."""
        text = json.dumps([self.row, self.seed, self.settings], sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


def config_keys() -> dict[str, None]:
    """All dotted keys of the config, in order."""
    keys: dict[str, None] = {}
    for name, info in Config.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and hasattr(section, "model_fields"):
            keys |= {f"{name}.{key}": None for key in section.model_fields}
        else:
            keys[name] = None
    return keys


def load_space(path: str) -> Space:
    """Read and check a file of a space.

    Raises:
        DfssdError: no such file, an error in it, or a name, key or value that cannot be.
    """
    file = Path(path)
    if not file.is_file():
        known = sorted(p.name for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        raise DfssdError(
            f"there is no space {path}{nearest(file.name, known)}",
            todo=f"give one of {', '.join(known)}" if known else "give a Python file, see tune_spaces/",
        )
    try:
        found = runpy.run_path(path)
    except Exception as error:  # whatever a user's file raises is the user's to mend
        raise DfssdError(f"the space cannot be read: {type(error).__name__}: {error}", where=path) from error
    names = {k: v for k, v in found.items() if k.isupper() and not k.startswith("_")}
    for name in names:
        if name not in DEFAULTS:
            raise DfssdError(
                f"{name} is not a name that a space knows{nearest(name, DEFAULTS)}",
                where=path,
                todo=f"known are {', '.join(DEFAULTS)}; begin helpers of your own with _",
            )
    values = {**DEFAULTS, **names}
    for name, allowed in CHOICES.items():
        if values[name] not in allowed:
            raise DfssdError(f"{name} is {values[name]!r}", where=path, todo=f"give one of {', '.join(allowed)}")
    space = Space(
        name=file.stem,
        doc=str(found.get("__doc__") or "").strip(),
        axes=dict(values["SPACE"]),
        rows=dict(values["ROWS"]),
        base=dict(values["BASE"]),
        metric=values["METRIC"],
        mode=values["MODE"],
        seeds=tuple(values["SEEDS"]),
        search=values["SEARCH"],
        trials=int(values["TRIALS"]),
        scheduler=values["SCHEDULER"],
        grace=float(values["GRACE"]),
        reduction=int(values["REDUCTION"]),
        x=(values["X"],) if isinstance(values["X"], str) else tuple(values["X"]),
    )
    _check(space, path)
    return space


def _check(space: Space, path: str) -> None:
    known = [*config_keys(), "method"]
    for key in (*space.axes, *space.base, *space.x, *(k for row in space.rows.values() for k in row)):
        if key not in known:
            raise DfssdError(
                f"{key!r} is not a setting{_meant(key, known)}",
                where=path,
                todo="keys are section.field as in dfssd/config.py",
            )
        if key.startswith("run."):
            raise DfssdError(f"{key!r} cannot be swept: the sweep sets it", where=path, todo="SEEDS sets the seeds")
    if not space.axes and not space.rows:
        raise DfssdError("the space is empty", where=path, todo="give SPACE or ROWS")
    if not space.seeds:
        raise DfssdError("SEEDS is empty", where=path, todo="give at least one seed, SEEDS = (0,)")
    domains = [k for k, v in space.axes.items() if _values(v) is None]
    if space.search == "grid" and domains:
        raise DfssdError(
            f"{', '.join(domains)} cannot be enumerated, and SEARCH is 'grid'",
            where=path,
            todo='give lists, or SEARCH = "random" or "optuna" with TRIALS',
        )
    if space.search != "grid" and space.trials < 1:
        raise DfssdError(f"SEARCH is {space.search!r} without a budget", where=path, todo="set TRIALS")
    if space.search == "optuna" and (len(space.seeds) > 1 or space.rows):
        raise DfssdError(
            "a search by Optuna has one seed and no ROWS: it compares points, not seeds",
            where=path,
            todo="keep one seed, and run the best points again in a space of their own",
        )


def _meant(key: str, known: list[str]) -> str:
    """The nearest key; one that is called so in some section goes before one that only looks alike."""
    same = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return nearest(key, same) or (f", did you mean {same[0]!r}?" if same else nearest(key, known))


def _values(axis: Any) -> list[Any] | None:
    """What can be enumerated of an axis: a list, a grid, a choice; None for a range."""
    if isinstance(axis, Mapping) and set(axis) == {"grid_search"}:
        return list(axis["grid_search"])
    if isinstance(axis, list | tuple):
        return list(axis)
    return None


def points(space: Space) -> list[tuple[str, dict[str, Any]]]:
    """(row, settings) of all points in order: the grid, or as many as TRIALS drawn with the first seed.

    A search that learns from its results (`optuna`) has no points beforehand, and gives none.
    """
    if space.search == "optuna":
        return []
    rows = space.rows or {"": {}}
    if space.search == "grid":
        grids = [[(key, value) for value in _values(axis) or []] for key, axis in space.axes.items()]
        drawn = [dict(point) for point in itertools.product(*grids)]
    else:
        rng = np.random.default_rng(space.seeds[0])
        drawn = [draw(space.axes, rng) for _ in range(space.trials)]
    return [(name_row(row, point), {**fixed, **point}) for row, fixed in rows.items() for point in drawn]


def draw(axes: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """One random point."""
    point: dict[str, Any] = {}
    for key, axis in axes.items():
        values = _values(axis)
        if values is not None:
            point[key] = values[int(rng.integers(len(values)))]
        else:
            point[key] = axis.sample(random_state=rng) if isinstance(axis, Domain) else axis
    return point


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


def make_trial(config: Config, sweep: str, row: str, seed: int, settings: dict[str, Any]) -> Trial:
    """A trial with its own run name, `<sweep>/trials/<id>`."""
    own = Trial(row, seed, settings, apply(config, settings))
    run = own.config.run.model_copy(update={"seed": seed, "run_name": f"{sweep}/trials/{own.id}"})
    return Trial(row, seed, settings, own.config.model_copy(update={"run": run}))


def trials(space: Space, config: Config, sweep: str) -> list[Trial]:
    """All trials of a grid or random search, the seeds of a point one after another."""
    found: dict[str, Trial] = {}
    for row, settings in points(space):
        for seed in space.seeds:
            trial = make_trial(config, sweep, row, seed, settings)
            found.setdefault(trial.id, trial)
    return list(found.values())
