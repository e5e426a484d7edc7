"""Stage `report`: measure the finished models on val and test. Returns and writes numbers and boxes, draws nothing.

Val chooses (weights while training, operating point here), test confirms and is measured once. mAP is measured as `yolo val`
does; what depends on a score (operating point, escapes, rejects, confusion, calibration) as the line runs an exported model.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dfssd.config import Config
from dfssd.data.dataset import ManifestDataset
from dfssd.data.manifest import TEST, VAL, Manifest, read_manifest
from dfssd.evaluate import curves
from dfssd.evaluate.coco import coco_numbers
from dfssd.evaluate.detections import write_detections
from dfssd.evaluate.escapes import Pictures, curve, operating_point, thresholds_of
from dfssd.evaluate.escapes import measure as measure_line
from dfssd.evaluate.gate import MEASURES, compare
from dfssd.evaluate.latency import measure_latency
from dfssd.evaluate.squares import collect_squares, network
from dfssd.evaluate.validation import collect, detecting, summarise
from dfssd.models.families import class_names, family_of, load_model, predict, ready_model
from dfssd.models.nms import MAX_BOXES, NMS_IOU
from dfssd.runtime.artefact_names import LABEL_ONLY, STUDENT
from dfssd.runtime.storage import Storage
from dfssd.runtime.worker_group import WorkerGroup

STUDENTS = (str(LABEL_ONLY), str(STUDENT))  # what is compared, and with what
LATENCY_CONF = 0.25  # a line keeps few boxes: NMS over thousands of scores near zero is not what it waits for
Records = Sequence[dict[str, Any]]  # one (see `validation.record`) a picture


class Both(NamedTuple):
    """Records of the same pictures in rectangular batches, as `yolo val` measures, and in squares, as an exported model."""

    as_yolo_val: Records
    as_line: Records


def measure(config: Config, run_uri: str, models: list[str], threads: int) -> dict[str, Any]:
    """Measure finished models of the run; runs as one Ray task. Boxes go to `report/detections.parquet`.

    Args:
        models: names of their artefacts.
        threads: torch threads, also for the latency.

    Returns:
        by model (teacher, teacher_2, label_only, student): val and test (see `measure_split`), operating_point, params,
        latency_ms (median), latency_p95_ms, weights_bytes, of a student also last (see `last_weights`); `latency` (how it was
        measured); `gate` (see `gate.compare`) where both students are there; `labels` (see `labels_used`); `environment`.
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() and config.run.gpu != "never" else "cpu")
    run = Storage(run_uri)
    manifest = read_manifest(run.at("dataset"))
    splits = {name: images_of(manifest, name, config.train.imgsz) for name in (VAL, TEST)}
    results: dict[str, Any] = {}
    records: dict[tuple[str, str], Records] = {}
    found: dict[tuple[str, str], Records] = {}
    networks = {}
    for name in models:
        begun = time.monotonic()
        file = weights_file(run, name)
        data = run.read(file)
        model = load_model(data, run.path(file), config.train.imgsz)
        parameters, names = sum(p.numel() for p in model.parameters()), class_names(model)
        model = family_of(model).ready(model, device)
        own = collect_both(model, splits, config.train.imgsz, device)
        numbers = measure_detector(own, names, config.evaluate.max_escape)
        model.to("cpu")  # latency is that of a CPU
        results[name] = {**numbers, "params": parameters, "weights_bytes": len(data)}
        records |= {(name, split): both.as_yolo_val for split, both in own.items()}
        found |= {(name, split): both.as_line for split, both in own.items()}
        networks[name] = lambda image, model=model: predict(model, image, LATENCY_CONF, NMS_IOU, MAX_BOXES)
        last = last_weights(config, run, name, results[name], splits[TEST], device) if name in STUDENTS else None
        results[name] |= {"last": last} if last else {}
        test = results[name][TEST]
        print(f"evaluate: {name}  test mAP50 {test['map50']:.4f}  {time.monotonic() - begun:.1f} s", flush=True)
    write_detections(run.at("report"), found)
    square = torch.rand(1, 3, config.train.imgsz, config.train.imgsz, generator=torch.Generator().manual_seed(0))
    latency = measure_latency(networks, square, repeats=config.evaluate.latency_repeats, threads=threads)
    for name, timing in latency.timings.items():
        results[name] |= {"latency_ms": timing.p50_ms, "latency_p95_ms": timing.p95_ms}
    if set(STUDENTS) <= set(models):
        base, other = (list(records[name, VAL]) for name in STUDENTS)
        results["gate"] = compare(base, other)
    results |= {"latency": latency.as_dict(), "labels": labels_used(manifest)}
    return results | {"environment": environment(config, manifest, threads)}


