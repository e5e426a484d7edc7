"""Contract with Ultralytics, per family: what we rely on must hold in the installed version."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dfssd.errors import DfssdError
from dfssd.models.anchors import anchors_of, ignored_points
from dfssd.models.yolo.detection_loss import DetectionLoss
from dfssd.models.yolo.detector import (
    Teacher,
    branches,
    build_detector,
    configure,
    detector_bytes,
    feature_channels,
    load_detector,
    read_detector,
    resolve_weights,
)
from dfssd.pseudo.selection import labels

NAMES = ["a", "b", "c"]
FAMILIES = ["yolov8n.yaml", "yolo11n.yaml", "yolo26n.yaml"]


def _model(spec="yolov8n.yaml", seed=0):
    torch.manual_seed(seed)
    return build_detector(spec, NAMES, 64).train()


def _boxes(images=4, seed=1, side=64):
    """Images, and (n,5) boxes of each."""
    g = torch.Generator().manual_seed(seed)
    count = [3, 0, 2, 1][:images]
    n = sum(count)
    centre, size = 0.3 + 0.4 * torch.rand(n, 2, generator=g), 0.1 + 0.4 * torch.rand(n, 2, generator=g)
    cls = torch.randint(0, 3, (n, 1), generator=g).float()
    rows = torch.cat([cls, centre, size], 1).split(count)
    return torch.rand(images, 3, side, side, generator=g), [r.numpy() for r in rows]


def _batch(images=4, seed=1):
    pictures, boxes = _boxes(images, seed)
    return pictures, labels(boxes)


def _only(box, image, images=4):
    """One box (cls, cx, cy, w, h), in one of the images."""
    return [np.array([box] if k == image else [], np.float32).reshape(-1, 5) for k in range(images)]


def _ultralytics(boxes):
    """Boxes as Ultralytics' loss takes them."""
    flat = torch.from_numpy(np.concatenate(boxes))
    image = torch.arange(float(len(boxes))).repeat_interleave(torch.tensor([len(b) for b in boxes]))
    return {"cls": flat[:, :1], "bboxes": flat[:, 1:], "batch_idx": image}


