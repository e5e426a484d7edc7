"""All stages in order: data set, teacher, mean teacher, label-only baseline, pseudo-labels, student, report, export.

Interrupt it anywhere and type the same command again: finished stages are skipped, the interrupted one goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

from dfssd.config import all_keys
from dfssd.config.flags import parse
from dfssd.jobs.stages import as_exported
from dfssd.pipeline.stages import wanted

EXAMPLE = "dfssd pipeline --data my_images --label-fraction 0.1 --imgsz 640 --storage-path runs --run-name line3"


def job(words: Sequence[str]) -> None:
    config, flags = parse(__doc__ or "", all_keys(), words, prog="dfssd pipeline", example=EXAMPLE)
    config = as_exported(config, words, flags.config)
    from dfssd.pipeline.run import run_stages

    run_stages(config, wanted(config))
    if not config.run.dry_run:
        from dfssd.report.terminal import print_results

        print_results(config)
