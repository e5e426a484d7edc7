"""What a labelling actor makes of images: families, ensembles, flips, letterbox, memory. No Ray needed."""

import cv2
import numpy as np
import pytest
import torch
from small import tiny_config

from dfssd.data.boxes import corners, iou, unflip
from dfssd.data.letterbox import out_of_letterbox
from dfssd.data.manifest import read_pseudo
from dfssd.errors import DfssdError
from dfssd.models.yolo.detector import build_detector, detector_bytes
from dfssd.pseudo.fusion import FLIPS
from dfssd.pseudo.shards import decode_shard, fuse_and_write, fuse_views
from dfssd.pseudo.teachers import TeacherActor, class_map, digest
from dfssd.runtime.storage import Storage

NAMES = ["pit", "scratch", "patch"]


def _weights(spec, names=NAMES, seed=0):
    """A random detector that is sure enough of itself to leave candidates, small ones at many places."""
    torch.manual_seed(seed)
    model = build_detector(spec, names, 64)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.9
    with torch.no_grad():  # statistics of real activations, else a random network says the same everywhere
        for _ in range(4):
            model.train()(torch.rand(4, 3, 64, 64))
    head = model.model[-1]
    for branch in (head.cv3, getattr(head, "one2one_cv3", None)):
        for conv in branch or ():
            conv[-1].weight.data *= 4
            conv[-1].bias.data += 4
    for branch in (head.cv2, getattr(head, "one2one_cv2", None)):
        for conv in branch or ():
            conv[-1].bias.data.view(4, -1)[:, min(1, head.reg_max - 1)] += 3
    return detector_bytes(model, {})


def _actor(tmp_path, *weights, names=NAMES, **settings):
    run = Storage(str(tmp_path)).at("r")
    files = []
    for k, data in enumerate(weights):
        files.append(f"t/{k}.pt")
        run.write(files[-1], data)
    return Labeller(run, tiny_config(tmp_path, **settings), files, names)


class Labeller:
    """The three stages of a shard in one process, without Ray."""

    def __init__(self, run, config, files, names):
        self.run, self.config = run, config
        self.actor = TeacherActor(run.uri, config, files, names, threads=1, gpu=False)
        self.teachers = self.actor.teachers

    def __call__(self, row):
        return fuse_and_write(self.actor(row), self.run.uri, "pseudo", self.config.pseudo, self.config.train.imgsz)

    def candidates(self, images, sizes):
        row = {"ids": [str(k) for k in range(len(images))], "images": images, "sizes": sizes}
        return fuse_views(self.teachers(row), self.config.pseudo, self.config.train.imgsz)


def _shard(tmp_path, count=5, shape=(48, 64)):
    rng = np.random.default_rng(0)
    uris = []
    for k in range(count):
        uris.append(str(tmp_path / f"{k}.png"))
        cv2.imwrite(uris[-1], rng.integers(0, 255, (*shape, 3), dtype=np.uint8))
    return decode_shard({"file": "shard-00000.parquet", "ids": [str(k) for k in range(count)], "uris": uris}, 64)


@pytest.mark.parametrize("tta", ["none", "flips"])
@pytest.mark.parametrize("spec", ["yolov8n.yaml", "yolo11n.yaml", "yolo26n.yaml"])
def test_every_family_labels(tmp_path, spec, tta):
    actor = _actor(tmp_path, _weights(spec), tta=tta)
    row = _shard(tmp_path)
    out = actor(row)
    found = read_pseudo(Storage(str(tmp_path)).at("r", "pseudo"))
    assert set(found) == set(row["ids"]) and out["images"] == 5 and out["boxes"] == sum(map(len, found.values())) > 0
    for boxes in found.values():
        assert boxes.shape[1] == 7 and set(boxes[:, 0]) <= {0, 1, 2} and len(boxes) <= 100
        assert (boxes[:, 5] >= 0.05).all() and (boxes[:, 5] <= 1).all() and (np.diff(boxes[:, 5]) <= 0).all()
        edges = corners(boxes)
        assert edges.min() >= -1e-6 and edges.max() <= 1 + 1e-6 and (boxes[:, 3:5] > 0).all()
        if tta == "none":
            assert (boxes[:, 6] == 1).all()
        else:
            assert (boxes[:, 6] > 0).all() and (boxes[:, 6] <= 1 + 1e-6).all() and (boxes[:, 6] < 0.999).any()


def test_one_teacher_without_flips_is_what_stock_ultralytics_finds(tmp_path):
    """Same weights, same image: the same boxes as `YOLO.predict`. One class, since with several stock keeps only the
    best class of each anchor."""
    from ultralytics import YOLO

    actor = _actor(tmp_path, _weights("yolov8n.yaml", ["pit"]), names=["pit"], tta="none", floor=0.2)
    row = _shard(tmp_path, count=3)
    actor(row)
    ours = read_pseudo(Storage(str(tmp_path)).at("r", "pseudo"))
    stock = YOLO(str(tmp_path / "r" / "t" / "0.pt"))
    for image_id, uri in zip(row["ids"], row["uris"], strict=True):
        (theirs,) = stock.predict(uri, imgsz=64, conf=0.2, iou=0.65, max_det=100, rect=False, verbose=False)
        mine, conf = ours[image_id], theirs.boxes.conf.numpy()
        assert len(mine) == len(conf) > 3
        np.testing.assert_allclose(mine[:, 5], conf, atol=2e-3)
        overlap = iou(corners(np.concatenate([conf[:, None], theirs.boxes.xywhn.numpy()], 1)), corners(mine))
        assert (overlap.max(1) > 0.97).all()


