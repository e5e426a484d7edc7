import dataclasses
import pickle
import subprocess
import sys
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from held import Crowd

from dfssd.config import Train
from dfssd.data import decoded, loaders, reading
from dfssd.data.dataset import ManifestDataset, Streams, TrainingSet, collate, network_input
from dfssd.data.decoded import DecodedCache
from dfssd.data.loaders import training_loader, validation_batches
from dfssd.data.manifest import Row, read_manifest
from dfssd.data.sampling import Draw
from dfssd.errors import DfssdError
from dfssd.runtime.lease import began
from dfssd.runtime.storage import Storage

CPU = torch.device("cpu")


def _dataset(prepared, boxes=None, decoded=None, **settings):
    manifest = read_manifest(Storage(str(prepared / "r" / "dataset")))
    rows = manifest.labelled_rows()
    return TrainingSet(rows, boxes or [r.boxes for r in rows], Train(imgsz=64, **settings), decoded=decoded), rows


def _same(a, b):
    return torch.equal(a["img"], b["img"]) and torch.equal(a["bboxes"], b["bboxes"]) and torch.equal(a["cls"], b["cls"])


def test_a_sample_depends_on_its_seed_and_nothing_else(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(decoded, "FREE_SHARE", -1)  # the disk of the machine that tests may be full
    warm, _ = _dataset(prepared, decoded=DecodedCache(str(tmp_path), 1.0))
    for k in range(8):
        warm.augmented(k, 1000 + k, True)  # what was loaded before must not matter (Ultralytics' mosaic buffer does)
    cold, _ = _dataset(prepared)
    assert _same(warm.augmented(3, 5, True), cold.augmented(3, 5, True))
    assert _same(warm.augmented(3, 5, True), cold.augmented(3, 5, True))  # now from the cache for certain
    assert not _same(warm.augmented(3, 5, True), warm.augmented(3, 6, True))
    assert not _same(warm.augmented(3, 5, True), warm.augmented(3, 5, False))


def test_boxes_follow_the_image(prepared):
    """Paint each box white and the rest black: after any augmentation white must lie where the boxes say."""
    dataset, rows = _dataset(prepared, hsv=(0.0, 0.0, 0.0), mixup=0.0, flipud=0.3)
    painted = []
    for row in rows:
        image = np.zeros((64, 64), np.uint8)
        for _, cx, cy, w, h in row.boxes:
            image[
                round((cy - h / 2) * 64) : round((cy + h / 2) * 64), round((cx - w / 2) * 64) : round((cx + w / 2) * 64)
            ] = 255
        painted.append(image)
    dataset.images.load = painted.__getitem__
    for seed in range(40):
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
    dataset, _ = _dataset(prepared, boxes=boxes, mixup=0.5)
    batch = collate([dataset.augmented(k, k, True) for k in range(6)])
    assert len(batch["cls"]) > 5
    torch.testing.assert_close(batch["score"], batch["cls"] / 10 + 0.3)
    torch.testing.assert_close(batch["agreement"], batch["cls"] / 20 + 0.5)
    assert (batch["batch_idx"].diff() >= 0).all()


def test_images_without_boxes_collate(prepared):
    _, rows = _dataset(prepared)
    dataset, _ = _dataset(prepared, boxes=[None] * len(rows))
    batch = collate([dataset.augmented(k, k, True) for k in range(3)])
    assert batch["cls"].shape == (0,) and batch["bboxes"].shape == (0, 4) and batch["img"].shape == (3, 1, 64, 64)
    ready = network_input(batch["img"], CPU)
    assert ready.shape == (3, 3, 64, 64) and ready.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ready[:, 2], batch["img"][:, 0] / 255)


def test_network_input_in_half_precision_is_what_rounding_gives():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for images in (values, torch.cat([values, values.flip(2), values.flip(3)], 1)):
        for dtype in (torch.bfloat16, torch.float16):
            half = network_input(images, CPU, dtype)
            assert torch.equal(half, network_input(images, CPU).to(dtype)) and half.shape == (1, 3, 16, 16)


