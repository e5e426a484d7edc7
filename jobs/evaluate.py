"""Measure teacher, label-only student and distilled student on the test split; leaves <run>/report."""

from dfssd.cli import main, parse
from dfssd.pipeline.run import run_stages
from dfssd.report.terminal import print_results
from dfssd.runtime.artefact_names import REPORT


def job() -> None:
    config, _ = parse(__doc__ or "", ["run", "train", "evaluate"])
    run_stages(config, [REPORT])
    if not config.run.dry_run:
        print_results(config)


if __name__ == "__main__":
    main(job)
