"""Stream the unlabelled images through the teacher (Ray Data), and measure what its labels are worth.

Leaves candidate boxes in <run>/pseudo and the quality report in <run>/quality. Interrupt it anywhere and type the same
command again: what is labelled stays.
"""

from __future__ import annotations

from collections.abc import Sequence

from dfssd.config.flags import parse
from dfssd.jobs.stages import reads
from dfssd.runtime.artefact_names import PSEUDO, QUALITY

EXAMPLE = "dfssd pseudo_label --storage-path runs --run-name line3 --tta flips --threshold-policy gmm"


def job(words: Sequence[str]) -> None:
    config, _ = parse(__doc__ or "", reads(PSEUDO, QUALITY), words, prog="dfssd pseudo_label", example=EXAMPLE)
    from dfssd.pipeline.run import run_stages

    run_stages(config, [PSEUDO, QUALITY])
