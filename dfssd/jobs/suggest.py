"""Which unlabelled images are most worth a label: a table with scores, a contact sheet, and tasks for a labelling program.

Needs the stages dataset, teacher and pseudo; where a student is trained, teacher and student are compared. Leaves
<run>/suggest. Label these images in the program of your choice, then `dfssd review --corrected FILE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from dfssd.config.choices import REVIEW_FORMATS, in_words
from dfssd.config.flags import parse
from dfssd.errors import DfssdError
from dfssd.jobs.review import LABEL_STUDIO_ROOT

EXAMPLE = "dfssd suggest --k 50 --export labelstudio --storage-path runs --run-name line3"
READS = ("run.storage_path", "run.run_name", "run.gpu", "run.seed", "train.imgsz", "train.amp", "thresholds")

PROGRAMS = (*REVIEW_FORMATS, "none")


def job(words: Sequence[str]) -> None:
    extra: dict[str, Any] = {
        "k": (int, Field(50, description="Images to suggest.")),
        "export": (
            Literal[PROGRAMS],
            Field(
                "labelstudio",
                description=f"Program that the suggested images are written for ({in_words(REVIEW_FORMATS)}).",
            ),
        ),
        "label_studio_root": LABEL_STUDIO_ROOT,
    }
    config, flags = parse(__doc__ or "", READS, words, prog="dfssd suggest", example=EXAMPLE, **extra)
    if flags.k < 1:
        raise DfssdError(f"--k {flags.k}: at least one image", todo="give --k 50")
    from dfssd.config.checks import refuse_relative_paths_in_a_job
    from dfssd.pipeline.stages import best_teacher
    from dfssd.review.active_learning import suggest_images
    from dfssd.runtime.artefact_names import newest_round
    from dfssd.runtime.storage import Storage

    refuse_relative_paths_in_a_job(config)
    run = Storage(config.run.storage_path).at(config.run.run_name)
    fmt = None if flags.export == "none" else flags.export
    teacher = best_teacher(run, newest_round(run))
    for path in suggest_images(config, run, teacher, flags.k, fmt, flags.label_studio_root):
        print(path)
    print("label these images, then: dfssd review --corrected FILE with the same --storage-path and --run-name")
