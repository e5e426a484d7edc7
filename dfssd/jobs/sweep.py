"""Sweep: many runs of the student with Ray Tune, from a file in tune_spaces/, and a table of what came of them.

Without --data it makes a synthetic data set. The same command again goes on: finished trials are not run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from pydantic import Field

from dfssd.config import SECTIONS, Config
from dfssd.config.flags import parse
from dfssd.errors import DfssdError
from dfssd.sweep.space import spaces

EXAMPLE = "dfssd sweep divergence --data my_images --label-fraction 0.1 --storage-path runs --run-name divergences"
FLAGS: dict[str, Any] = {
    "space": (
        Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SPACE")],
        Field(
            "", description=f"The file of the space, or the name of one that comes with dfssd: {', '.join(spaces())}."
        ),
    ),
    "max_concurrent": (int, Field(0, ge=0, description="Most trials at a time; 0: as many as the cluster holds.")),
    "resume": (bool, Field(False, description="Go on with a sweep, and stop where there is none to go on with.")),
    "table": (str, Field("", description="Only rebuild the table of this sweep (its run name) from MLflow.")),
}


def job(words: Sequence[str]) -> None:
    base, space = None, None
    given = words[0] if words and not words[0].startswith("-") else next((w for w in words if w.endswith(".py")), "")
    if given:  # before the flags are read: its BASE is what they change
        from dfssd.sweep.points import apply
        from dfssd.sweep.space import find_space, load_space

        space = load_space(find_space(given))
        base = apply(Config(), space.base)
    modes = {"table": ("run.storage_path", "run.experiment")}
    config, flags = parse(
        __doc__ or "", list(SECTIONS), words, base, prog="dfssd sweep", example=EXAMPLE, modes=modes, **FLAGS
    )
    if flags.table and flags.space:
        raise DfssdError(f"the space {flags.space} has no effect with --table", todo="leave it out")
    if flags.table:
        from dfssd.sweep.job import table_of

        table_of(config, flags.table)
        return
    if space is None or flags.space != given:
        raise DfssdError(
            "a sweep needs a space" if not flags.space else f"the space {flags.space} comes too late",
            todo="name it first: dfssd sweep SPACE --data ...",
        )
    from dfssd.sweep.job import Options, describe, run_sweep

    file = find_space(given)
    options = Options(max_concurrent=flags.max_concurrent, resume=flags.resume, file=file)
    (describe if config.run.dry_run else run_sweep)(config, space, options)
