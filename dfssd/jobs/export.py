"""Write the student for the machine at the line: ONNX, OpenVINO, TensorRT, int8, with its operating point.

Leaves <run>/export, at the input size of the run, for which the operating point was chosen. The files must find on real
pictures what the network finds, else nothing is written. What is there already stays: formats, int8 and a name in the
registry are added to it. --overwrite makes it again: exactly the --formats that it names, without any those that are there.
"""

from __future__ import annotations

from collections.abc import Sequence

from dfssd.config.flags import parse
from dfssd.jobs.stages import as_exported, at_size_of_run, reads
from dfssd.runtime.artefact_names import EXPORT

EXAMPLE = "dfssd export --storage-path runs --run-name line3 --formats onnx openvino --int8 --register line3"


def job(words: Sequence[str]) -> None:
    config, flags = parse(__doc__ or "", reads(EXPORT), words, prog="dfssd export", example=EXAMPLE)
    config = as_exported(at_size_of_run(config, words, flags.config), words, flags.config)
    from dfssd.pipeline.run import run_stages

    run_stages(config, [EXPORT])
    if not config.run.dry_run:
        from dfssd.report.terminal import print_export

        print_export(config)
