"""Measure teacher, label-only student and distilled student; leaves <run>/report.

With --weights it measures any model files instead (.pt, .onnx, OpenVINO, TensorRT), on a split or a labelled folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from dfssd.config.flags import parse
from dfssd.jobs.stages import reads
from dfssd.runtime.artefact_names import REPORT

EXAMPLE = "dfssd evaluate --storage-path runs --run-name line3 --max-escape 0.01"
FLAGS: dict[str, Any] = {
    "weights": (
        tuple[str, ...],
        Field((), description="Model files to measure instead of the run's: .pt, .onnx, OpenVINO folders, .engine."),
    ),
    "on": (str, Field("test", description="What --weights are measured on: val or test of the run, or a folder.")),
    "out": (str, Field("", description="JSON file for the numbers of --weights.")),
}


def job(words: Sequence[str]) -> None:
    config, flags = parse(__doc__ or "", reads(REPORT), words, prog="dfssd evaluate", example=EXAMPLE, **FLAGS)
    if flags.weights:
        import json
        from pathlib import Path

        from dfssd.evaluate.files import measure_files
        from dfssd.report.terminal import print_files

        results = measure_files(config, flags.weights, flags.on)
        print_files(results, flags.on)
        if flags.out:
            Path(flags.out).write_text(json.dumps(results, indent=1))
        return
    from dfssd.pipeline.run import run_stages

    run_stages(config, [REPORT])
    if not config.run.dry_run:
        from dfssd.report.terminal import print_results

        print_results(config)
