"""A run made up in a folder for the benchmarks of speed: images, manifest, a teacher and pseudo-labels, in seconds.

Needs nothing beyond torch, torchvision, Ultralytics, pyarrow, pydantic, numpy and OpenCV.
"""

from __future__ import annotations

import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs where the package is only copied, not installed

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.utils.torch_utils import ModelEMA

from dfssd.config import Config, Models, Run, Train
from dfssd.data.dataset import network_input
from dfssd.data.manifest import Boxes, Manifest, Row, pseudo_table, read_manifest, write_manifest, write_table
from dfssd.data.reading import decode, shrink
from dfssd.models.yolo.detector import build_detector, detector_bytes
from dfssd.pipeline.training import train_job
from dfssd.runtime.artefact_names import PSEUDO, STUDENT, TEACHER, ArtefactName
from dfssd.runtime.storage import Storage
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train.build import build_session
from dfssd.train.job import TrainJob
from dfssd.train.session import Session

NAMES = ["pit", "scratch", "patch"]
SURE = 40  # anchor points of a made-up teacher above the floor score, an image


def make_image(rng: np.random.Generator, width: int, height: int, grey: bool) -> tuple[np.ndarray, Boxes]:
    """(H,W,3) uint8 with up to four defects on a rough surface, and its (n,5) boxes."""
    noise = rng.normal(0, 1, (height // 4, width // 4, 1 if grey else 3)).astype(np.float32)
    image = 128 + 22 * cv2.resize(noise, (width, height)).reshape(height, width, -1)
    image += rng.normal(0, 5, (height, width, 1)).astype(np.float32)
    image = np.array(np.broadcast_to(image, (height, width, 3)), order="C")
    boxes = []
    for _ in range(rng.integers(0, 5)):
        cls = int(rng.integers(3))
        w, h = rng.uniform(0.04, 0.25, 2)
        cx, cy = rng.uniform(w / 2, 1 - w / 2), rng.uniform(h / 2, 1 - h / 2)
        centre, half = (int(cx * width), int(cy * height)), (int(w * width / 2), int(h * height / 2))
        shade = np.full(3, rng.uniform(30, 80)) if grey else rng.uniform(10, 90, 3)
        low, high = (centre[0] - half[0], centre[1] - half[1]), (centre[0] + half[0], centre[1] + half[1])
        if cls == 0:
            cv2.ellipse(image, centre, half, 0, 0, 360, shade.tolist(), -1)
        elif cls == 1:
            cv2.line(image, low, high, (255 - shade).tolist(), 3)
        else:
            cv2.rectangle(image, low, high, (180 - shade).tolist(), -1)
        boxes.append([cls, cx, cy, w, h])
    return image.clip(0, 255).astype(np.uint8), np.array(boxes, np.float32).reshape(-1, 5)


class MadeUp:
    """A run with its data set, a teacher that is sure of some boxes, and pseudo-labels.

    Args:
        folder: where all of it goes.
        images: how many, of which an eighth is val and the rest half labelled.
        size: width, height (px).
        teacher, student: Ultralytics yaml.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        images: int = 1024,
        size: tuple[int, int] = (1024, 768),
        grey: bool = False,
        teacher: str = "yolov8s.yaml",
        student: str = "yolov8n.yaml",
    ) -> None:
        self.folder, self.device, self.teacher, self.student = folder, device, teacher, student
        self.run = Storage(str(folder)).at("r")
        rows = self._images(images, size, grey)
        write_manifest(self.run.at("dataset"), Manifest(rows, NAMES, {"made_up": True}))
        self.manifest = read_manifest(self.run.at("dataset"))
        self.truth = {r.image_id: r.boxes for r in rows if r.boxes is not None}
        self.write_pseudo()

    def _images(self, images: int, size: tuple[int, int], grey: bool) -> list[Row]:
        (self.folder / "images").mkdir(parents=True, exist_ok=True)

        def one(k: int) -> Row:
            image, boxes = make_image(np.random.default_rng(k), *size, grey)
            path = self.folder / "images" / f"{k:06d}.jpg"
            cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, 90])
            split, image_id = "val" if k % 8 == 0 else "train", hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            return Row(image_id, str(path), *size, split, k % 2 == 0 and split == "train", k, boxes)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(one, range(images)))

    def write_pseudo(self) -> None:
        """Candidates of the unlabelled images: what is there, a little displaced, and as much again that is not there."""
        rng, rows = np.random.default_rng(0), self.manifest.unlabelled_rows()
        boxes = []
        for row in rows:
            true = self.truth[row.image_id].repeat(2, 0)
            moved = (true[:, 1:] + rng.normal(0, 0.01, (len(true), 4))).clip(0.02, 0.98)
            score = rng.uniform(0.05, 1, (len(true), 1))
            boxes.append(np.concatenate([true[:, :1], moved, score, np.ones_like(score)], 1).astype(np.float32))
        write_table(
            self.run.at("pseudo"), "shard-00000.parquet", pseudo_table([r.image_id for r in rows], "made up", boxes)
        )

    def lively(self, spec: str, imgsz: int) -> nn.Module:
        """A random detector with some `SURE` anchor points an image above a score of 0.05, as a trained one would have."""
        torch.manual_seed(0)
        model = build_detector(spec, NAMES, imgsz).to(self.device).eval()
        some = [shrink(decode(r.uri), imgsz) for r in self.manifest.rows[:8]]
        images = network_input(torch.stack([square(i, imgsz) for i in some]), self.device)
        with torch.no_grad():
            scores = model(images)[0][:, 4:].amax(1).flatten()
            place = scores.logit().sort(descending=True).values[SURE * len(some)]
            for branch in model.model[-1].cv3:
                branch[-1].bias.data += float(torch.tensor(0.05).logit() - place)
        return model

    def write_teacher(self, imgsz: int) -> None:
        self.run.write("teacher/best.pt", detector_bytes(self.lively(self.teacher, imgsz), {}))

    def config(self, imgsz: int, batch: int, amp: str = "auto", **train: Any) -> Config:
        """Settings of a run on these data with `batch` labelled and as many unlabelled images a step."""
        settings = {"imgsz": imgsz, "batch": batch, "amp": amp, "steps": 100_000, "val_every": 100_000, **train}
        return Config(
            run=Run(storage_path=str(self.folder), run_name="r"),
            models=Models(teacher=self.teacher, student=self.student),
            train=Train(**settings),  # type: ignore[arg-type]
        )

    def job(self, config: Config, stage: str = "student") -> TrainJob:
        name = ArtefactName.parse(stage)
        inputs = {"teacher": TEACHER, "pseudo": PSEUDO} if name == STUDENT else {}
        return train_job(config, self.run, name, **inputs)

    def session(self, imgsz: int, batch: int, amp: str = "auto", **train: Any) -> Session:
        return build_session(self.job(self.config(imgsz, batch, amp, **train)), WorkerGroup(), self.device)


def square(image_hwc: np.ndarray, imgsz: int) -> Tensor:
    """(3,imgsz,imgsz) uint8, the image at its top left."""
    out = np.full((imgsz, imgsz, 3), 114, np.uint8)
    out[: image_hwc.shape[0], : image_hwc.shape[1]] = image_hwc[..., ::-1]
    return torch.from_numpy(out.transpose(2, 0, 1).copy())


class StockStep:
    """A step of Ultralytics' trainer with `distill_model`: loss, backward, clipping, AdamW, weight average; fp16 on a GPU."""

    def __init__(self, made: MadeUp, imgsz: int, half: bool) -> None:
        device = made.device
        student = build_detector(made.student, NAMES, imgsz).to(device).train()
        teacher = build_detector(made.teacher, NAMES, imgsz).to(device)
        self.model = DistillationModel(teacher, student).to(device).train()
        self.device, self.half = device, half
        self.optimiser = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.002)
        self.average = ModelEMA(self.model)
        self.scaler = torch.amp.GradScaler(device.type, enabled=half and device.type == "cuda")

    def __call__(self, batch: dict[str, Any]) -> None:
        kept = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
        inputs = {**kept, "img": batch["img"].to(self.device, non_blocking=True).expand(-1, 3, -1, -1).float() / 255}
        with torch.autocast(self.device.type, torch.float16, enabled=self.scaler.is_enabled()):
            loss = self.model(inputs)[0].sum()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimiser)
        nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad()
        self.average.update(self.model)
