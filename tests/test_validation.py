"""Our numbers must be those of stock Ultralytics on the same weights and images."""

import shutil

import numpy as np
import pytest
import torch
from small import tiny_config

from dfssd.config import Data
from dfssd.data.dataset import ManifestDataset
from dfssd.data.manifest import read_manifest
from dfssd.data.prepare import prepare
from dfssd.errors import DfssdError
from dfssd.evaluate.validation import summarise, validate
from dfssd.models.detector import load_detector
from dfssd.runtime.storage import Storage
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train.job import TrainJob
from dfssd.train.in_process import train_in_process


@pytest.fixture(scope="module")
def trained(strip, tmp_path_factory):
    """A detector that has learned its training images by heart, so that its mAP means something."""
    storage = tmp_path_factory.mktemp("trained")
    prepare(
        Data(data=str(strip), label_fraction=1.0, split_shares=(0.6, 0.2, 0.2)),
        0,
        Storage(str(storage)).at("r", "dataset"),
    )
    still = {"mosaic": 0.0, "scale": 0.0, "translate": 0.0, "fliplr": 0.0, "hsv": (0.0, 0.0, 0.0)}
    # One validation, at the end: val is so small that rounding decides which of two is better, and the first may win.
    often = {"val_every": 320, "log_every": 80}
    config = tiny_config(storage, steps=320, batch=8, lr=0.004, ema_decay=0.9, **often, **still)
    return storage, train_in_process(TrainJob("label_only", str(storage / "r"), config))


def _measure(storage, split, world=None):
    run = Storage(str(storage / "r"))
    manifest = read_manifest(run.at("dataset"))
    rows = manifest.of_split(split)
    model = load_detector(run.read("label_only/best.pt"), "best.pt", 64)
    dataset = ManifestDataset(rows, [r.boxes for r in rows], manifest.names, 64)
    return validate(model, dataset, model.names, world or WorkerGroup(), torch.device("cpu")), rows, manifest


def test_equal_to_yolo_val(trained, tmp_path):
    from ultralytics import YOLO

    storage, _ = trained
    for split in ("val", "train"):
        ours, rows, manifest = _measure(storage, split)
        root = tmp_path / split
        for sub in ("images", "labels"):
            (root / sub).mkdir(parents=True)
        for row in rows:
            shutil.copy(row.uri, root / "images" / f"{row.image_id}.png")
            lines = [f"{int(b[0])} " + " ".join(f"{v:.8f}" for v in b[1:]) for b in row.boxes]
            (root / "labels" / f"{row.image_id}.txt").write_text("\n".join(lines))
        (root / "data.yaml").write_text(f"path: {root}\ntrain: images\nval: images\nnames: {manifest.names}\n")
        stock = YOLO(str(storage / "r" / "label_only" / "best.pt"))
        theirs = stock.val(data=str(root / "data.yaml"), imgsz=64, batch=16, workers=0, plots=False, verbose=False)
        assert ours["map50"] == pytest.approx(theirs.box.map50, abs=1e-3)
        assert ours["map50_95"] == pytest.approx(theirs.box.map, abs=1e-3)
    assert ours["map50"] > 0.1  # on the images it was trained on; else the comparison says little


def test_training_has_measured_the_same_weights_nearly_the_same(trained):
    """`best.pt` is stored in half precision; what training measured in full must hold for it."""
    storage, result = trained
    ours, _, _ = _measure(storage, "val")
    assert ours["map50_95"] == pytest.approx(result["best"]["map50_95"], abs=5e-3)


def test_workers_share_the_images_and_agree(trained):
    storage, _ = trained
    alone, rows, _ = _measure(storage, "train")
    assert len(rows) > 16

    class Pair(WorkerGroup):
        """Runs as one of two workers; gather() is replaced by both workers' real parts."""

        parts: list = []  # noqa: RUF012

        def gather(self, value):
            Pair.parts.append(value)
            return list(Pair.parts)

    _measure(storage, "train", Pair(0, 2))
    together, _, _ = _measure(storage, "train", Pair(1, 2))
    assert len(Pair.parts[0]) + len(Pair.parts[1]) == len(rows)
    assert together["map50"] == pytest.approx(alone["map50"], abs=1e-9)


def test_no_box_at_all_is_a_user_error():
    nothing = {"tp": np.zeros((0, 10), bool), "conf": np.zeros(0), "pred_cls": np.zeros(0), "target_cls": np.zeros(0)}
    with pytest.raises(DfssdError, match="no box at all"):
        summarise([nothing | {"target_img": np.zeros(0), "im_name": "x"}], {0: "a"})
