"""Train on the labelled images alone: the teacher, or the label-only student that all is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from dfssd.config import Config
from dfssd.config.flags import parse
from dfssd.jobs.stages import reads, refuse_without_effect
from dfssd.runtime.artefact_names import LABEL_ONLY, TEACHER, ArtefactName

EXAMPLE = "dfssd teacher --storage-path runs --run-name line3 --teacher yolov8s.pt --imgsz 640 --teacher-steps 3000"
ROLE = (
    Literal["teacher", "label_only"],
    Field("teacher", description="Which: leaves <run>/teacher or <run>/label_only."),
)


def job(words: Sequence[str]) -> None:
    shown = reads(TEACHER, LABEL_ONLY)
    config, flags = parse(__doc__ or "", shown, words, prog="dfssd teacher", example=EXAMPLE, role=ROLE)
    name = ArtefactName(flags.role)
    if not flags.config:
        refuse_without_effect(config, name, shown, Config())
    from dfssd.pipeline.run import run_stages

    run_stages(config, [name])
