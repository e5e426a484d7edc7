"""Measure model files (.pt, .onnx, OpenVINO) on a split of a run or on any folder with labels.

All of them see the same square letterbox, as at a line, whatever `yolo val` would do with a .pt: rows are comparable.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dfssd.config import Config
from dfssd.data.formats.class_names import NoClassNames
from dfssd.data.manifest import TEST, VAL, Manifest, Row, read_manifest
from dfssd.data.preparation.prepare import prepare
from dfssd.errors import DfssdError, nearest
from dfssd.evaluate.escapes import Pictures, operating_point, thresholds_of
from dfssd.evaluate.latency import measure_latency
from dfssd.evaluate.measure import LATENCY_CONF, measure_split
from dfssd.evaluate.open_model import model_path, open_exported
from dfssd.evaluate.origin import Origin, in_words, origin_of
from dfssd.evaluate.squares import SquareDetect, collect_squares, exported, network
from dfssd.models.families import predict, ready_model
from dfssd.models.nms import MAX_BOXES, NMS_IOU
from dfssd.runtime.storage import Storage

SPLITS = (VAL, TEST)
SIDE, RATE = "train.imgsz", "evaluate.max_escape"  # settings that files bring, unless the user names them


def measure_files(config: Config, files: Sequence[str], on: str, named: Collection[str] = ()) -> dict[str, Any]:
    """Numbers of each file, by its path: those of `measure.measure_split`; operating_point (the file's own, else that of its
    run, else chosen here); imgsz; seen (see `Origin.seen`; None where its run was not found); remarks (sentences);
    latency_ms, latency_p95_ms.

    Args:
        on: "val" or "test" of the run in `config`, or a folder with labels in any format that `prepare` reads.
        named: of "train.imgsz" and "evaluate.max_escape", those that the user has named: of others the files' own count.

    Raises:
        DfssdError: a file or folder is not there, no class of a model is among the labels, or nothing is labelled.
    """
    torch.set_num_threads(max(1, config.run.cpus_per_worker))
    models = {file: _open(file, config, named) for file in files}
    own = {tuple(opened.names) for opened in models.values()}
    with tempfile.TemporaryDirectory() as folder:  # to the end: a .zip is unpacked there
        manifest, rows, val = _pictures(config, on, Storage(folder), own.pop() if len(own) == 1 else ())
        return _measured(config, models, manifest, rows, val, on, named)


def _measured(
    config: Config,
    models: dict[str, Opened],
    manifest: Manifest,
    rows: list[Row],
    val: list[Row],
    on: str,
    named: Collection[str],
) -> dict[str, Any]:
    """See `measure_files`."""
    results: dict[str, Any] = {}
    networks = {file: opened.timed for file, opened in models.items()}
    rate = _rate(config, list(models.values()), RATE in named)
    for file, opened in models.items():
        known = _known(opened.names, manifest.names, file)
        # A folder's own white level would be that of its brightest picture: at the line the model's counts.
        seen_rows = rows if on in SPLITS or opened.white is None else [replace(r, white=opened.white) for r in rows]
        records = collect_squares(opened.detect, seen_rows, opened.imgsz, known)
        point = opened.point
        if point is None:
            where = "val" if val else "these pictures themselves (so escapes flatter)"
            chosen = collect_squares(opened.detect, val, opened.imgsz, known) if val else records
            of = Pictures.of(chosen, len(manifest.names))
            point = operating_point(of, manifest.names, rate, "val" if val else "")
            point = {**point, "chosen_on": where}
        numbers = measure_split(records, records, manifest.names, thresholds_of(point, manifest.names))
        seen = opened.origin.seen(rows) if opened.origin else None
        notes = _notes(file, opened, seen, config, len(rows), named)
        results[file] = {
            **numbers, "operating_point": point, "imgsz": opened.imgsz, "seen": seen, "remarks": notes
        }  # fmt: skip
    sizes = {one["imgsz"] for one in results.values()}
    for imgsz in sorted(sizes):
        group = {f: networks[f] for f in results if results[f]["imgsz"] == imgsz}
        image = torch.rand(1, 3, imgsz, imgsz, generator=torch.Generator().manual_seed(0))
        latency = measure_latency(group, image, repeats=config.evaluate.latency_repeats)
        for file, timing in latency.timings.items():
            results[file] |= {
                "latency_ms": timing.p50_ms,
                "latency_p95_ms": timing.p95_ms,
                "latency_note": latency.note,
            }
    return results


def plan_files(config: Config, files: Sequence[str], on: str) -> list[str]:
    """What `measure_files` would measure, a line a file, with nothing measured.

    Raises:
        DfssdError: a file or folder is not there, or nothing is labelled.
    """
    paths = [model_path(file) for file in files]
    where = f"the split {on}" if on in SPLITS else on
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = _pictures(config, on, Storage(folder))[1]
    except NoClassNames:
        return [f"{path}: would be measured on {where}, whose classes would be called as the model's" for path in paths]
    return [f"{path}: would be measured on {len(rows)} labelled pictures of {where}" for path in paths]


def _pictures(
    config: Config, on: str, room: Storage, names: Sequence[str] = ()
) -> tuple[Manifest, list[Row], list[Row]]:
    """Manifest, labelled pictures to measure on, and the val pictures that choose an operating point (or none).

    Args:
        room: empty folder, for what is found in a folder of pictures; a .zip is unpacked there.
        names: classes of the models, in order of their id, where they agree: what those of a folder without names are called.
    """
    run = Storage(config.run.storage_path).at(config.run.run_name)
    if on in SPLITS:
        if not run.exists("dataset/stage.json"):
            raise DfssdError(
                f"--on {on} names a split, but this run has no data set",
                where=run.uri,
                todo="give --storage-path and --run-name of a run, or a folder with labels",
            )
        manifest = read_manifest(run.at("dataset"))
        val = [r for r in manifest.of_split(VAL) if r.boxes is not None]
        return manifest, [r for r in manifest.of_split(on) if r.boxes is not None], val
    if "://" not in on and not Path(on).exists():
        raise DfssdError(
            f"no split and no folder: {on}{nearest(on, SPLITS)}", todo="give val, test or a folder with labels"
        )
    store = room.at("dataset")
    every = {"label_fraction": 1.0, "labels_per_class": 0, "labelled_list": "", "val_from_labels": False}
    data = config.data.model_copy(update={"data": on, "unlabelled": (), "split": "grouped", **every})
    try:
        prepare(data, config.run.seed, store, least=1)
    except NoClassNames:
        if not names:
            raise
        print(f"the labels have no class names: their numbers are taken for {', '.join(names)}, as the models count")
        prepare(data.model_copy(update={"names": tuple(names)}), config.run.seed, store, least=1)
    manifest = read_manifest(store)
    rows = [r for r in manifest.rows if r.boxes is not None]
    if not rows:
        raise DfssdError("no picture there is labelled", where=on, todo="a clean picture needs an empty label file")
    return manifest, rows, []


class Opened(NamedTuple):
    """A model file: what detects, its class names, input side (px), operating point (None: none was chosen for it), what is
    timed, the run it comes from, where that can be found, and the value that it takes for white (None: not known)."""

    detect: SquareDetect
    names: Sequence[str]
    imgsz: int
    point: dict[str, Any] | None
    timed: Callable[[Any], Any]
    origin: Origin | None
    white: float | None = None


def _open(file: str, config: Config, named: Collection[str] = ()) -> Opened:
    path, runs = model_path(file), Storage(config.run.storage_path)
    if path.suffix == ".pt":
        origin = origin_of(path)
        imgsz = side_of(config.train.imgsz, origin, SIDE in named)
        model, names = ready_model(path.read_bytes(), file, imgsz)
        return Opened(
            network(model),
            names,
            imgsz,
            origin.point if origin and origin.imgsz == imgsz else None,
            lambda image: predict(model, image, LATENCY_CONF, NMS_IOU, MAX_BOXES),
            origin,
            max((row.white for row in origin.manifest.rows), default=0.0) if origin else None,
        )
    line = open_exported(path, 1)
    origin = origin_of(path, line.metadata, runs)
    point: dict[str, Any] = line.metadata["operating_point"]
    return Opened(
        exported(line),
        line.names,
        line.imgsz,
        point,
        lambda image: line.boxes_of_input(image.numpy(), LATENCY_CONF),
        origin,
        line.white,
    )


def _rate(config: Config, models: Sequence[Opened], named: bool) -> float:
    """Escape rate that scores are chosen for where a file brings none: --max-escape; where nobody names it, the rate of the
    files that bring theirs, so that all mean the same.
    """
    brought = {float(one.point["max_escape"]) for one in models if one.point}
    return brought.pop() if not named and len(brought) == 1 else config.evaluate.max_escape


def side_of(asked: int, origin: Origin | None, named: bool) -> int:
    """Side of the input (px) of a .pt: the --imgsz that is named; where none is, that of its run's operating point, and for a
    .pt without one `asked`, which is that of the run whose pictures are measured.
    """
    return origin.imgsz if not named and origin and origin.imgsz else asked


def _notes(
    file: str,
    opened: Opened,
    seen: dict[str, int] | None,
    config: Config,
    pictures: int,
    named: Collection[str],
) -> list[str]:
    """What has to be known beside the numbers of a file."""
    notes = [in_words(file, seen, pictures, opened.origin is not None)]
    asked, own = config.evaluate.max_escape, (opened.point or {}).get("max_escape")
    if RATE in named and own is not None and own != asked:
        notes.append(
            f"{file} brings scores chosen for at most {own:.1%} escapes: --max-escape {asked:g} has no effect on it."
        )
    is_pt = file.endswith(".pt")
    if SIDE in named and not is_pt and opened.imgsz != config.train.imgsz:
        notes.append(f"{file} takes {opened.imgsz} px: --imgsz {config.train.imgsz} has no effect on it.")
    if is_pt and opened.imgsz != config.train.imgsz:
        notes.append(f"{file}: measured at {opened.imgsz} px, as in its run.")
    if is_pt and opened.origin and opened.origin.point and not opened.point:
        notes.append(
            f"{file}: the scores of its run were chosen at {opened.origin.imgsz} px and are not taken at {opened.imgsz}."
        )
    return [note for note in notes if note]


def _known(own: Sequence[str], names: Sequence[str], file: str) -> np.ndarray:
    """(own classes,) id among the labels' classes by name, -1 for a class that they do not have."""
    known = np.array([names.index(n) if n in names else -1 for n in own])
    if (known < 0).all():
        raise DfssdError(
            f"no class of the model is among the labels: {', '.join(own[:5])} against {', '.join(names[:5])}",
            where=file,
            todo="classes are matched by name: rename them in data.yaml, or give --names",
        )
    return known
