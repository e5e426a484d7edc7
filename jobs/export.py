"""Write the student for the machine at the line: ONNX, OpenVINO, int8, with its operating point; leaves <run>/export.

The files must find on real pictures what the network finds, else nothing is written. `jobs/evaluate.py` goes before.
"""

from dfssd.cli import main, parse
from dfssd.pipeline.run import run_stages
from dfssd.report.terminal import print_export
from dfssd.runtime.artefact_names import EXPORT


def job() -> None:
    config, _ = parse(__doc__ or "", ["run", "train", "evaluate", "export"])
    run_stages(config, [EXPORT])
    if not config.run.dry_run:
        print_export(config)


if __name__ == "__main__":
    main(job)
