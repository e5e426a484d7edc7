"""Train on the labelled images alone: the teacher, or the label-only student that all is compared with."""

from typing import Literal

from pydantic import Field

from dfssd.cli import main, parse
from dfssd.pipeline.run import run_stages
from dfssd.runtime.artefact_names import ArtefactName

ROLE = (
    Literal["teacher", "label_only"],
    Field("teacher", description="Which: leaves <run>/teacher or <run>/label_only."),
)


def job() -> None:
    config, flags = parse(__doc__ or "", ["run", "models", "train"], role=ROLE)
    run_stages(config, [ArtefactName(flags.role)])


if __name__ == "__main__":
    main(job)
