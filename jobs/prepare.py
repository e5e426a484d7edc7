"""Check images and labels, group near-duplicates, split, choose the labelled subset; leaves <run>/dataset."""

from dfssd.cli import main, parse
from dfssd.pipeline.run import run_stages
from dfssd.runtime.artefact_names import DATASET


def job() -> None:
    config, _ = parse(__doc__ or "", ["run", "data"])
    run_stages(config, [DATASET])


if __name__ == "__main__":
    main(job)