def test_an_image_that_has_changed_since_prepare_is_a_user_error(prepared):
    _, rows = _dataset(prepared)
    other = [dataclasses.replace(r, width=65) for r in rows]
    with pytest.raises(DfssdError, match="has 64 x 64 px, and had 65 x 64"):
        TrainingSet(other, [r.boxes for r in rows], Train(imgsz=64)).augmented(0, 0, False)


def test_validation_shares_cover_all_images_once(prepared):
    _, rows = _dataset(prepared)
    val = ManifestDataset(rows, [r.boxes for r in rows], ["a", "b", "c"], 64)
    whole = [f for b in validation_batches(val) for f in b["im_file"]]
    shares = [f for r in range(2) for b in validation_batches(val, r, 2) for f in b["im_file"]]
    assert sorted(whole) == sorted(shares) == sorted(r.uri for r in rows)


def test_loading_processes_give_what_this_process_gives_and_see_nothing_of_main(prepared, tmp_path, monkeypatch):
    """With a thread that holds a lock, and a main file that must not run again: as in a training worker."""
    script = tmp_path / "careless.py"  # no `if __name__ == "__main__"`
    script.write_text(
        f"""
import pickle, sys, threading, torch
from dfssd.data.loaders import start_server, training_loader
print("main runs")
start_server()
streams, batches = pickle.load(open({str(tmp_path / "job")!r}, "rb"))
held = threading.Lock(); held.acquire()
threading.Thread(target=lambda: held.acquire(timeout=30), daemon=True).start()
loader = training_loader(streams, batches, 2, torch.device("cpu"), 10**5)
torch.save(list(loader), {str(tmp_path / "out")!r})
print(loader.num_workers, "processes")
held.release()
"""
    )
    dataset, rows = _dataset(prepared)
    draws = [[Draw("labelled", (4 * b + k) % len(rows), 31 * b + k, b < 2) for k in range(4)] for b in range(3)]
    with (tmp_path / "job").open("wb") as file:
        pickle.dump((Streams({"labelled": dataset}), draws), file)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["main runs", "2 processes"]
    here = list(training_loader(Streams({"labelled": dataset}), draws, 0, CPU, 1))
    for own, other in zip(here, torch.load(tmp_path / "out"), strict=True):
        assert _same(own, other) and own["im_file"] == other["im_file"]


def test_a_training_process_that_is_killed_leaves_no_loading_process(prepared, tmp_path):
    dataset, _ = _dataset(prepared)
    with (tmp_path / "job").open("wb") as file:
        pickle.dump((Streams({"labelled": dataset}), [[Draw("labelled", 0, k, True)] for k in range(1000)]), file)
    code = f"""
import multiprocessing, os, pickle, signal, torch
from dfssd.data.loaders import training_loader
streams, batches = pickle.load(open({str(tmp_path / "job")!r}, "rb"))
batches = iter(training_loader(streams, batches, 2, torch.device("cpu"), 10**5))
next(batches)
print(*(p.pid for p in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False, timeout=300)
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2
    until = time.monotonic() + 120
    while time.monotonic() < until and any(began(pid) for pid in pids):  # one that nobody has buried yet is dead, too
        time.sleep(0.1)
    assert not any(began(pid) for pid in pids), [Path(f"/proc/{pid}/status").read_text() for pid in pids if began(pid)]


def test_how_many_processes_load(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert loaders.processes(torch.device("cuda"), False) == 15 and loaders.processes(CPU, False) == 1
    monkeypatch.setattr(loaders.shutil, "disk_usage", lambda _: type("Disk", (), {"free": 64 * 2**20}))
    assert loaders._that_fit(10 * 2**20) == 1  # the /dev/shm that a container gets unasked


def test_the_number_of_processes_follows_the_step(prepared, monkeypatch):
    """From one to several where the step waits, to few where it does not; batches are the same ones in the same order."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)  # of a worker whose cores are shared with three loaders
    dataset, rows = _dataset(prepared)
    draws = [[Draw("labelled", k % len(rows), k, True)] for k in range(60)]
    here = [b["img"] for b in training_loader(Streams({"labelled": dataset}), draws, 0, CPU, 1)]
    slow = Streams({"labelled": dataset})
    loader = training_loader(slow, draws, -1, CPU, 10**5)
    taken, seen = [], []
    for batch in loader:
        taken.append(batch["img"])
        if len(taken) % 12 == 0:  # a step of one batch that computes for 10 ms; its images take as long as is said here
            loader._load_s = 12 * (0.018 if len(taken) < 24 else 0.001)
            waited = 0.008 if len(taken) < 24 else 0.0
            seen.append((loader.num_workers, bool(loader.follow(0.010 + waited, waited, 1))))
    assert seen[:3] == [(1, True), (3, True), (1, False)], seen
    assert len(taken) == len(here) and all(torch.equal(a, b) for a, b in zip(here, taken, strict=True))
    asked = training_loader(slow, draws, 2, CPU, 10**5)  # whoever sets a number keeps it
    for k, _ in enumerate(asked):
        assert k != 40 or (asked.follow(10.0, 0.0, 1) == "" and asked.num_workers == 2)
    assert [loaders.enough(0.1, s) for s in (0.05, 0.2, 10.0)] == [3, 1, 1]


