"""Measure teacher, label-only student and distilled student; leaves <run>/report.

With --weights it measures any model files instead (.pt, .onnx, OpenVINO, TensorRT), on a split or a labelled folder; then
--dry-run says which, on how many pictures. Without --imgsz a run is measured at its own input size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from dfssd.config.flags import parse
from dfssd.errors import DfssdError
from dfssd.jobs.stages import at_size_of_run, is_named, reads
from dfssd.runtime.artefact_names import REPORT

EXAMPLE = """dfssd evaluate --storage-path runs --run-name line3 --max-escape 0.01 --overwrite
  dfssd evaluate --weights old.onnx runs/line3/student/best.pt --on new_labelled_pictures --out numbers.json"""
FLAGS: dict[str, Any] = {
    "weights": (
        tuple[str, ...],
        Field(
            (),
            description="Model files to measure instead of the run's: .pt, .onnx, OpenVINO folders, .engine. Each at its own "
            "operating point; a .pt from elsewhere has none: val of the run, or the folder itself, chooses one for "
            "--max-escape, or for the rate of the files that bring one.",
        ),
    ),
    "on": (
        str,
        Field(
            "test",
            description="What --weights are measured on: val or test of the run, or a labelled folder.",
            json_schema_extra={"of": "weights"},
        ),
    ),
    "out": (
        str,
        Field("", description="JSON file for the numbers of --weights.", json_schema_extra={"of": "weights"}),
    ),
}
READS_FILES = (  # what counts for files; a run's report needs the rest
    *("run.storage_path", "run.run_name", "run.cpus_per_worker", "run.dry_run"),
    *("train.imgsz", "evaluate.max_escape", "evaluate.latency_repeats"),
)
NAMES = "data.names"  # and where --on names a folder


def job(words: Sequence[str]) -> None:
    config, flags = parse(
        __doc__ or "",
        (*reads(REPORT), NAMES),
        words,
        prog="dfssd evaluate",
        example=EXAMPLE,
        modes={"weights": (*READS_FILES, NAMES)},
        spare=(NAMES,),
        **FLAGS,
    )
    if not flags.weights or flags.on in ("val", "test"):
        if is_named(NAMES, words, ""):
            raise DfssdError("--names has no effect without --weights and a folder --on", todo="leave it out")
        config = at_size_of_run(config, words, flags.config)
    if flags.weights:
        import json

        from dfssd.evaluate.files import RATE, SIDE, measure_files, plan_files

        if config.run.dry_run:
            print(*plan_files(config, flags.weights, flags.on), sep="\n")
            return
        from dfssd.report.terminal import print_files

        if flags.out:
            _make_room(Path(flags.out))
        named = [key for key in (SIDE, RATE) if is_named(key, words, flags.config)]
        results = measure_files(config, flags.weights, flags.on, named)
        print_files(results, flags.on)
        if flags.out:
            Path(flags.out).write_text(json.dumps(results, indent=1))
        return
    from dfssd.pipeline.run import run_stages

    run_stages(config, [REPORT])
    if not config.run.dry_run:
        from dfssd.report.terminal import print_results

        print_results(config)


def _make_room(out: Path) -> None:
    """Make the folder of a file that is written after minutes of measuring, and see that it can be.

    Raises:
        DfssdError: nothing can be written there.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise DfssdError("--out is a folder", where=str(out), todo="give a file, such as numbers.json in it")
        there = out.exists()
        out.open("a").close()  # what is there stays until the numbers are
        if not there:
            out.unlink()
    except OSError as error:
        raise DfssdError(f"--out: {error.strerror}", where=str(out), todo="give a file in another folder") from error
