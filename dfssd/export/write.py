"""Write a finished detector for the line, and prove on real pictures that the files find what the network finds.

Nothing is left in the run before parity holds. The operating point and what drift is judged by travel in the metadata.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dfssd.config import Config
from dfssd.data.boxes import detections_above
from dfssd.data.dataset import decode
from dfssd.data.manifest import Manifest, Row, read_manifest
from dfssd.evaluate.escapes import Pictures, operating_point, thresholds_of
from dfssd.evaluate.latency import measure_latency
from dfssd.evaluate.squares import collect_squares, exported, network
from dfssd.export.formats import (
    check_formats,
    engine_bytes,
    int8_bytes,
    metadata_of,
    openvino_files,
    with_metadata,
)
from dfssd.export.onnx_model import INSIDE_CONF, onnx_bytes
from dfssd.export.parity import Parity, compare, require
from dfssd.line import drift
from dfssd.line.detector import LineDetector, letterbox, network_input
from dfssd.models.families import class_names, family_of, predict, ready_model
from dfssd.models.nms import MAX_BOXES, NMS_IOU
from dfssd.runtime.code_version import code_version
from dfssd.runtime.storage import Storage

REFERENCE = 200  # pictures that drift is judged by
LATENCY_CONF = 0.25


def export_model(config: Config, run_uri: str, model: str, threads: int, there: Sequence[str] = ()) -> dict[str, Any]:
    """Export one finished model of the run to `<run>/export`; runs as one Ray task.

    Args:
        model: its artefact, e.g. "student"; `report` must have measured it.
        there: formats that nobody asks for: the export that is added to has them.

    Returns:
        model, files (size by name), operating_point, int8_operating_point (None without int8), parity and latency (by
        format), speedup (teacher to student in ONNX Runtime; None without a teacher).

    Raises:
        DfssdError: a format is not installed, or an exported file is not the network (then nothing is written).
    """
    torch.set_num_threads(threads)
    settings, run = config.export, Storage(run_uri)
    check_formats(settings.formats, there)
    manifest, results = read_manifest(run.at("dataset")), run.read_json("report/metrics.json")
    net = _load(run, model, config.train.imgsz)
    measured = run.read_json(f"{model}/stage.json").get("published", model)
    metadata = _metadata(config, run, model, net, manifest, results[measured]["operating_point"])
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        files = _files(config, manifest, net, model, metadata)
        for name, data in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(data)
        if settings.int8:
            name = f"{model}_int8.onnx"
            files[name] = _with_own_point(place / name, manifest, metadata, threads)
            (place / name).write_bytes(files[name])
        detectors = _open(place, model, threads)
        rows = _labelled(manifest, settings.parity_pictures)
        parities = check_parity(
            net, detectors, rows, metadata["names"], config.train.imgsz, metadata["operating_point"]
        )
        for parity in parities:
            print(f"export: {parity.in_words()}", flush=True)
        require(parities)
        picture = letterbox(decode(rows[0].uri, white=rows[0].white), config.train.imgsz)[0]
        latency = _latency(config, run, model, net, detectors, place, threads, network_input([picture]))
    store = run.at("export")
    if store.exists("stage.json"):
        store.delete("stage.json")  # of what these files replace: until the stage has finished it would be wrong
    for name, data in files.items():
        store.write(name, data)
    timing = latency["timings"]
    pair = [timing.get(f"{name} ONNX Runtime") for name in ("teacher", model)]
    return {
        "model": model,
        "files": {name: len(data) for name, data in files.items()},
        "operating_point": metadata["operating_point"],
        "int8_operating_point": next(
            (d.metadata["operating_point"] for n, d in detectors.items() if "int8" in n), None
        ),
        "parity": {p.name: p.as_dict() for p in parities},
        "latency": latency,
        "speedup": round(pair[0]["p50_ms"] / pair[1]["p50_ms"], 2) if all(pair) and model != "teacher" else None,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _metadata(
    config: Config, run: Storage, model: str, net: nn.Module, manifest: Manifest, point: Mapping[str, Any]
) -> dict[str, Any]:
    """What an exported file says of itself: what runs it, what drift is judged by, and where it comes from."""
    names, imgsz = class_names(net), config.train.imgsz
    return {
        "names": names,
        "imgsz": imgsz,
        "operating_point": point,
        "white": max((row.white for row in manifest.rows), default=0.0),
        "reference": _reference(net, names, point, manifest, imgsz),
        "weights_sha256": hashlib.sha256(run.read(f"{model}/best.pt")).hexdigest(),
        "trained": f"{config.run.run_name}/{model}",
        "code": code_version(),
        "license": "AGPL-3.0",
    }


def _files(
    config: Config, manifest: Manifest, net: nn.Module, model: str, metadata: Mapping[str, Any]
) -> dict[str, bytes]:
    """Content of what is asked for, by name."""
    settings, imgsz = config.export, config.train.imgsz
    onnx = onnx_bytes(net, imgsz, metadata, settings.nms_inside)
    files = {f"{model}.onnx": onnx}
    if "openvino" in settings.formats:
        made = openvino_files(onnx, {**metadata, "nms_inside": settings.nms_inside})
        files |= {f"{model}_openvino/{name}": data for name, data in made.items()}
    if "tensorrt" in settings.formats:
        files[f"{model}.engine"] = engine_bytes(onnx, imgsz, metadata_of(onnx))
    if settings.int8:
        files[f"{model}_int8.onnx"] = int8_bytes(onnx, _calibration(manifest, config), family_of(net).kept_float)
    return files


def _with_own_point(file: Path, manifest: Manifest, metadata: Mapping[str, Any], threads: int) -> bytes:
    """An int8 model with an operating point of its own, chosen on val for the same escapes: its scores are others."""
    names, point = metadata["names"], metadata["operating_point"]
    val = [r for r in manifest.of_split("val") if r.boxes is not None]
    records = collect_squares(exported(LineDetector(file, threads)), val, metadata["imgsz"])
    own = operating_point(Pictures.of(records, len(names)), names, point["max_escape"])
    known = {"dfssd": json.dumps({**metadata, "operating_point": own, "nms_inside": False})}
    return with_metadata(file.read_bytes(), known)


def check_parity(
    net: nn.Module,
    detectors: Mapping[str, LineDetector],
    rows: Sequence[Row],
    names: Sequence[str],
    imgsz: int,
    point: Mapping[str, Any],
) -> list[Parity]:
    """Parity of each exported model with its network, on labelled pictures.

    Args:
        point: the network's operating point; each file brings its own.
    """
    found, tau_c = [], thresholds_of(point, names)
    splits = ", ".join(f"{count} {split}" for split, count in Counter(row.split for row in rows).items())
    for name, detector in detectors.items():
        conf = INSIDE_CONF if detector.inside else 0.001  # a model with NMS inside keeps no lower scores
        own = collect_squares(network(net, conf), rows, imgsz)
        other = collect_squares(exported(detector, conf), rows, imgsz)
        passed = _passed(own, tau_c), _passed(other, detector.tau_c.astype(np.float64))
        found.append(compare(name, _precision(name, detector), own, other, names, passed, splits))
    return found


def _passed(records: Sequence[dict[str, Any]], tau_c: np.ndarray) -> int:
    """Defective pictures in which nothing is found."""
    pictures = Pictures.of(records, len(tau_c))
    return int((~pictures.rejected(tau_c))[pictures.defective].sum())


def _precision(name: str, detector: LineDetector) -> str:
    """What its runtime says that it computes in."""
    if "int8" in name:
        return "int8"
    return "fp32" if "float32" in detector.precision or detector.precision == "fp32" else detector.precision


def _open(place: Path, model: str, threads: int) -> dict[str, LineDetector]:
    """The files that are there, each in its runtime."""
    known = {
        f"{model} ONNX Runtime": f"{model}.onnx",
        f"{model} OpenVINO": f"{model}_openvino",
        f"{model} TensorRT": f"{model}.engine",
        f"{model} ONNX Runtime int8": f"{model}_int8.onnx",
    }
    return {title: LineDetector(place / name, threads) for title, name in known.items() if (place / name).exists()}


def _load(run: Storage, model: str, imgsz: int) -> nn.Module:
    return ready_model(run.read(f"{model}/best.pt"), run.path(model, "best.pt"), imgsz)[0]


def _labelled(manifest: Manifest, most: int) -> list[Row]:
    """Test pictures with labels (and val's where test is small), spread evenly."""
    rows = [r for split in ("test", "val") for r in manifest.of_split(split) if r.boxes is not None]
    return [rows[k] for k in np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int))]


