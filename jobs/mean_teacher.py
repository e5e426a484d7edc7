"""Let the teacher go on with labelled and unlabelled images, which its own average labels; leaves <run>/mean_teacher.

Where it is better on val than <run>/teacher, it labels and teaches from then on.
"""

from dfssd.cli import main, parse
from dfssd.pipeline.run import run_stages
from dfssd.runtime.artefact_names import MEAN_TEACHER


def job() -> None:
    sections = ["run", "models", "train", "pseudo", "thresholds", "distill", "mean_teacher"]
    config, _ = parse(__doc__ or "", sections)
    run_stages(config, [MEAN_TEACHER])


if __name__ == "__main__":
    main(job)
