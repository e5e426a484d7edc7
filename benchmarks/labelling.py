"""What labelling costs beside stock `YOLO.predict(batch=16)`, and whether lower precision costs accuracy.

    python benchmarks/labelling.py --json labelling.json

A teacher is trained for a moment on made-up images (or comes from --weights), then labels others: decoding, networks,
fusion and writing, all stages of the labelling job in this one process. Stock prediction and each of our forms take turns; a
ratio of CPU time is taken within a turn, and the table shows medians over the turns. Stock is in fp32, as it always is on a
CPU. mAP is that of the candidates against the true boxes of the same images.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import tyro

from dfssd.config import Config, Data, Models, Pseudo, Run, Train
from dfssd.data.boxes import corners
from dfssd.data.manifest import Manifest, read_manifest, read_pseudo, read_withheld
from dfssd.data.preparation.prepare import prepare
from dfssd.data.synthetic import make_dataset
from dfssd.evaluate.validation import record, summarise
from dfssd.models.precision import autocast_dtype
from dfssd.models.yolo.detector import build_detector, detector_bytes, resolve_weights
from dfssd.pipeline.training import train_job
from dfssd.pseudo.shards import decode_shard, fuse_and_write, shards
from dfssd.pseudo.teachers import load_teachers
from dfssd.report.tables import render
from dfssd.runtime.artefact_names import TEACHER
from dfssd.runtime.storage import Storage
from dfssd.train.in_process import train_in_process

FORMS = (("fp32", "none"), ("bf16", "none"), ("fp32", "flips"), ("bf16", "flips"))  # of ours: precision, views


@dataclass
class Settings:
    """What is measured."""

    imgsz: tuple[int, ...] = (160, 320)
    """Sides of the network input (px)."""
    images: int = 32
    """Images of a turn."""
    turns: int = 3
    model: str = "yolov8s.yaml"
    """The teacher's network; a .pt begins with its weights."""
    train_steps: int = 150
    """Steps on images of 128 px that make the teacher; 0: an untrained one, for a look at the speed alone."""
    weights: str = ""
    """A trained .pt instead; it must know the made-up classes."""
    threads: int = 1
    json: str = ""
    """File to write the numbers to."""


def make_teacher(s: Settings, folder: Path) -> bytes:
    """Content of a .pt that has seen some of the made-up images."""
    if s.weights:
        return resolve_weights(s.weights)[1] or b""
    run = Storage(str(folder)).at("teacher")
    make_dataset(folder / "small", images=160, side=128, seed=1)
    prepare(Data(data=str(folder / "small"), label_fraction=1.0), 0, run.at("dataset"))
    if not s.train_steps:
        names = read_manifest(run.at("dataset")).names
        return detector_bytes(build_detector(s.model, names, 128), {})
    config = Config(
        run=Run(storage_path=str(folder), run_name="teacher", gpu="never"),
        models=Models(teacher=s.model),
        train=Train(
            imgsz=128, batch=8, steps=s.train_steps, val_every=s.train_steps, loader_workers=0, mosaic=0.5, lr=0.001
        ),
    )
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    weights = resolve_weights(s.model)[1]
    if weights is not None:
        run.write(f"{TEACHER}/init.pt", weights)
    train_in_process(train_job(config, run, TEACHER))
    return run.read(f"{TEACHER}/best.pt")


def label_all(config: Config, run: Storage, folder: str, manifest: Manifest, teachers: Any) -> None:
    """All stages of the labelling job, over all images, in this thread."""
    side = config.train.imgsz
    finish = partial(fuse_and_write, run_uri=run.uri, folder=folder, settings=config.pseudo, side=side)
    for shard in shards(manifest.rows, "shard"):
        finish(teachers(decode_shard(shard, side)))


def map50_95(run: Storage, folder: str, manifest: Manifest) -> float:
    """mAP50-95 of the candidates against the true boxes."""
    found, withheld = read_pseudo(run.at(folder)), read_withheld(run.at("dataset"))
    stats = []
    for row in manifest.rows:
        truth = row.boxes if row.boxes is not None else withheld[row.image_id]
        own, size = found[row.image_id], np.array([row.width, row.height] * 2)
        boxes = np.concatenate([corners(own) * size, own[:, 5:6], own[:, :1]], 1)
        targets = torch.from_numpy((corners(truth) * size).astype(np.float32))
        classes = torch.from_numpy(truth[:, 0].astype(np.float32))
        stats.append(record(torch.from_numpy(boxes.astype(np.float32)), classes, targets, row.uri))
    return float(summarise(stats, dict(enumerate(manifest.names)))["map50_95"])


def measure(s: Settings, side: int, weights: bytes, folder: Path) -> list[dict[str, Any]]:
    """Ratios to stock prediction at one size."""
    from ultralytics import YOLO

    run = Storage(str(folder)).at(f"px{side}")
    make_dataset(folder / f"data{side}", images=s.images, side=side, seed=2)
    prepare(Data(data=str(folder / f"data{side}"), near_duplicate=1.0), 0, run.at("dataset"))
    manifest = read_manifest(run.at("dataset"))
    run.write("teacher.pt", weights)
    stock, uris = YOLO(run.path("teacher.pt")), [r.uri for r in manifest.rows]
    native = autocast_dtype("auto", torch.device("cpu")) is not None
    forms = [f for f in FORMS if native or f[0] == "fp32"]
    ours = {}
    for amp, tta in forms:
        config = Config(train=Train(imgsz=side, amp=amp), pseudo=Pseudo(tta=tta))  # type: ignore[arg-type]
        teachers = load_teachers(config, run, ["teacher.pt"], manifest.names, torch.device("cpu"))
        ours[amp, tta] = partial(label_all, config, run, f"{amp}-{tta}", manifest, teachers)

    def predict() -> None:
        for _ in stock.predict(
            uris, imgsz=side, batch=16, conf=0.05, iou=0.65, max_det=100, verbose=False, stream=True
        ):
            pass

    times: dict[Any, list[float]] = {key: [] for key in ("stock", *ours)}
    for turn in range(s.turns + 1):  # the first one warms up
        for key, work in {"stock": predict, **ours}.items():
            torch.set_num_threads(s.threads)
            begun = time.process_time()
            work()
            if turn:
                times[key].append(time.process_time() - begun)
    rows = []
    for key in ours:
        ratio = statistics.median(a / b for a, b in zip(times["stock"], times[key], strict=True))
        rows.append(
            {
                "px": side,
                "precision": key[0],
                "views": 4 if key[1] == "flips" else 1,
                "img_per_cpu_s": round(len(uris) / statistics.median(times[key]), 1),
                "stock_img_per_cpu_s": round(len(uris) / statistics.median(times["stock"]), 1),
                "ratio_to_stock": round(ratio, 2),
                "map50_95": round(map50_95(run, f"{key[0]}-{key[1]}", manifest), 4),
            }
        )
    return rows


def main() -> None:
    s, rows = tyro.cli(Settings, description=__doc__), []
    cv2.setNumThreads(1)
    torch.set_num_threads(s.threads)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="dfssd-labelling-") as folder:
        weights = make_teacher(s, Path(folder))
        for side in s.imgsz:
            rows += measure(s, side, weights, Path(folder))
    header = ["px", "precision", "views", "img/s of a core", "stock", "ratio", "mAP50-95"]
    print(render("labelling, CPU time", header, [[str(v) for v in row.values()] for row in rows]))
    if s.json:
        Path(s.json).write_text(json.dumps({"settings": vars(s), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
