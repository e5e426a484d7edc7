"""Let the teacher go on with labelled and unlabelled images, which its own average labels; leaves <run>/mean_teacher.

Where it is better on val than <run>/teacher, it labels and teaches from then on.
"""

from __future__ import annotations

from collections.abc import Sequence

from dfssd.config.flags import parse
from dfssd.jobs.stages import reads
from dfssd.runtime.artefact_names import MEAN_TEACHER

EXAMPLE = "dfssd mean_teacher --storage-path runs --run-name line3 --teacher yolov8s.pt --mean-teacher-steps 2000"


def job(words: Sequence[str]) -> None:
    config, _ = parse(__doc__ or "", reads(MEAN_TEACHER), words, prog="dfssd mean_teacher", example=EXAMPLE)
    from dfssd.pipeline.run import run_stages

    run_stages(config, [MEAN_TEACHER])
