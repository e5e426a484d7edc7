"""Stream the unlabelled images through the teacher (Ray Data), and measure what its labels are worth.

Leaves candidate boxes in <run>/pseudo and the quality report in <run>/quality. Interrupt it anywhere and type the same
command again: what is labelled stays.
"""

from typing import Annotated

import tyro
from pydantic import Field

from dfssd.cli import main, parse
from dfssd.config import Pseudo
from dfssd.pipeline.run import run_stages
from dfssd.runtime.artefact_names import PSEUDO, QUALITY


class Labelling(Pseudo):
    """As everywhere, but here there is only one kind of teacher, so it has the short name."""

    label_teachers: Annotated[tuple[str, ...], tyro.conf.arg(name="teacher")] = Field(
        (), description="Weights (.pt) that label instead of the run's own teacher; several are an ensemble."
    )


def job() -> None:
    config, _ = parse(__doc__ or "", ["run", "train", "thresholds"], pseudo=(Labelling, Labelling()))
    run_stages(config, [PSEUDO, QUALITY])


if __name__ == "__main__":
    main(job)
