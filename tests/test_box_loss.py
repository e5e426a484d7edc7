"""Inner-Focaler-EIoU against loops in float64, and inside Ultralytics' loss."""

import pytest
import torch
from test_models import _batch, _model

from dfssd.models.yolo.box_loss import inner_focaler_eiou
from dfssd.models.yolo.detection_loss import DetectionLoss
from dfssd.models.yolo.detector import branches


def _reference(p, t, ratio=0.75, low=0.0, high=0.95):
    def shrunk(b):
        cx, cy, w, h = (b[0] + b[2]) / 2, (b[1] + b[3]) / 2, (b[2] - b[0]) * ratio, (b[3] - b[1]) * ratio
        return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2

    a, b = shrunk(p), shrunk(t)
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    iou = inter / (sum(areas) - inter)
    focused = min(max((iou - low) / (high - low), 0), 1)
    cw, ch = max(p[2], t[2]) - min(p[0], t[0]), max(p[3], t[3]) - min(p[1], t[1])
    centre = ((p[0] + p[2] - t[0] - t[2]) ** 2 + (p[1] + p[3] - t[1] - t[3]) ** 2) / 4 / (cw**2 + ch**2)
    size = ((p[2] - p[0]) - (t[2] - t[0])) ** 2 / cw**2 + ((p[3] - p[1]) - (t[3] - t[1])) ** 2 / ch**2
    return 1 - focused + centre + size


def _boxes(n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    corner, size = (
        torch.rand(n, 2, generator=g, dtype=torch.float64) * 20,
        torch.rand(n, 2, generator=g).double() * 15 + 1,
    )
    return torch.cat([corner, corner + size], 1)


def test_value_against_a_float64_reference():
    p, t = _boxes(seed=0), _boxes(seed=1)
    want = torch.tensor([_reference(a, b) for a, b in zip(p.tolist(), t.tolist(), strict=True)], dtype=torch.float64)
    got = inner_focaler_eiou(p, t)
    assert got.shape == (40,)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(inner_focaler_eiou(p.float(), t.float()).double(), want, rtol=1e-4, atol=1e-5)


def test_zero_at_equality_and_a_gradient_without_overlap():
    p = _boxes()
    assert inner_focaler_eiou(p, p).abs().max() < 1e-6
    far = (p[:1] + 100).requires_grad_()
    inner_focaler_eiou(far, p[:1]).sum().backward()
    assert far.grad.abs().sum() > 0  # the published form multiplies by IoU and has none


def test_gradient_against_finite_differences():
    p, t = _boxes(6, 2).requires_grad_(), _boxes(6, 3)
    assert torch.autograd.gradcheck(lambda x: inner_focaler_eiou(x, t), (p,))


def test_units_do_not_matter_but_xywh_for_xyxy_does():
    """The published code feeds corners as centre and size; a shift by 5 px must cost the same anywhere in the image."""
    t = torch.tensor([[10.0, 10, 30, 30], [110, 110, 130, 130]], dtype=torch.float64)
    near, far = inner_focaler_eiou(t + 5, t)
    assert near.item() == pytest.approx(far.item(), rel=1e-9)
    torch.testing.assert_close(inner_focaler_eiou((t + 5) * 8, t * 8), inner_focaler_eiou(t + 5, t))


@pytest.mark.parametrize("spec", ["yolov8n.yaml", "yolo26n.yaml"])
def test_it_replaces_the_box_term_and_nothing_else(spec):
    model, (images, targets) = _model(spec), _batch()
    raw = branches(model(images))
    plain, other = (DetectionLoss(model, kind)(raw, targets) for kind in ("ciou", "inner_focaler_eiou"))
    torch.testing.assert_close(plain[0][..., 1:], other[0][..., 1:])
    torch.testing.assert_close(plain[1], other[1])
    assert (plain[0][..., 0].sum(1) != other[0][..., 0].sum(1)).all()
    other[0].sum().backward()
    assert model.model[0].conv.weight.grad.isfinite().all()
