"""Pseudo-labels out to where people review them, and corrected labels back into the next version of the data set.

Out: `--export labelstudio` (or cvat, coco, yolo), of the most doubtful images or of all. Back: `--corrected FILE` takes the
same formats; who corrected what and when is kept, and every image stays in its split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from dfssd.config.choices import REVIEW_FORMATS, in_words
from dfssd.config.flags import parse
from dfssd.errors import DfssdError

EXAMPLE = """dfssd review --export labelstudio --storage-path runs --run-name line3
  dfssd review --corrected export.json --storage-path runs --run-name line3"""
READS = ("run.storage_path", "run.run_name", "run.experiment", "run.seed", "train.imgsz", "thresholds")
TAKES_BACK = ("run.storage_path", "run.run_name", "run.experiment", "run.seed")  # of these with --corrected

PROGRAMS = ("", *REVIEW_FORMATS)
LABEL_STUDIO_ROOT = (  # the flag of all that is written for labelling programs
    str,
    Field(
        "",
        description="Folder that Label Studio serves local files from.",
        json_schema_extra={"of": "export=labelstudio"},
    ),
)


def job(words: Sequence[str]) -> None:
    extra: dict[str, Any] = {
        "export": (
            Literal[PROGRAMS],
            Field("", description=f"Write proposals for this program ({in_words(REVIEW_FORMATS)})."),
        ),
        "which": (
            Literal["doubtful", "all"],
            Field("doubtful", description="Images to export.", json_schema_extra={"of": "export"}),
        ),
        "k": (int, Field(0, description="Images at most; 0: all of them.", json_schema_extra={"of": "export"})),
        "label_studio_root": LABEL_STUDIO_ROOT,
        "corrected": (str, Field("", description="File, folder or .zip with corrected labels.")),
        "add_classes": (
            tuple[str, ...],
            Field((), description="Classes that a reviewer has added.", json_schema_extra={"of": "corrected"}),
        ),
        "reviewer": (
            str,
            Field(
                "",
                description="Who corrected them, where the file does not say; default the user.",
                json_schema_extra={"of": "corrected"},
            ),
        ),
    }
    modes = {"corrected": TAKES_BACK}
    config, flags = parse(__doc__ or "", READS, words, prog="dfssd review", example=EXAMPLE, modes=modes, **extra)
    if bool(flags.export) == bool(flags.corrected):
        raise DfssdError(
            "give --export PROGRAM or --corrected FILE", todo="one sends labels out, the other takes them back"
        )
    from dfssd.config.checks import refuse_relative_paths_in_a_job
    from dfssd.review.active_learning import data_settings, export_images, take_back
    from dfssd.runtime.storage import Storage

    refuse_relative_paths_in_a_job(config)
    run = Storage(config.run.storage_path).at(config.run.run_name)
    if flags.export:
        for path in export_images(config, run, flags.which, flags.export, flags.k, flags.label_studio_root):
            print(path)
        return
    from dfssd.pipeline.run import run_stages
    from dfssd.runtime.artefact_names import DATASET

    print(take_back(config, run, flags.corrected, flags.reviewer, flags.add_classes), flush=True)
    run_stages(config.model_copy(update={"data": data_settings(run)}), [DATASET])
