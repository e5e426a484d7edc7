"""Deliver to MLflow what it has missed of a run: `dfssd track replay RUN`.

While a server is down, training goes on and keeps its numbers in history.json. The same command that made the run delivers
them later; this does it without running anything, each number once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import tyro
from pydantic import BaseModel, Field
from tyro.conf import Positional

from dfssd.config import Run
from dfssd.config.flags import VERSION_HELP, Switch

EXAMPLE = "dfssd track replay line3 --storage-path runs"


class Track(BaseModel):
    what: Positional[Literal["replay"]] = Field(description="Deliver numbers, parameters and files of finished stages.")
    run: Positional[str] = Field(description="Name of the run, as given to --run-name.")
    storage_path: str = Field(
        Run.model_fields["storage_path"].default, description="Folder or URI that holds all runs."
    )
    experiment: str = Field(Run.model_fields["experiment"].default, description="Experiment in MLflow.")
    version: Switch = Field(False, description=VERSION_HELP)


def job(words: Sequence[str]) -> None:
    said = f"{__doc__}\nExample: {EXAMPLE}"
    asked = tyro.cli(Track, args=list(words), prog="dfssd track", description=said)
    from dfssd.pipeline.replay import replay

    for one in replay(asked.storage_path, asked.run, asked.experiment):
        lacked = (
            f"{one.numbers} numbers and {one.files} files delivered" if one.numbers or one.files else "lacked nothing"
        )
        print(f"{one.stage}: {lacked} (run {one.run_id})", flush=True)
