"""One row of benchmarks/distillation.py: Ultralytics' `distill_model` on the data set of a run.

Optimiser, learning rate, weight average, augmentation, batch and steps are those of our rows; the rest is Ultralytics' own.
Without a teacher everything is its own but batch and steps: `yolo train` as a user would type it. Leaves `stock/best.pt`
beside the run's other artefacts.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ultralytics import YOLO, settings

from dfssd.config import Thresholds, Train
from dfssd.data.manifest import Boxes, Manifest, read_manifest, read_pseudo
from dfssd.pseudo.thresholds import ScoreCounts, labelled_rates, make_policy
from dfssd.runtime.storage import Storage
from dfssd.train.teaching import EMA_TAU

EPOCHS = {False: 10, True: 4}  # with pseudo-labels an epoch is long


@dataclass
class Arguments:
    """What to train."""

    storage_path: str
    run_name: str
    teacher: str
    """Weights that teach (.pt); '': nobody, and the settings are Ultralytics' own."""
    steps: int = 800
    imgsz: int = 128
    seed: int = 0
    threads: int = 1
    close_mosaic: float = 0.3
    student: str = "yolov8n.yaml"
    """Network, or weights to begin with (.pt)."""
    device: str = "cpu"
    pseudo: bool = False
    """Also write the pseudo-labels as label files; half of each batch is then unlabelled images."""


def main() -> None:
    import tyro

    train_stock(tyro.cli(Arguments, description=__doc__))


def train_stock(a: Arguments) -> None:
    """Train, and leave `stock/best.pt` and `stock/last.pt`."""
    run = Path(a.storage_path).absolute() / a.run_name
    storage, train = Storage(str(run)), Train()
    data, epochs = run / "yolo", EPOCHS[a.pseudo]
    batch = train.batch * (2 if a.pseudo else 1)
    if a.teacher:
        write_data(data, storage, epoch_images=a.steps * batch // epochs, pseudo=a.pseudo)
    else:
        images = write_data(data, storage, epoch_images=0, pseudo=False)
        epochs = max(round(a.steps / math.ceil(images / batch)), 1)
    torch.set_num_threads(a.threads)
    settings.update({"mlflow": False, "tensorboard": False, "raytune": False})
    model = YOLO(a.student)
    if a.teacher:
        model.add_callback("on_train_start", lambda trainer: same_average(trainer, train, a.threads))
    model.train(
        data=str(data / "data.yaml"),
        **(like_ours(a, train, epochs, batch) if a.teacher else {}),
        epochs=epochs,
        batch=batch,
        imgsz=a.imgsz,
        seed=a.seed,
        device=0 if a.device == "cuda" else a.device.removeprefix("cuda:"),
        workers=0,
        amp=False,
        plots=False,
        pretrained=a.student.endswith(".pt"),
        project=str(run),
        name="ultralytics",
        exist_ok=True,
        verbose=False,
    )
    for name in ("best.pt", "last.pt"):
        storage.write(f"stock/{name}", (run / "ultralytics" / "weights" / name).read_bytes())
    fitness = float(model.trainer.best_fitness)  # mAP50-95 since 8.4
    storage.write_json("stock/stage.json", {"summary": {"best": {"map50_95": fitness}}})
    shutil.rmtree(data)


def like_ours(a: Arguments, train: Train, epochs: int, batch: int) -> dict[str, object]:
    """Settings of our rows in Ultralytics' words."""
    return {
        "distill_model": a.teacher,
        "nbs": batch,
        "optimizer": "AdamW",
        "lr0": train.lr,
        "lrf": train.lr_final,
        "momentum": 0.9,
        "weight_decay": train.weight_decay,
        "warmup_epochs": 0.1 * epochs,
        "warmup_bias_lr": 0.0,
        "close_mosaic": round(a.close_mosaic * epochs),
    }


def same_average(trainer: object, train: Train, threads: int) -> None:
    """Give Ultralytics our weight average: its own has hardly begun to average after some hundred steps."""
    trainer.ema.decay = lambda x: train.ema_decay * (1 - np.exp(-x / EMA_TAU))  # type: ignore[attr-defined]
    torch.set_num_threads(threads)


def write_data(folder: Path, storage: Storage, epoch_images: int, pseudo: bool) -> int:
    """The run's data set in Ultralytics' layout, lists repeated so that an epoch has `epoch_images` images; 0: as they are.

    Returns:
        images of an epoch.
    """
    manifest = read_manifest(storage.at("dataset"))
    shutil.rmtree(folder, ignore_errors=True)
    labelled = [_write(folder, r.image_id, r.uri, r.boxes) for r in manifest.labelled_rows()]
    val = [_write(folder, r.image_id, r.uri, r.boxes) for r in manifest.of_split("val")]
    streams = [labelled]
    if pseudo:
        kept = pseudo_labels(manifest, storage)
        rows = {r.image_id: r for r in manifest.unlabelled_rows()}
        streams.append([_write(folder, i, rows[i].uri, boxes) for i, boxes in kept.items()])
    share = epoch_images // len(streams) or len(labelled)
    lines = [line for stream in streams for line in (stream * (share // len(stream) + 1))[:share]]
    (folder / "train.txt").write_text("\n".join(lines))
    (folder / "val.txt").write_text("\n".join(val))
    names = "\n".join(f"  {k}: {n}" for k, n in enumerate(manifest.names))
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: train.txt\nval: val.txt\nnames:\n{names}\n")
    return len(lines)


def pseudo_labels(manifest: Manifest, storage: Storage) -> dict[str, Boxes]:
    """Candidates above the thresholds of `gmm`, as in the base row."""
    candidates = read_pseudo(storage.at("pseudo"))
    scores = ScoreCounts.empty(len(manifest.names))
    for image_id in sorted(candidates):
        scores.add(candidates[image_id])
    policy = make_policy(Thresholds(), scores, labelled_rates(manifest.labelled_rows(), len(manifest.names)))
    tau = policy.thresholds().numpy()
    return {i: b[b[:, 5] >= tau[b[:, 0].astype(int)]] for i, b in sorted(candidates.items())}


def _write(folder: Path, image_id: str, uri: str, boxes: Boxes | None) -> str:
    """Link an image, write its labels, return its path."""
    source = Path(uri.removeprefix("file://"))
    image, label = folder / "images" / f"{image_id}{source.suffix}", folder / "labels" / f"{image_id}.txt"
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    image.symlink_to(source)
    rows = [] if boxes is None else boxes[:, :5]
    label.write_text("".join(f"{int(b[0])} {b[1]:.6f} {b[2]:.6f} {b[3]:.6f} {b[4]:.6f}\n" for b in rows))
    return str(image)


if __name__ == "__main__":
    main()
