"""Train the student on labels, pseudo-labels and the teacher's features and predictions; leaves <run>/student."""

from __future__ import annotations

from collections.abc import Sequence

from dfssd.config.flags import parse
from dfssd.jobs.stages import reads
from dfssd.runtime.artefact_names import STUDENT

EXAMPLE = "dfssd distill --storage-path runs --run-name line3 --student yolov8n.pt --steps 3000 --num-workers auto"


def job(words: Sequence[str]) -> None:
    config, _ = parse(__doc__ or "", reads(STUDENT), words, prog="dfssd distill", example=EXAMPLE)
    from dfssd.pipeline.run import run_stages

    run_stages(config, [STUDENT])
