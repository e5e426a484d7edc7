"""What a file in `tune_spaces/` says, checked.

A space is plain Python with upper-case names:

    SPACE      dotted config keys -> a list, `tune.grid_search([...])` or a `tune` domain
    ROWS       label -> {dotted key: value}; every row is combined with every point of SPACE
    BASE       dotted key -> value that all trials share; the command line goes before it
    METRIC     what is compared, default "val/map50"; MODE "max" or "min"; with a SCHEDULER one of the val/ ones
    SEEDS      seeds of the whole run (split, teacher, student); every point is run with each
    SEARCH     "grid", "random" or "optuna" (TPE; its first point are the values one has without the search, where the
               space contains them); TRIALS: how many points the last two draw
    SCHEDULER  "none", "asha" or "pbt"; GRACE: share of the steps that no trial is stopped before; REDUCTION: ASHA's eta;
               PERTURB: share of the steps after which poor trials take over from good ones (PBT, TRIALS: population)
    X          keys that a curve is drawn over, the first one that a trial sets; none: dots

`method` beside the config's keys is "distill" or "label_only": the student, or the same student on labels alone.
"""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfssd.config import all_keys
from dfssd.errors import DfssdError, nearest

CHOICES = {
    "MODE": ("max", "min"),
    "SEARCH": ("grid", "random", "optuna"),
    "SCHEDULER": ("none", "asha", "pbt"),
}
MEASURES = ("map50", "map50_95", "precision", "recall")  # of val at each validation, of test at a trial's end
COSTS = ("latency_ms", "parameters", "training_s", "duration_s")
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
    "PERTURB": 0.2,
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
    perturb: float
    x: tuple[str, ...]


def _ours() -> list[Path]:
    """Folders of the spaces that come with the package: in a wheel beside its code, in a checkout beside the package."""
    package = Path(__file__).parents[1]
    places = [package / "tune_spaces", package.parent / "tune_spaces"]
    return [place for place in places if place.is_dir()] or places


def find_space(name: str) -> str:
    """Path of a space: a file, or the name of one that comes with the package."""
    file = f"{Path(name).stem}.py"
    found = next((folder / file for folder in _ours() if (folder / file).is_file()), None)
    plain = "/" not in name and found is not None and not Path(name).is_file()
    return str(found) if plain else name


def spaces() -> list[str]:
    """Names of the spaces that come with the package."""
    return sorted({file.stem for folder in _ours() for file in folder.glob("[!_]*.py")})


def load_space(path: str) -> Space:
    """Read and check a file of a space.

    Raises:
        DfssdError: no such file, an error in it, or a name, key or value that cannot be.
    """
    file = Path(path)
    if not file.is_file():
        folder = _ours()[0] if "/" not in path else file.parent
        known = (
            sorted(p.stem if "/" not in path else p.name for p in folder.glob("[!_]*.py")) if folder.is_dir() else []
        )
        raise DfssdError(
            f"there is no space {path}{nearest(file.stem if '/' not in path else file.name, known)}",
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
        perturb=float(values["PERTURB"]),
        x=(values["X"],) if isinstance(values["X"], str) else tuple(values["X"]),
    )
    _check(space, path)
    return space


def _check(space: Space, path: str) -> None:
    metrics = [f"val/{name}" for name in MEASURES]
    if space.scheduler == "none":  # the others go by what each validation reports
        metrics += [*(f"test/{name}" for name in MEASURES), *COSTS]
    if space.metric not in metrics:
        raise DfssdError(
            f"METRIC is {space.metric!r}{nearest(space.metric, metrics)}",
            where=path,
            todo=f"give one of {', '.join(metrics)}",
        )
    known = [*all_keys(), "method"]
    for key in (*space.axes, *space.base, *space.x, *(k for row in space.rows.values() for k in row)):
        if key not in known:
            raise DfssdError(
                f"{key!r} is not a setting{_meant(key, known)}",
                where=path,
                todo="keys are section.field as in dfssd/config/sections.py",
            )
        if key.startswith("run."):
            raise DfssdError(f"{key!r} cannot be swept: the sweep sets it", where=path, todo="SEEDS sets the seeds")
    if not space.axes and not space.rows:
        raise DfssdError("the space is empty", where=path, todo="give SPACE or ROWS")
    if not space.seeds:
        raise DfssdError("SEEDS is empty", where=path, todo="give at least one seed, SEEDS = (0,)")
    domains = [k for k, v in space.axes.items() if values_of(v) is None]
    if space.search == "grid" and domains:
        raise DfssdError(
            f"{', '.join(domains)} cannot be enumerated, and SEARCH is 'grid'",
            where=path,
            todo='give lists, or SEARCH = "random" or "optuna" with TRIALS',
        )
    if space.search != "grid" and space.trials < 1:
        raise DfssdError(f"SEARCH is {space.search!r} without a budget", where=path, todo="set TRIALS")
    if space.scheduler == "pbt":
        _check_population(space, path)
    if space.search == "optuna" and (len(space.seeds) > 1 or space.rows):
        raise DfssdError(
            "a search by Optuna has one seed and no ROWS: it compares points, not seeds",
            where=path,
            todo="keep one seed, and run the best points again in a space of their own",
        )


def _check_population(space: Space, path: str) -> None:
    values = [v for axis in space.axes.values() for v in values_of(axis) or []]
    for wrong, todo in (
        (space.search != "random", 'set SEARCH = "random", which draws the population that it begins with'),
        (space.trials < 2, "set TRIALS to the size of the population, 4 or more"),
        (len(space.seeds) > 1 or space.rows, "keep one seed and no ROWS: a trial may go on from any other's weights"),
        (any(isinstance(v, bool | str) or not isinstance(v, int | float) for v in values), "sweep numbers only"),
        (not 0 < space.perturb <= 1, "PERTURB is a share of the steps, above 0 and at most 1"),
    ):
        if wrong:
            raise DfssdError("SCHEDULER 'pbt' cannot run this space", where=path, todo=todo)


def _meant(key: str, known: list[str]) -> str:
    """The nearest key; one that is called so in some section goes before one that only looks alike."""
    same = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return nearest(key, same) or (f", did you mean {same[0]!r}?" if same else nearest(key, known))


def values_of(axis: Any) -> list[Any] | None:
    """What can be enumerated of an axis: a list or a grid; None for what is drawn from."""
    if isinstance(axis, Mapping) and set(axis) == {"grid_search"}:
        return list(axis["grid_search"])
    if isinstance(axis, list | tuple):
        return list(axis)
    return None
