"""Check images and labels, group near-duplicates, split, choose the labelled subset; leaves <run>/dataset."""

from __future__ import annotations

from collections.abc import Sequence

from dfssd.config.flags import parse
from dfssd.jobs.stages import reads
from dfssd.runtime.artefact_names import DATASET

EXAMPLE = "dfssd prepare --data my_images --label-fraction 0.1 --storage-path runs --run-name line3"


def job(words: Sequence[str]) -> None:
    config, _ = parse(__doc__ or "", reads(DATASET), words, prog="dfssd prepare", example=EXAMPLE)
    from dfssd.pipeline.run import run_stages

    run_stages(config, [DATASET])
