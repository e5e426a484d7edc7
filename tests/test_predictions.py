import numpy as np
import pytest
import torch

from dfssd.distill.predictions import dense_class


def test_dense_class_against_numpy():
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 3, 7, generator=g, dtype=torch.float64) for _ in range(2))
    loss, normaliser = dense_class(s, t)
    p, q = (1 / (1 + np.exp(-x.numpy())) for x in (t, s))
    bce = -(p * np.log(q) + (1 - p) * np.log(1 - q))
    assert loss.item() == pytest.approx((((p - q) ** 2) * bce).sum(), rel=1e-10)
    assert normaliser.item() == pytest.approx(p.max(1).sum(), rel=1e-12)


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
    s0, t = torch.randn(1, 2, 5, dtype=torch.float64), torch.randn(1, 2, 5, dtype=torch.float64)
    s = s0.clone().requires_grad_()
    dense_class(s, t)[0].backward()
    w, p = (t.sigmoid() - s0.sigmoid()).square(), t.sigmoid()

    def held(x):
        return (w * torch.nn.functional.binary_cross_entropy_with_logits(x, p, reduction="none")).sum()

    eps = 1e-6
    for k in range(5):
        d = torch.zeros_like(s0)
        d[0, 1, k] = eps
        assert s.grad[0, 1, k].item() == pytest.approx(((held(s0 + d) - held(s0 - d)) / (2 * eps)).item(), rel=1e-6)


def test_extreme_logits_stay_finite():
    for a in (1e4, -1e4, 0.0):
        for b in (1e4, -1e4, 0.0):
            s = torch.full((1, 2, 3), a, requires_grad=True)
            loss, _ = dense_class(s, torch.full((1, 2, 3), b))
            loss.backward()
            assert torch.isfinite(loss) and torch.isfinite(s.grad).all()
