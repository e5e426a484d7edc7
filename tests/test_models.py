"""Contract with Ultralytics, per family: what we rely on must hold in the installed version."""

import numpy as np
import pytest
import torch

from dfssd.errors import DfssdError
from dfssd.models.detection_loss import DetectionLoss, Targets
from dfssd.models.detector import (
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

NAMES = ["a", "b", "c"]
FAMILIES = ["yolov8n.yaml", "yolo11n.yaml", "yolo26n.yaml"]


def _model(spec="yolov8n.yaml", seed=0):
    torch.manual_seed(seed)
    return build_detector(spec, NAMES, 64).train()


def _batch(images=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    count = [3, 0, 2, 1][:images]
    n = sum(count)
    centre, size = 0.3 + 0.4 * torch.rand(n, 2, generator=g), 0.1 + 0.4 * torch.rand(n, 2, generator=g)
    image = torch.cat([torch.full((c,), float(i)) for i, c in enumerate(count)])
    cls = torch.randint(0, 3, (n,), generator=g).float()
    return torch.rand(images, 3, 64, 64, generator=g), Targets(
        cls, torch.cat([centre, size], 1), image, torch.ones(n), torch.ones(n)
    )


@pytest.mark.parametrize("spec", FAMILIES)
def test_loss_equals_ultralytics(spec):
    model, (images, targets) = _model(spec), _batch()
    output = model(images)
    sums, normaliser = DetectionLoss(model)(branches(output), targets)
    got = (sums / normaliser.clamp(min=1).unsqueeze(1)).sum(0)
    batch = {"cls": targets.cls.view(-1, 1), "bboxes": targets.boxes, "batch_idx": targets.image}
    want = model.init_criterion()(output, batch)[0] / 4
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("spec", FAMILIES)
def test_raw_output_contract(spec):
    model = _model(spec)
    raw = branches(model(torch.rand(2, 3, 64, 64)))
    assert set(raw) == ({"one2many", "one2one"} if "26" in spec else {"one2many"})
    head, anchors = model.model[-1], 8 * 8 + 4 * 4 + 2 * 2
    for branch in raw.values():
        assert branch["boxes"].shape == (2, 4 * head.reg_max, anchors) and branch["scores"].shape == (2, 3, anchors)
        assert [f.shape[1] for f in branch["feats"]] == feature_channels(model)
    raw["one2many"]["feats"][0].sum().backward()
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
        torch.testing.assert_close(got.raw[name]["scores"], branch["scores"], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(got.raw[name]["boxes"], branch["boxes"], rtol=1e-3, atol=1e-3)
    for a, b in zip(got.taps, want["one2many"]["feats"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert not any(p.requires_grad for p in teacher.model.parameters()) and before


def test_normaliser_makes_shards_add_up_to_the_whole():
    model, (images, targets) = _model(), _batch()
    loss = DetectionLoss(model.eval())  # eval: batch norm must not differ between shards
    model.model[-1].training = True
    sums, normaliser = loss(branches(model(images)), targets)
    parts = []
    for half in (0, 1):
        keep = (targets.image >= 2 * half) & (targets.image < 2 * half + 2)
        mine = targets.where(keep)
        mine.image = mine.image - 2 * half
        parts.append(loss(branches(model(images[2 * half : 2 * half + 2])), mine))
    torch.testing.assert_close(sum(p[0] for p in parts), sums, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sum(p[1] for p in parts), normaliser)


def _loss_and_grad(model, images, targets, ignore=None):
    raw = branches(model(images))
    for branch in raw.values():
        branch["scores"].retain_grad()
        branch["boxes"].retain_grad()
    sums, normaliser = DetectionLoss(model)(raw, targets, ignore)
    sums.sum().backward()
    return sums, normaliser, raw["one2many"]


def test_weights_scale_the_terms_of_their_box_and_nothing_else():
    """One box with weight w: positives' class term and box and DFL terms are w times, background stays."""
    model, (images, _) = _model(), _batch()
    one = Targets(
        torch.tensor([1.0]), torch.tensor([[0.5, 0.5, 0.4, 0.4]]), torch.tensor([0.0]), torch.ones(1), torch.ones(1)
    )
    full, normaliser, raw_full = _loss_and_grad(model, images, one)
    one.weight = one.box_weight = torch.tensor([0.25])
    quarter, normaliser_q, raw_quarter = _loss_and_grad(model, images, one)
    torch.testing.assert_close(quarter[0, [0, 2]], full[0, [0, 2]] * 0.25)
    assert normaliser == normaliser_q  # else uniform weights would cancel
    gf, gq = raw_full["scores"].grad, raw_quarter["scores"].grad
    positive = raw_full["boxes"].grad.abs().sum(1) > 0  # (B,A) anchors with a box gradient
    assert positive.any()
    torch.testing.assert_close(gq.movedim(1, 2)[positive], gf.movedim(1, 2)[positive] * 0.25)
    torch.testing.assert_close(gq.movedim(1, 2)[~positive], gf.movedim(1, 2)[~positive])


def test_ignored_anchors_get_no_class_gradient_unless_a_box_claims_them():
    model, (images, targets) = _model(), _batch()
    uncertain = Targets(
        torch.tensor([0.0]), torch.tensor([[0.5, 0.5, 0.6, 0.6]]), torch.tensor([1.0]), torch.ones(1), torch.ones(1)
    )
    loss = DetectionLoss(model)
    feats = branches(model(images))["one2many"]["feats"]
    ignore = loss.anchors_inside(feats, uncertain, 4)
    assert ignore[1].sum() > 5 and ignore[[0, 2, 3]].sum() == 0
    _, _, raw = _loss_and_grad(model, images, targets, ignore)
    grad = raw["scores"].grad.abs().sum(1)
    assert (grad[1][ignore[1]] == 0).all() and (grad[1][~ignore[1]] > 0).all()
    everything = torch.ones_like(ignore)
    _, _, raw = _loss_and_grad(model, images, targets, everything)
    grad, boxes = raw["scores"].grad.abs().sum(1), raw["boxes"].grad.abs().sum(1)
    assert ((grad > 0) == (boxes > 0)).all() and (boxes > 0).any()  # only what boxes claim is left


def test_a_box_thinner_than_a_cell_still_covers_one():
    model = _model()
    feats = branches(model(torch.rand(1, 3, 64, 64)))["one2many"]["feats"]
    thin = Targets(
        torch.zeros(1), torch.tensor([[0.49, 0.5, 0.001, 0.9]]), torch.zeros(1), torch.ones(1), torch.ones(1)
    )
    inside = DetectionLoss(model).anchors_inside(feats, thin, 1)[0]
    assert inside[:64].sum() > 0 and inside[64:80].sum() > 0 and inside[80:].sum() > 0


def test_empty_batches_have_finite_loss():
    model, (images, targets) = _model(), _batch()
    none = targets.where(torch.zeros(len(targets.cls), dtype=torch.bool))
    sums, normaliser, raw = _loss_and_grad(model, images, none)
    assert torch.isfinite(sums).all() and normaliser.item() == 0
    assert sums[0, 0] == 0 and raw["scores"].grad.abs().sum() > 0


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