def last_weights(
    config: Config,
    run: Storage,
    name: str,
    best: Mapping[str, Any],
    test: ManifestDataset,
    device: torch.device,
) -> dict[str, Any] | None:
    """The weights of the last step, which val did not choose; None where the run holds none.

    Args:
        name: of a training's artefact.
        best: what its best weights measured, which is the answer where the last validation was the best.

    Returns:
        step; val (as the training's last validation measured it) and test: map50 and map50_95 each.
    """
    file = f"{name}/last.pt"
    if not run.exists(file) or not run.exists(f"{name}/stage.json"):
        return None
    summary = run.read_json(f"{name}/stage.json")["summary"]
    if not summary.get("last"):
        return None
    numbers: Mapping[str, Any] = best[TEST]
    if summary["best"]["step"] != summary["steps"]:
        model, names = ready_model(run.read(file), run.path(file), config.train.imgsz)
        model.to(device)
        numbers = summarise(list(collect(detecting(model), test, WorkerGroup(), device)), dict(enumerate(names)))
    measured = {VAL: summary["last"], TEST: numbers}
    return {"step": summary["steps"]} | {k: {m: float(v[m]) for m in MEASURES} for k, v in measured.items()}


def labels_used(manifest: Manifest) -> dict[str, Any]:
    """Images whose labels trained or chose: train, val; whether val was a part of what may be labelled (from_labels); and how
    many images without labels there were to learn from (unlabelled).
    """
    val = sum(r.boxes is not None for r in manifest.of_split(VAL))
    from_labels = bool(manifest.meta.get("val_from_labels", False))
    unlabelled = len(manifest.unlabelled_rows())
    return {"train": len(manifest.labelled_rows()), "val": val, "from_labels": from_labels, "unlabelled": unlabelled}


def weights_file(run: Storage, name: str) -> str:
    """The weights that a stage's model is measured by: of a student that was replaced by the label-only one, its own."""
    return f"{name}/distilled.pt" if run.exists(f"{name}/distilled.pt") else f"{name}/best.pt"


def collect_both(
    model: nn.Module, splits: Mapping[str, ManifestDataset], imgsz: int, device: torch.device
) -> dict[str, Both]:
    """A torch detector on all pictures of "val" and "test", in both ways."""
    rectangles, square = detecting(model), network(model)
    return {
        split: Both(collect(rectangles, images, WorkerGroup(), device), collect_squares(square, images.rows, imgsz))
        for split, images in splits.items()
    }


def measure_detector(records: Mapping[str, Both], names: Sequence[str], max_escape: float) -> dict[str, Any]:
    """Numbers of one detector on val and test; its operating point is chosen on val, as the line sees it.

    Args:
        records: "val" and "test".
        names: its classes, which are those of the splits.
        max_escape: share of defective pictures (0..1) that may pass.
    """
    point = operating_point(Pictures.of(records[VAL].as_line, len(names)), names, max_escape)
    tau_c = thresholds_of(point, names)
    numbers = {split: measure_split(*both, names, tau_c) for split, both in records.items()}
    return {**numbers, "operating_point": point}


def measure_split(as_yolo_val: Records, as_line: Records, names: Sequence[str], tau_c: np.ndarray) -> dict[str, Any]:
    """All numbers of a detector on one set of pictures.

    Args:
        as_yolo_val, as_line: see `Both`; the same where only one is wanted.

    Returns:
        as `yolo val`: those of `validation.summarise`, coco (by box size), scores (precision, recall, F1 over the score);
        as the line: line (escapes and overkill at tau_c), curve (the same over one score for all classes), confusion,
        calibration.
    """
    pictures = Pictures.of(as_line, len(names))
    return {
        **summarise(list(as_yolo_val), dict(enumerate(names))),
        "coco": coco_numbers(as_yolo_val, len(names)),
        "scores": curves.score_curves(as_yolo_val, names),
        "line": measure_line(pictures, tau_c, names),
        "curve": curve(pictures, names),
        "confusion": {"names": [*names, "nothing"], "counts": curves.confusion(as_line, tau_c)},
        "calibration": curves.calibration(as_line),
    }


def images_of(manifest: Manifest, split: str, imgsz: int) -> ManifestDataset:
    """The labelled images of a split, as `yolo val` would read them."""
    rows = [r for r in manifest.of_split(split) if r.boxes is not None]
    return ManifestDataset(rows, [r.boxes for r in rows], manifest.names, imgsz)


def environment(config: Config, manifest: Manifest, threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": threads,
        "imgsz": config.train.imgsz,
        "torch": torch.__version__,
        "test_images": len(manifest.of_split(TEST)),
        "val_images": len(manifest.of_split(VAL)),
    }


def _processor() -> str:
    from pathlib import Path

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.processor()