def test_processes_share_the_table_of_images_and_do_not_copy_it():
    """What is sent to each of them does not grow with the number of images: tensors go as handles of shared memory."""

    def sent(count):
        rows = [
            Row(f"{k:016x}", f"/somewhere/images/{k:06d}.jpg", 64, 64, "train", True, k, None) for k in range(count)
        ]
        return len(bytes(ForkingPickler.dumps(Streams({"a": TrainingSet(rows, [None] * count, Train(imgsz=64))}))))

    assert sent(4000) < sent(40) + 500


@pytest.fixture
def far_away(prepared, monkeypatch):
    """The same images behind an object store that answers nobody before it was asked for five at a time; what it was asked
    for, and for how many at a time."""
    asked, readers = [], Crowd(5)

    def read(uri):
        asked.append(uri)
        readers.join()
        return Path(uri.removeprefix("s3://b/")).read_bytes()

    monkeypatch.setattr(reading, "read_uri", read)
    near, rows = _dataset(prepared, mixup=0.4)
    far = [dataclasses.replace(row, uri=f"s3://b/{row.uri}") for row in rows]
    stream = TrainingSet(far, [r.boxes for r in far], Train(imgsz=64, mixup=0.4))
    return near, stream, far, asked, readers


def test_the_images_of_a_batch_are_fetched_side_by_side(far_away):
    near, far, rows, asked, readers = far_away
    draws = [Draw("labelled", k, 100 + k, k % 4 != 3) for k in range(8)]
    assert any(len(near.plan(d.image, d.seed, d.mosaic).scenes) == 2 for d in draws)
    samples = Streams({"labelled": far}).__getitems__(draws)
    assert readers.most >= 5 and len(asked) == len(set(asked))  # none of them alone later, those of mixup neither
    assert all(_same(s, near.augmented(d.image, d.seed, d.mosaic)) for s, d in zip(samples, draws, strict=True))
    readers.most = 0
    for _ in validation_batches(ManifestDataset(rows, [r.boxes for r in rows], ["a", "b", "c"], 64)):
        assert readers.most >= 5


def test_it_is_foreseen_which_images_a_sample_needs(far_away):
    """What is fetched ahead must be what is then asked for, and no more, mixup's partner and its partners too."""
    _, _, rows, _, _ = far_away
    loaded, sizes = [], set()
    for mosaic in (1.0, 0.5, 0.0):
        stream = TrainingSet(rows, [None] * len(rows), Train(imgsz=64, mosaic=mosaic, mixup=0.3))
        stream.images.load = lambda i: loaded.append(i) or np.zeros((64, 64), np.uint8)
        for seed in range(200):
            loaded.clear()
            stream.augmented(seed % len(stream), seed, seed % 5 != 0)
            assert stream.plan(seed % len(stream), seed, seed % 5 != 0).images == loaded
            sizes.add((mosaic, len(loaded)))
    assert {(1.0, 4), (1.0, 8), (1.0, 1), (0.5, 1), (0.5, 2), (0.5, 4), (0.5, 5), (0.5, 8), (0.0, 1), (0.0, 2)} == sizes
