"""Write the student for the machine at the line: ONNX, OpenVINO, TensorRT, int8, with its operating point.

Leaves <run>/export. --imgsz is that of the run: the operating point was chosen at that size.

The files must find on real pictures what the network finds, else nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence

from dfssd.config.flags import parse
from dfssd.jobs.stages import reads
from dfssd.runtime.artefact_names import EXPORT

EXAMPLE = "dfssd export --storage-path runs --run-name line3 --formats onnx openvino --int8 --register line3"


def job(words: Sequence[str]) -> None:
    config, _ = parse(__doc__ or "", reads(EXPORT), words, prog="dfssd export", example=EXAMPLE)
    from dfssd.pipeline.run import run_stages

    run_stages(config, [EXPORT])
    if not config.run.dry_run:
        from dfssd.report.terminal import print_export

        print_export(config)
