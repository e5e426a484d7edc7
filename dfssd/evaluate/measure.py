"""Stage `evaluate`: measure the finished models on the test split, once; write numbers, pictures and the report."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from dfssd.config import Config
from dfssd.data.dataset import ManifestDataset
from dfssd.data.manifest import Manifest, read_manifest
from dfssd.evaluate.gate import compare
from dfssd.evaluate.validation import collect, validate
from dfssd.models.detector import count_parameters, load_detector
from dfssd.models.predict import CONF, MAX_BOXES, NMS_IOU, predict
from dfssd.report import pictures
from dfssd.runtime.artefact_names import LABEL_ONLY, STUDENT, ArtefactName, weights_path
from dfssd.runtime.storage import Storage
from dfssd.runtime.worker_group import WorkerGroup


def measure(config: Config, run_uri: str, models: Sequence[ArtefactName], threads: int) -> dict[str, Any]:
    """Measure finished models of the run; runs as one Ray task.

    Args:
        models: names of their artefacts.
        threads: torch threads, also for the latency.

    Returns:
        by model (teacher, teacher_2, label_only, student): test {map50, map50_95, precision, recall, by_class}, params,
        latency_ms, weights_bytes; `gate` (see `gate.compare`) where both students are there; and `environment`.
    """
    torch.set_num_threads(threads)
    run = Storage(run_uri)
    manifest = read_manifest(run.at("dataset"))
    report = run.at("report")
    results: dict[str, Any] = {}
    detections = {}
    gate: dict[str, Any] = {}
    for artefact in models:
        begun, name, file = time.monotonic(), str(artefact), weights_path(run, artefact)
        data = run.read(file)
        model = load_detector(data, run.path(file), config.train.imgsz)
        parameters = count_parameters(model)
        model = model.fuse(verbose=False)
        results[name] = {
            "test": validate(model, _images(config, manifest, "test"), model.names, WorkerGroup(), torch.device("cpu")),
            "params": parameters,
            "latency_ms": latency_ms(model, config.train.imgsz, config.evaluate.latency_repeats),
            "weights_bytes": len(data),
        }
        if artefact in (LABEL_ONLY, STUDENT) and {LABEL_ONLY, STUDENT} <= set(models):
            gate[name] = collect(model, _images(config, manifest, "val"), WorkerGroup(), torch.device("cpu"))
        detections[name] = pictures.detect_samples(model, manifest, config)
        test = results[name]["test"]
        print(f"evaluate: {name}  test mAP50 {test['map50']:.4f}  {time.monotonic() - begun:.1f} s", flush=True)
    report.write("detections.png", pictures.detection_sheet(manifest, detections, config))
    if gate:
        results["gate"] = compare(gate[str(LABEL_ONLY)], gate[str(STUDENT)])
    results["environment"] = {
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": threads,
        "imgsz": config.train.imgsz,
        "torch": torch.__version__,
        "test_images": len(manifest.of_split("test")),
    }
    return results


def _images(config: Config, manifest: Manifest, split: str) -> ManifestDataset:
    rows = [r for r in manifest.of_split(split) if r.boxes is not None]
    return ManifestDataset(rows, [r.boxes for r in rows], manifest.names, config.train.imgsz)


@torch.no_grad()
def latency_ms(model: torch.nn.Module, imgsz: int, repeats: int) -> float:
    """Median time of one image through network and NMS (ms): fp32, batch 1, square input, after five passes to warm up."""
    image = torch.rand(1, 3, imgsz, imgsz, generator=torch.Generator().manual_seed(0))
    times = []
    for k in range(repeats + 5):
        begun = time.perf_counter()
        predict(model, image, max(CONF, 0.25), NMS_IOU, MAX_BOXES)
        if k >= 5:
            times.append((time.perf_counter() - begun) * 1e3)
    return round(statistics.median(times), 2)


def _processor() -> str:
    from pathlib import Path

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.processor()
