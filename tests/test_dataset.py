import dataclasses
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dfssd.config import Train
from dfssd.data import dataset as dataset_module
from dfssd.data.dataset import ManifestDataset, Streams, collate, validation_batches
from dfssd.data.manifest import read_manifest
from dfssd.data.sampling import Draw
from dfssd.runtime.storage import Storage


def _dataset(prepared, cache_gib=1.0, boxes=None, **settings):
    manifest = read_manifest(Storage(str(prepared / "r" / "dataset")))
    rows = manifest.labelled_rows()
    train = Train(imgsz=64, **settings)
    return ManifestDataset(rows, boxes or [r.boxes for r in rows], manifest.names, 64, train, cache_gib), rows


def _same(a, b):
    return torch.equal(a["img"], b["img"]) and torch.equal(a["bboxes"], b["bboxes"]) and torch.equal(a["cls"], b["cls"])


def test_a_sample_depends_on_its_seed_and_nothing_else(prepared):
    warm, _ = _dataset(prepared)
    for k in range(8):
        warm.augmented(k, 1000 + k, True)  # what was loaded before must not matter (Ultralytics' mosaic buffer does)
    cold, _ = _dataset(prepared, cache_gib=0.0)
    assert _same(warm.augmented(3, 5, True), cold.augmented(3, 5, True))
    assert not _same(warm.augmented(3, 5, True), warm.augmented(3, 6, True))
    assert not _same(warm.augmented(3, 5, True), warm.augmented(3, 5, False))
    assert len(cold._cached) == 0 and cold._cached_bytes == 0


def test_boxes_follow_the_image(prepared):
    """Paint each box white and the rest black: after any augmentation white must lie where the boxes say."""
    dataset, rows = _dataset(prepared, hsv=(0.0, 0.0, 0.0))
    for k, row in enumerate(rows):
        image = np.zeros((64, 64, 3), np.uint8)
        for _, cx, cy, w, h in row.boxes:
            image[
                round((cy - h / 2) * 64) : round((cy + h / 2) * 64), round((cx - w / 2) * 64) : round((cx + w / 2) * 64)
            ] = 255
        dataset._cached[k] = image, (64, 64)
    for seed in range(12):
        sample = dataset.augmented(seed % len(rows), seed, seed % 2 == 0)
        covered = np.zeros((64, 64), bool)
        for cx, cy, w, h in sample["bboxes"].numpy() * 64:
            covered[
                max(0, int(cy - h / 2 - 1)) : int(cy + h / 2 + 2), max(0, int(cx - w / 2 - 1)) : int(cx + w / 2 + 2)
            ] = True
        white = sample["img"][0].numpy() > 200
        # Slivers that the augmentation drops as boxes may stay visible; they are a small part.
        assert (white & ~covered).sum() <= 0.15 * max(white.sum(), 60)


def test_scores_travel_with_their_boxes(prepared):
    _, rows = _dataset(prepared)
    boxes = [np.concatenate([r.boxes, r.boxes[:, :1] / 10 + 0.3, r.boxes[:, :1] / 20 + 0.5], 1) for r in rows]
    dataset, _ = _dataset(prepared, boxes=boxes)
    batch = collate([dataset.augmented(k, k, True) for k in range(6)])
    assert len(batch["cls"]) > 5
    torch.testing.assert_close(batch["score"], batch["cls"] / 10 + 0.3)
    torch.testing.assert_close(batch["agreement"], batch["cls"] / 20 + 0.5)
    assert (batch["batch_idx"].diff() >= 0).all()


def test_images_without_boxes_collate(prepared):
    _, rows = _dataset(prepared)
    dataset, _ = _dataset(prepared, boxes=[None] * len(rows))
    batch = collate([dataset.augmented(k, k, True) for k in range(3)])
    assert batch["cls"].shape == (0,) and batch["bboxes"].shape == (0, 4) and batch["img"].shape == (3, 3, 64, 64)


def test_streams_and_validation_shares(prepared):
    dataset, rows = _dataset(prepared)
    assert _same(Streams({"labelled": dataset})[Draw("labelled", 2, 9, True)], dataset.augmented(2, 9, True))
    val = ManifestDataset(rows, [r.boxes for r in rows], ["a", "b", "c"], 64)
    whole = [f for b in validation_batches(val) for f in b["im_file"]]
    shares = [f for r in range(2) for b in validation_batches(val, r, 2) for f in b["im_file"]]
    assert sorted(whole) == sorted(shares) == sorted(r.uri for r in rows)


@pytest.fixture
def far_away(prepared, monkeypatch):
    """The same images behind an object store that is slow to answer; what it was asked for, and for how many at a time."""
    asked, running, most = [], [0], [0]
    lock = threading.Lock()

    def read(uri):
        with lock:
            asked.append(uri)
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.02)
        with lock:
            running[0] -= 1
        return Path(uri.removeprefix("s3://b/")).read_bytes()

    monkeypatch.setattr(dataset_module, "read_uri", read)
    near, rows = _dataset(prepared)
    far = [dataclasses.replace(row, uri=f"s3://b/{row.uri}") for row in rows]
    stream = ManifestDataset(far, [r.boxes for r in far], near.data["names"].values(), 64, Train(imgsz=64), 0.0)
    return near, stream, asked, most


def test_the_images_of_a_batch_are_fetched_side_by_side(far_away):
    near, far, asked, most = far_away
    draws = [Draw("labelled", k, 100 + k, k % 4 != 3) for k in range(8)]
    samples = Streams({"labelled": far}).__getitems__(draws)
    assert most[0] > 4 and len(asked) == len(set(asked))
    assert all(_same(s, near.augmented(d.image, d.seed, d.mosaic)) for s, d in zip(samples, draws, strict=True))
    most[0] = 0
    for _ in validation_batches(ManifestDataset(far._rows, far._boxes, ["a", "b", "c"], 64, None, 0.0)):
        assert most[0] > 4


def test_it_is_foreseen_which_images_a_sample_needs(far_away, monkeypatch):
    """Ultralytics picks mosaic partners as it goes: what is fetched ahead must be what it then asks for, and no more."""
    near = far_away[0]
    loaded = []
    real = ManifestDataset.load_image
    monkeypatch.setattr(ManifestDataset, "load_image", lambda self, i, **kw: loaded.append(i) or real(self, i, **kw))
    sizes = set()
    for mosaic in (1.0, 0.5, 0.0):
        stream = ManifestDataset(near._rows, near._boxes, ["a", "b", "c"], 64, Train(imgsz=64, mosaic=mosaic))
        for seed in range(40):
            loaded.clear()
            stream.augmented(seed % len(stream), seed, seed % 5 != 0)
            assert stream.parts(seed % len(stream), seed, seed % 5 != 0) == loaded
            sizes.add((mosaic, len(loaded)))
    assert {(1.0, 4), (1.0, 1), (0.5, 4), (0.5, 1), (0.0, 1)} == sizes
