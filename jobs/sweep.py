"""Sweep: many runs of the student with Ray Tune, from a file in tune_spaces/, and a table of what came of them.

Without --data it makes a synthetic data set. The same command again goes on: finished trials are not run again.
"""

from __future__ import annotations

import sys
from typing import Any

import tyro
from pydantic import Field

from dfssd.cli import main, parse
from dfssd.config import Config
from dfssd.sweep.job import Options, describe, run_sweep, table_of
from dfssd.sweep.points import apply
from dfssd.sweep.space import load_space

OWN = ("baseline", "publish_best", "rounds")  # of the pipeline
SECTIONS = [name for name in Config.model_fields if name not in OWN]
FLAGS: dict[str, Any] = {
    "space": (tyro.conf.Positional[str], Field("", description="The file of the space.")),
    "max_concurrent": (int, Field(0, ge=0, description="Most trials at a time; 0: as many as the cluster holds.")),
    "resume": (bool, Field(False, description="Go on with a sweep, and stop where there is none to go on with.")),
    "table": (str, Field("", description="Only rebuild the table of this sweep (its run name) from MLflow.")),
}


def job() -> None:
    path = next((word for word in sys.argv[1:] if word.endswith(".py") and not word.startswith("-")), "")
    space = load_space(path) if path else None
    config, flags = parse(__doc__ or "", SECTIONS, base=apply(Config(), space.base) if space else None, **FLAGS)
    if flags.table:
        table_of(config, flags.table)
        return
    options = Options(max_concurrent=flags.max_concurrent, resume=flags.resume, file=flags.space)
    (describe if config.run.dry_run else run_sweep)(config, space or load_space(flags.space), options)


if __name__ == "__main__":
    main(job)