def test_flips_make_labels_independent_of_orientation(tmp_path):
    """A mirrored image gets the mirrored boxes: with all four forms there is no preferred one."""
    actor = _actor(tmp_path, _weights("yolov8n.yaml"), tta="flips")
    row = _shard(tmp_path, count=1, shape=(64, 64))
    (plain,) = actor.candidates(row["images"], row["sizes"])
    for flip in FLIPS[1:]:
        axes = [a for a, on in zip((2, 1), flip, strict=True) if on]
        (turned,) = actor.candidates(np.flip(row["images"], axes).copy(), row["sizes"])
        back = unflip(turned, *flip)
        clear = plain[plain[:, 5] > 0.3]
        overlap = iou(corners(clear), corners(back)) * (clear[:, :1] == back[None, :, 0])
        found = overlap.max(1) > 0.97  # not all: where boxes crowd, which one starts a cluster hangs on the last digit
        assert len(clear) > 5 and found.mean() >= 0.7
        np.testing.assert_allclose(clear[found, 5], back[overlap.argmax(1), 5][found], atol=0.02)


def test_an_ensemble_agrees_less_than_one_teacher(tmp_path):
    one = _actor(tmp_path / "a", _weights("yolov8n.yaml"), tta="none")
    twins = _actor(tmp_path / "b", _weights("yolov8n.yaml"), _weights("yolov8n.yaml"), tta="none")
    other = _actor(tmp_path / "c", _weights("yolov8n.yaml"), _weights("yolo11n.yaml", seed=5), tta="none")
    row = _shard(tmp_path, count=1)
    args = row["images"], row["sizes"]
    (single,), (same,), (mixed,) = one.candidates(*args), twins.candidates(*args), other.candidates(*args)
    assert (same[:, 6] > 0.999).mean() > 0.5 and same[0, 5] == pytest.approx(single[0, 5], abs=1e-5)
    assert mixed[:, 6].mean() < same[:, 6].mean()
    assert len({one.teachers.digest, twins.teachers.digest, other.teachers.digest}) == 3 and digest(
        [b"a", b"b"]
    ) != digest([b"b", b"a"])


def test_classes_are_matched_by_name(tmp_path):
    names = ["dirt", "patch", "pit", "scratch"]  # one more, in another order
    actor = _actor(tmp_path, _weights("yolov8n.yaml", names), tta="none")
    assert actor.teachers.maps[0].tolist() == [-1, 2, 0, 1]
    (boxes,) = actor.candidates(*(lambda r: (r["images"], r["sizes"]))(_shard(tmp_path, count=1)))
    assert set(boxes[:, 0]) <= {0, 1, 2} and len(boxes)
    with pytest.raises(DfssdError, match=r"does not know the classes \['patch'\]"):
        class_map({0: "pit", 1: "scratch"}, NAMES, "t.pt")


def test_unreadable_images_become_null_rows(tmp_path):
    row = _shard(tmp_path, count=3)
    (tmp_path / "1.png").write_bytes(b"not an image")
    (tmp_path / "2.png").unlink()
    row = decode_shard({k: row[k] for k in ("file", "ids", "uris")}, 64)
    out = _actor(tmp_path, _weights("yolov8n.yaml"))(row)
    assert out["bad"] == [str(tmp_path / "1.png"), str(tmp_path / "2.png")]
    assert set(read_pseudo(Storage(str(tmp_path)).at("r", "pseudo"))) == {"0"}


def test_an_automatic_batch_shrinks_to_the_memory_there_is(tmp_path, monkeypatch):
    import dfssd.pseudo.teachers as teachers

    sizes, real = [], teachers.predict

    def small_gpu(model, images, *args):
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(model, images, *args)

    monkeypatch.setattr(teachers, "predict", small_gpu)
    row = _shard(tmp_path, count=5)
    out = _actor(tmp_path, _weights("yolov8n.yaml"), tta="none")(row)
    assert out["images"] == 5 and sizes == [5, 5, 4, 2, 2, 1]
    with pytest.raises(DfssdError, match="lower --label-batch"):
        _actor(tmp_path, _weights("yolov8n.yaml"), label_batch=4)(row)


@pytest.mark.parametrize("shape", [(64, 64), (48, 64), (63, 40), (30, 200), (500, 100), (13, 410), (1, 90), (333, 7)])
def test_boxes_come_out_of_the_letterbox_where_they_were(tmp_path, shape):
    """Where the image's edges lie in the input is read off its pixels; a box in between must come back to its place, which on
    strips wants a scale for each axis: at 640 px one of 4096 x 130 px is 20 px high, and not 20.3."""
    height, width = shape
    path = str(tmp_path / "white.png")
    cv2.imwrite(path, np.full((height, width), 255, np.uint8))
    row = decode_shard({"uris": [path]}, 64)
    y, x = np.nonzero(row["images"][0, ..., 0] == 255)
    low, high = np.array([x.min(), y.min()]), np.array([x.max(), y.max()]) + 1
    for box in ((0.4, 0.5, 0.2, 0.3), (0.5, 0.5, 1.0, 1.0), (0.1, 0.9, 0.2, 0.2)):
        truth = np.array(box)
        centre, size = low + truth[:2] * (high - low), truth[2:] * (high - low)
        inside = np.array([[0, *centre / 64, *size / 64, 0.9, 1.0], [0, 0.5, 0.5, 3.0, 3.0, 0.9, 1.0]], np.float32)
        out = out_of_letterbox(inside, row["sizes"][0], 64)
        np.testing.assert_allclose(out[:, 1:5], [truth, [0.5, 0.5, 1, 1]], atol=2e-6)
        assert iou(corners(out[:1]), corners(np.array([[0, *box]])))[0, 0] > 1 - 1e-4