@pytest.mark.parametrize("spec", FAMILIES)
@pytest.mark.parametrize("sure", [False, True])
def test_loss_and_its_gradient_equal_ultralytics(spec, sure):
    """Also with scores high enough that the normaliser is not held at 1, and with boxes that want the same anchor points."""
    model, (images, boxes) = _model(spec), _boxes(side=160 if sure else 64)
    if sure:
        shifts = np.array([[0, 0.01 * k, 0.02 * k, 0.3, 0.3] for k in range(-8, 9)], np.float32)
        boxes[2] = np.concatenate([boxes[2], *(b + shifts for b in boxes[0][:, None])])
        for block in [*model.model[-1].cv3, *getattr(model.model[-1], "one2one_cv3", [])]:
            block[-1].bias.data += 6
    first = next(model.parameters())
    output = model(images)
    sums, normaliser = DetectionLoss(model)(branches(output), labels(boxes))
    got = _loss(sums, normaliser)
    want = model.init_criterion()(output, _ultralytics(boxes))[0] / 4
    assert float(normaliser.sum(1).max()) > 1 or not sure
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)
    mine, theirs = (torch.autograd.grad(x.sum(), first, retain_graph=True)[0] for x in (got, want))
    assert (mine - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("spec", FAMILIES)
def test_raw_output_contract(spec):
    model = _model(spec)
    raw = branches(model(torch.rand(2, 3, 64, 64)))
    assert set(raw) == ({"one2many", "one2one"} if "26" in spec else {"one2many"})
    head, anchors = model.model[-1], 8 * 8 + 4 * 4 + 2 * 2
    for branch in raw.values():
        assert branch.boxes.shape == (2, 4 * head.reg_max, anchors) and branch.scores.shape == (2, 3, anchors)
        assert [f.shape[1] for f in branch.feats] == feature_channels(model)
    raw["one2many"].feats[0].sum().backward()
    assert model.model[0].conv.weight.grad.abs().sum() > 0  # taps are attached to the network


@pytest.mark.parametrize("spec", FAMILIES)
def test_frozen_teacher_gives_the_raw_output_of_the_unfused_network(spec):
    model = _model(spec).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        want = branches(model(images))
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    teacher = Teacher(model, torch.device("cpu"))
    got = teacher(images)
    for name, branch in want.items():
        torch.testing.assert_close(got.raw[name].scores, branch.scores, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(got.raw[name].boxes, branch.boxes, rtol=1e-3, atol=1e-3)
    for a, b in zip(got.taps, want["one2many"].feats, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert not any(p.requires_grad for p in teacher.model.parameters()) and before


@pytest.mark.parametrize("spec", FAMILIES)
def test_a_frozen_teacher_in_its_own_precision_says_what_autocast_says(spec):
    """Bit by bit, in under six tenths of the operations: weights are not cast anew."""
    images, counts, said = torch.rand(2, 3, 64, 64), [], []
    held = Teacher(_model(spec), torch.device("cpu"), dtype=torch.bfloat16)
    cast = Teacher(_model(spec), torch.device("cpu"))
    cast.model.eval(), setattr(cast.head, "training", True)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts[-1] += not func.is_view
            return func(*args, **(kwargs or {}))

    for run in (lambda: held(images).raw, lambda: branches(cast.model(images))):
        counts.append(0)
        with Count(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            said.append(run())
    for name, branch in said[0].items():
        assert torch.equal(branch.scores, said[1][name].scores) and torch.equal(branch.boxes, said[1][name].boxes)
        assert all(torch.equal(a, b) for a, b in zip(branch.feats, said[1][name].feats, strict=True))
    assert counts[0] < 0.7 * counts[1], counts


def test_normaliser_makes_shards_add_up_to_the_whole():
    model, (images, boxes) = _model(), _boxes()
    loss = DetectionLoss(model.eval())  # eval: batch norm must not differ between shards
    model.model[-1].training = True
    sums, normaliser = loss(branches(model(images)), labels(boxes))
    parts = []
    for first in (0, 2):
        own = slice(first, first + 2)
        parts.append(loss(branches(model(images[own])), labels(boxes[own])))
    torch.testing.assert_close(torch.cat([p[0] for p in parts], 1), sums, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([p[1] for p in parts], 1), normaliser)


def _loss(sums, normalisers):
    """(3,) what Ultralytics calls the loss, of one process."""
    return (sums.sum(1) / normalisers.sum(1).clamp(min=1).unsqueeze(1)).sum(0)


def _loss_and_grad(model, images, targets):
    raw = branches(model(images))
    for branch in raw.values():
        branch.scores.retain_grad()
        branch.boxes.retain_grad()
    sums, normaliser = (x.sum(1) for x in DetectionLoss(model)(raw, targets))
    sums.sum().backward()
    return sums, normaliser, raw["one2many"]


def test_weights_scale_the_terms_of_their_box_and_nothing_else():
    """One box with weight w: positives' class term and box and DFL terms are w times, background stays."""
    model, (images, _) = _model(), _batch()
    one = labels(_only([1, 0.5, 0.5, 0.4, 0.4], 0))
    full, normaliser, raw_full = _loss_and_grad(model, images, one)
    one.weight = one.box_weight = torch.full_like(one.weight, 0.25)
    quarter, normaliser_q, raw_quarter = _loss_and_grad(model, images, one)
    torch.testing.assert_close(quarter[0, [0, 2]], full[0, [0, 2]] * 0.25)
    assert normaliser == normaliser_q  # else uniform weights would cancel
    gf, gq = raw_full.scores.grad, raw_quarter.scores.grad
    positive = raw_full.boxes.grad.abs().sum(1) > 0  # (B,A) anchors with a box gradient
    assert positive.any()
    torch.testing.assert_close(gq.movedim(1, 2)[positive], gf.movedim(1, 2)[positive] * 0.25)
    torch.testing.assert_close(gq.movedim(1, 2)[~positive], gf.movedim(1, 2)[~positive])


def _ignoring(targets, area, image):
    """The targets with one ignored area more."""
    places = torch.full((len(targets.cls), 8, 4), -1.0)
    places[image, 0] = torch.tensor(area)
    return dataclasses.replace(targets, ignored_xywh=places)


def test_ignored_anchors_get_no_class_gradient_unless_a_box_claims_them():
    model, (images, targets) = _model(), _batch()
    targets = _ignoring(targets, [0.5, 0.5, 0.6, 0.6], 1)
    anchors = anchors_of(branches(model(images))["one2many"].feats, (8.0, 16.0, 32.0))
    ignore = ignored_points(targets, anchors)
    assert ignore[1].sum() > 5 and ignore[[0, 2, 3]].sum() == 0
    _, _, raw = _loss_and_grad(model, images, targets)
    grad = raw.scores.grad.abs().sum(1)
    assert (grad[1][ignore[1]] == 0).all() and (grad[1][~ignore[1]] > 0).all()
    targets.silent[:] = True
    _, _, raw = _loss_and_grad(model, images, targets)
    grad, boxes = raw.scores.grad.abs().sum(1), raw.boxes.grad.abs().sum(1)
    assert ((grad > 0) == (boxes > 0)).all() and (boxes > 0).any()  # only what boxes claim is left


def test_ignored_points_are_those_inside_any_box_also_one_thinner_than_a_cell():
    g = torch.Generator().manual_seed(0)
    boxes = torch.cat([torch.rand(2, 9, 2, generator=g), 0.3 * torch.rand(2, 9, 2, generator=g)], 2)
    boxes[0, 0] = torch.tensor([0.49, 0.5, 0.001, 0.9])
    boxes[1, 4:] = -1.0  # no box
    targets = dataclasses.replace(labels([np.zeros((0, 5))] * 2), ignored_xywh=boxes)
    anchors = anchors_of(
        [torch.zeros(1, 1, 8, 12), torch.zeros(1, 1, 4, 6), torch.zeros(1, 1, 2, 3)], (8.0, 16.0, 32.0)
    )
    got = ignored_points(targets, anchors)
    want = torch.zeros_like(got)
    for image in range(2):
        for cx, cy, w, h in boxes[image].tolist():
            for k, (point, stride) in enumerate(
                zip(anchors.points_a2.tolist(), anchors.strides_a1.tolist(), strict=True)
            ):
                (x, y), s = point, stride[0]
                near = abs(x * s - cx * 96) <= max(w * 48, s / 2) and abs(y * s - cy * 64) <= max(h * 32, s / 2)
                want[image, k] |= near and cx >= 0
    assert torch.equal(got, want) and 0 < want.float().mean() < 1
    thin = ignored_points(dataclasses.replace(targets, ignored_xywh=boxes[:, :1]), anchors)[0]
    assert thin[:96].sum() > 0 and thin[96:120].sum() > 0


def test_thousands_of_uncertain_boxes_need_neither_time_nor_memory():
    """150 in each of 16 images of 640 px: as a tensor of boxes x anchor points 2.9 s and 0.45 GiB."""
    g = torch.Generator().manual_seed(0)
    targets = dataclasses.replace(
        labels([np.zeros((0, 5))] * 16), ignored_xywh=0.2 * torch.rand(16, 150, 4, generator=g)
    )
    anchors = anchors_of([torch.zeros(1, 1, n, n) for n in (80, 40, 20)], (8.0, 16.0, 32.0))
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest[0] = max(largest[0], out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    ignored_points(targets, anchors)
    begun = time.process_time()
    with Watch():
        assert ignored_points(targets, anchors).any()
    assert time.process_time() - begun < 0.5 and largest[0] <= 16 * 150 * 80  # boxes x 2400 x 8400 before


def test_empty_batches_have_finite_loss():
    model, (images, _) = _model(), _batch()
    sums, normaliser, raw = _loss_and_grad(model, images, labels([np.zeros((0, 5))] * 4))
    assert torch.isfinite(sums).all() and normaliser.item() == 0
    assert sums[0, 0] == 0 and raw.scores.grad.abs().sum() > 0


@pytest.mark.parametrize("spec", FAMILIES)
def test_saved_weights_load_in_stock_ultralytics(spec, tmp_path):
    from ultralytics import YOLO

    (tmp_path / "best.pt").write_bytes(detector_bytes(_model(spec).eval(), {"stage": "student"}))
    stock = YOLO(str(tmp_path / "best.pt"))
    assert stock.names == dict(enumerate(NAMES)) and stock.task == "detect"
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    assert len(stock.predict(image, imgsz=64, verbose=False)) == 1
    again = load_detector((tmp_path / "best.pt").read_bytes(), "best.pt", 64)
    assert not again.training and again.args.imgsz == 64


def test_start_weights_are_taken_over_except_another_class_head():
    source = _model(seed=5)
    data = detector_bytes(source, {})
    same = build_detector("x.pt", NAMES, 64, data)
    torch.testing.assert_close(same.state_dict(), read_detector(data, "x").state_dict())
    other = build_detector("x.pt", [*NAMES, "d"], 64, data)
    assert other.model[-1].nc == 4
    torch.testing.assert_close(other.model[0].conv.weight, source.model[0].conv.weight.half().float())


@pytest.mark.parametrize(
    ("spec", "message"),
    [("nonsense.yaml", "no model"), ("yolov8s.onnx", "not a model"), ("gone.pt", "could not be fetched")],
)
def test_unusable_specs_say_what_to_do(spec, message):
    with pytest.raises(DfssdError, match=message) as caught:
        resolve_weights(spec)
    assert caught.value.todo


@pytest.mark.parametrize("spec", ["yolov8n-p2.yaml", "yolov8n-cls.yaml"])
def test_other_architectures_are_refused(spec):
    with pytest.raises(DfssdError, match=r"strides|no model"):
        resolve_weights(spec)
        build_detector(spec, NAMES, 64)


def test_damaged_weights_are_a_user_error(tmp_path):
    (tmp_path / "cut.pt").write_bytes(detector_bytes(_model(), {})[:5000])
    with pytest.raises(DfssdError):
        resolve_weights(str(tmp_path / "cut.pt"))


def test_end_to_end_heads_move_their_balance():
    model = _model("yolo26n.yaml")
    loss = DetectionLoss(model)
    loss.set_progress(0.0)
    start = loss.branch_weights()
    loss.set_progress(1.0)
    end = loss.branch_weights()
    assert start["one2many"] > 0.75 and end["one2many"] < 0.15
    assert sum(end.values()) == pytest.approx(1)
    configure(model, NAMES, 64)


def test_nms_is_torchvisions_in_every_process():
    """Ultralytics takes a loop in Python where nobody imported torchvision; every search for boxes passes `suppress`."""
    code = """
import sys, torch
from ultralytics.utils import nms as theirs
from dfssd.models.nms import suppress, suppress_together
assert "torchvision" not in sys.modules  # nor what it takes a second to import
theirs.TorchNMS = None  # what the loop would need
boxes = torch.rand(2, 7, 300, generator=torch.Generator().manual_seed(0)) * torch.tensor([64.0] * 4 + [1.0] * 3)[:, None]
found, together = suppress(boxes, 0.5, 0.5, 50), suppress_together(boxes, 0.5, 0.5, 50)
assert min(map(len, found)) > 5 and all(torch.equal(a, b) for a, b in zip(found, together))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    package = Path(__file__).parents[1] / "dfssd"
    named = {f.relative_to(package).as_posix() for f in package.rglob("*.py") if "non_max_suppression" in f.read_text()}
    assert named == {"models/nms.py"}