def _unlabelled(manifest: Manifest, most: int) -> list[Row]:
    """Pictures as they come from the line: unlabelled ones, else those of training."""
    rows = manifest.unlabelled_rows() or [r for r in manifest.rows if r.split == "train"]
    return [rows[k] for k in np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int))]


def _calibration(manifest: Manifest, config: Config) -> np.ndarray:
    """(n,3,S,S) float32 unlabelled pictures that set the ranges of int8."""
    rows = _unlabelled(manifest, config.export.calibration_pictures)
    return network_input([letterbox(decode(r.uri, white=r.white), config.train.imgsz)[0] for r in rows])


def _reference(
    net: nn.Module, names: Sequence[str], point: Mapping[str, Any], manifest: Manifest, imgsz: int
) -> dict[str, object]:
    """Numbers of unlabelled pictures (which the model was made for but has no labels of) and the scores it gives them."""
    detect, tau_c, numbers = network(net, 0.01), thresholds_of(point, names), []
    for row in _unlabelled(manifest, REFERENCE):
        picture = decode(row.uri, white=row.white)
        boxes = detect(network_input([letterbox(picture, imgsz)[0]]))[0]
        numbers.append(drift.picture_numbers(picture, detections_above(boxes, tau_c)))
    return drift.reference(numbers)


def _latency(
    config: Config,
    run: Storage,
    model: str,
    net: nn.Module,
    detectors: Mapping[str, LineDetector],
    place: Path,
    threads: int,
    picture: np.ndarray,
) -> dict[str, Any]:
    """Teacher and model in torch and in ONNX Runtime, and the other formats, interleaved, with NMS.

    On a real picture, since in noise one network finds hundreds of boxes and another none.
    """
    imgsz = config.train.imgsz
    nets, lines = {f"{model} torch": net}, dict(detectors)
    if model != "teacher" and run.exists("teacher/best.pt"):
        teacher = _load(run, "teacher", imgsz)
        nets = {"teacher torch": teacher, **nets}
        plain = {
            "names": class_names(teacher),
            "imgsz": imgsz,
            "operating_point": {"score": 0.25, "thresholds": {}},
        }
        (place / "teacher.onnx").write_bytes(onnx_bytes(teacher, imgsz, plain, config.export.nms_inside))
        lines = {"teacher ONNX Runtime": LineDetector(place / "teacher.onnx", threads), **lines}
    networks: dict[str, Any] = {
        name: lambda image, one=one: predict(one, image, LATENCY_CONF, NMS_IOU, MAX_BOXES) for name, one in nets.items()
    }
    networks |= {
        name: lambda image, one=one: one.boxes_of_input(image.numpy(), LATENCY_CONF) for name, one in lines.items()
    }
    image = torch.from_numpy(picture)
    return measure_latency(networks, image, repeats=config.evaluate.latency_repeats, threads=threads).as_dict()
