"""Label pictures with an exported model: drawn pictures, CSV, JSON and COCO. Needs no cluster and, for .onnx, no torch.

With --watch it labels what arrives in a folder (not in folders below it) until Ctrl-C; after a restart it goes on where it
was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from dfssd.config.flags import VERSION_HELP, Switch, named

EXAMPLE = "dfssd predict runs/line3/export/student.onnx new_pictures --out predictions"


@dataclasses.dataclass
class Flags:
    """Arguments.

    Args:
        model: .onnx file, OpenVINO folder, TensorRT .engine or .pt.
        pictures: Pictures or folders of them.
        out: Folder for the results.
        score: One threshold for all classes [from 0 to 1]; -1: the model's operating point (of a .pt: that of its run's
            report; 0.25 of a .pt from elsewhere).
        watch: Folder to watch instead.
        poll_s: Seconds between two looks at the watched folder [from 0]. Only with --watch.
        draw: Keep pictures with their boxes drawn.
        imgsz: Side of the input (px) of a .pt [from 32 in steps of 32]; 0: that of its operating point, else 640; exported
            models know theirs.
        threads: CPU threads [from 0]; 0: as the runtime chooses. Not of an .engine.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    pictures: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[PICTURES ...]")] = ()
    out: str = "predictions"
    score: float = -1.0
    watch: str = ""
    poll_s: Annotated[float, tyro.conf.arg(name="poll-s")] = 1.0
    draw: bool = True
    imgsz: int = 0
    threads: int = 0
    version: Annotated[Switch, tyro.conf.arg(help=VERSION_HELP)] = False


def job(words: Sequence[str]) -> None:
    text = f"{(__doc__ or '').strip()}\n\nExample:\n  {EXAMPLE}"
    flags = tyro.cli(Flags, args=list(words), prog="dfssd predict", description=text)
    from dfssd.errors import DfssdError
    from dfssd.evaluate.open_model import open_model
    from dfssd.line.predict import Labelling, find_pictures, predict, watch

    for name, value, low, high in (
        ("score", flags.score, 0.0, 1.0),
        ("poll-s", flags.poll_s, 0.0, float("inf")),
        ("threads", flags.threads, 0, float("inf")),
    ):
        if not low <= value <= high and (name, value) != ("score", -1.0):
            raise DfssdError(
                f"--{name} {value}: must be from {low:g}" + (f" to {high:g}" if high < float("inf") else "")
            )
    if flags.imgsz < 0 or flags.imgsz % 32:
        raise DfssdError(f"--imgsz {flags.imgsz}: must be a multiple of 32")
    if bool(flags.watch) == bool(flags.pictures):
        raise DfssdError("give pictures, or a folder to --watch", todo="dfssd predict MODEL PICTURES...")
    if "poll-s" in named(words) and not flags.watch:
        raise DfssdError("--poll-s has no effect without --watch", todo="leave it out, or give --watch")
    files = find_pictures(flags.pictures, Path(flags.out)) if flags.pictures else []
    detector = open_model(flags.model, flags.imgsz, flags.threads)
    score = flags.score if flags.score >= 0 else None
    labelling = Labelling(detector, Path(flags.out), score, flags.draw, lambda said: print(said, flush=True))
    shown = ", ".join(f"{n} {t:.3f}" for n, t in zip(detector.names, labelling.tau_c.tolist(), strict=True))
    print(f"{flags.model}: scores from {shown}", flush=True)
    if flags.watch:
        watch(labelling, Path(flags.watch), flags.poll_s)
    else:
        predict(labelling, files)
