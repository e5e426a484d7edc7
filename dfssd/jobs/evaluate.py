"""Measure teacher, label-only student and distilled student; leaves <run>/report."""

from __future__ import annotations

from collections.abc import Sequence

from dfssd.flags import parse
from dfssd.jobs.stages import reads
from dfssd.runtime.artefact_names import REPORT

EXAMPLE = "dfssd evaluate --storage-path runs --run-name line3 --max-escape 0.01"


def job(words: Sequence[str]) -> None:
    config, _ = parse(__doc__ or "", reads(REPORT), words, prog="dfssd evaluate", example=EXAMPLE)
    from dfssd.pipeline.run import run_stages

    run_stages(config, [REPORT])
    if not config.run.dry_run:
        from dfssd.report.terminal import print_results

        print_results(config)
