import numpy as np
import pytest
import torch

from dfssd.distill.predictions import (
    best_anchors,
    best_score,
    dense_class,
    dfl_localisation,
    distance_localisation,
    distances,
    raw_mse,
)


def _heads(seed=0, images=2, bins=16, anchors=7, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    boxes = [torch.randn(images, 4 * bins, anchors, generator=g, dtype=dtype) for _ in range(2)]
    return *boxes, torch.rand(images, anchors, generator=g, dtype=dtype)


def _softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def test_dense_class_against_numpy():
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 3, 7, generator=g, dtype=torch.float64) for _ in range(2))
    loss, normaliser = dense_class(s, t)
    p, q = (1 / (1 + np.exp(-x.numpy())) for x in (t, s))
    bce = -(p * np.log(q) + (1 - p) * np.log(1 - q))
    assert loss.item() == pytest.approx((((p - q) ** 2) * bce).sum(), rel=1e-10)
    assert normaliser.item() == pytest.approx(p.max(1).sum(), rel=1e-12)
    assert dense_class(s, t, best_score(t))[1] == normaliser
    single = dense_class(s.float(), t.float())[0].item()
    assert single == pytest.approx((((p - q) ** 2) * bce).sum(), rel=1e-5)


def test_equal_predictions_teach_nothing_and_the_gradient_points_to_the_teacher():
    t = torch.tensor([[[3.0, -3.0, 0.0]]], dtype=torch.float64)
    s = t.clone().requires_grad_()
    dense_class(s, t)[0].backward()
    assert s.grad.abs().max() < 1e-12
    s = (t + torch.tensor([[[-1.0, 2.0, 0.5]]])).requires_grad_()
    dense_class(s, t)[0].backward()
    assert (s.grad * (s - t).detach() > 0).all()


def test_the_weight_is_a_constant_for_the_gradient():
    """d/ds of w*BCE(s, p) with w held: w * (sigmoid(s) - p); checked by finite differences at fixed w."""
    g = torch.Generator().manual_seed(0)
    s0, t = (torch.randn(1, 2, 5, dtype=torch.float64, generator=g) for _ in range(2))
    s = s0.clone().requires_grad_()
    dense_class(s, t)[0].backward()
    w, p = (t.sigmoid() - s0.sigmoid()).square(), t.sigmoid()

    def held(x):
        return (w * torch.nn.functional.binary_cross_entropy_with_logits(x, p, reduction="none")).sum()

    eps = 1e-6
    for k in range(5):
        d = torch.zeros_like(s0)
        d[0, 1, k] = eps
        difference = (held(s0 + d) - held(s0 - d)) / (2 * eps)  # of numbers of 1: rounded to 1e-10
        assert s.grad[0, 1, k].item() == pytest.approx(difference.item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("tau", "top"), [(10.0, 0.3), (1.0, 1.0)])
def test_dfl_localisation_against_numpy(tau, top):
    s, t, score = _heads()
    loss, normaliser = dfl_localisation(s, t, score, tau, top)
    want = total = 0.0
    for b in range(2):
        order = np.argsort(-score[b].numpy())[: max(1, round(top * 7))]
        for a in order:
            for side in range(4):
                p, q = (_softmax(x[b, side * 16 : (side + 1) * 16, a].numpy() / tau) for x in (s, t))
                want += tau**2 * float(score[b, a]) * (q * np.log(q / p)).sum() / 4
            total += float(score[b, a])
    assert loss.item() == pytest.approx(want, rel=1e-10) and normaliser.item() == pytest.approx(total, rel=1e-12)
    single = dfl_localisation(s.float(), t.float(), score.float(), tau, top)[0].item()
    assert single == pytest.approx(want, rel=1e-4 if tau == 10 else 1e-5)  # bins at temperature 10 differ by little


def test_distance_localisation_against_numpy():
    s, t, score = _heads()
    direct = torch.rand(2, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 6
    loss, normaliser = distance_localisation(s, direct, score, 1.0)
    want = 0.0
    for b in range(2):
        for a in range(7):
            for side in range(4):
                own = (_softmax(s[b, side * 16 : (side + 1) * 16, a].numpy()) * np.arange(16)).sum()
                gap = abs(own - float(direct[b, side, a]))
                want += float(score[b, a]) * (0.5 * gap**2 if gap < 1 else gap - 0.5) / 4
    assert loss.item() == pytest.approx(want, rel=1e-10) and normaliser.item() == pytest.approx(float(score.sum()))
    assert distances(direct) is direct and distances(t).shape == (2, 4, 7)


def test_raw_mse_against_numpy():
    s, t, _ = _heads()
    g = torch.Generator().manual_seed(3)
    c, k = (torch.randn(2, 3, 7, generator=g, dtype=torch.float64) for _ in range(2))
    loss, count = raw_mse(s, t, c, k)
    want = 0.25 * (((s - t) ** 2).sum() + ((c - k) ** 2).sum())
    assert loss.item() == pytest.approx(float(want), rel=1e-12) and count == 2 * 67 * 7


TERMS = {
    "dfl": lambda s, t, w: dfl_localisation(s, t, w, 10.0, 0.5)[0],
    "distance": lambda s, t, w: distance_localisation(s, t, w, 0.5)[0],
    "raw": lambda s, t, w: raw_mse(s, t, s[:, :3], t[:, :3])[0],
}


@pytest.mark.parametrize("name", TERMS)
def test_gradients_zero_at_equality_and_none_in_the_teacher(name):
    s, t, score = _heads(1, bins=3, anchors=4)
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: TERMS[name](x, t, score), (s,))
    t.requires_grad_()
    TERMS[name](s, t, score).backward()
    assert t.grad is None and s.grad.abs().sum() > 0
    same = t.detach().clone().requires_grad_()
    value = TERMS[name](same, t, score)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12) and same.grad.abs().max() < 1e-12


@pytest.mark.parametrize("name", TERMS)
def test_two_halves_of_a_batch_add_up(name):
    s, t, score = _heads(2, images=4)
    parts = [TERMS[name](s[h], t[h], score[h]) for h in (slice(2), slice(2, 4))]
    torch.testing.assert_close(parts[0] + parts[1], TERMS[name](s, t, score))


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_boxes_stay_finite(name, dtype):
    for a in (1e4, -1e4, 0.0):
        for b in (1e4, -1e4, 0.0):
            s, t = torch.zeros(2, 1, 64, 7, dtype=dtype)
            s[0, ::3], t[0, 1::3] = a, b
            s = s.clone().requires_grad_()
            value = TERMS[name](s, t, torch.ones(1, 7))
            value.backward()
            assert torch.isfinite(value) and torch.isfinite(s.grad).all()


def test_best_anchors_keeps_at_least_one():
    score = torch.tensor([[0.1, 0.9, 0.5]])
    assert best_anchors(score, 0.01)[1].tolist() == [[1]] and best_anchors(score, 0.67)[1].tolist() == [[1, 2]]


def test_extreme_logits_stay_finite():
    for a in (1e4, -1e4, 0.0):
        for b in (1e4, -1e4, 0.0):
            s = torch.full((1, 2, 3), a, requires_grad=True)
            loss, _ = dense_class(s, torch.full((1, 2, 3), b))
            loss.backward()
            assert torch.isfinite(loss) and torch.isfinite(s.grad).all()
