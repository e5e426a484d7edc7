"""Train the student on labels, pseudo-labels and the teacher's features and predictions; leaves <run>/student."""

from dfssd.cli import main, parse
from dfssd.pipeline.run import run_stages
from dfssd.runtime.artefact_names import STUDENT


def job() -> None:
    config, _ = parse(__doc__ or "", ["run", "models", "train", "thresholds", "distill"])
    run_stages(config, [STUDENT])


if __name__ == "__main__":
    main(job)
