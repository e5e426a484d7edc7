"""Values against plain float64 NumPy, gradients against finite differences, bounds, extremes."""

import math

import numpy as np
import pytest
import torch

from dfssd.distill.divergences import feature_loss, hierarchical, js, mse, standardise


def _maps(seed=0, shape=(3, 5, 4, 6), dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=dtype), torch.randn(shape, generator=g, dtype=dtype)


def _np_js(s, t, tau):
    total = 0.0
    for b in range(s.shape[0]):
        for c in range(s.shape[1]):
            p = np.exp(s[b, c].ravel() / tau - (s[b, c].ravel() / tau).max())
            q = np.exp(t[b, c].ravel() / tau - (t[b, c].ravel() / tau).max())
            p, q = p / p.sum(), q / q.sum()
            m = (p + q) / 2
            total += 0.5 * (p * np.log(p / m)).sum() + 0.5 * (q * np.log(q / m)).sum()
    return total / (s.shape[0] * s.shape[1])


def _np_standardise(x):
    return (x - x.mean((2, 3), keepdims=True)) / np.sqrt(x.var((2, 3), keepdims=True) + 1e-6)


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_js_value(tau):
    s, t = _maps()
    assert js(s, t, tau).item() == pytest.approx(_np_js(s.numpy(), t.numpy(), tau), rel=1e-10)
    assert js(s.float(), t.float(), tau).item() == pytest.approx(_np_js(s.numpy(), t.numpy(), tau), rel=1e-5)


def test_js_is_symmetric_zero_at_equality_and_bounded_by_ln2():
    s, t = _maps()
    assert js(s, t).item() == pytest.approx(js(t, s).item(), rel=1e-12)
    assert js(s, s).item() == pytest.approx(0, abs=1e-14)
    far = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    a, b = far.clone(), far.clone()
    a[..., 0, 0], b[..., 1, 1] = 1e4, 1e4  # one-hot in different places
    assert js(a, b).item() == pytest.approx(math.log(2), rel=1e-9)
    for k in range(20):
        assert 0 <= js(*(m * 50 for m in _maps(k))).item() <= math.log(2) + 1e-12


@pytest.mark.parametrize("kind", ["mse", "hw_js"])
def test_feature_loss_value_and_split(kind):
    layers = [_maps(k, (4, 3 + k, 4, 4), torch.float32) for k in range(3)]
    s, t = [a for a, _ in layers], [b for _, b in layers]
    got = feature_loss(kind, s, t, 1.0).item()
    pairs = [(_np_standardise(a.double().numpy()), _np_standardise(b.double().numpy())) for a, b in layers]
    if kind == "mse":
        want = np.mean([((a - b) ** 2).mean() for a, b in pairs])
    else:
        each = np.array([_np_js(a, b, 1.0) for a, b in pairs])
        weight = np.exp(each) / np.exp(each).sum()
        want = (weight * each).sum()
    assert got == pytest.approx(want, rel=1e-5)
    if kind == "mse":
        halves = [feature_loss(kind, [x[h] for x in s], [x[h] for x in t], 1.0).item() for h in (slice(2), slice(2, 4))]
        assert np.mean(halves) == pytest.approx(got, rel=1e-5)
    same = feature_loss(kind, s, s, 1.0).item()
    assert same == pytest.approx(0, abs=1e-6)


def test_hierarchical_weights_carry_no_gradient():
    x = torch.tensor([0.1, 0.5, 0.2], requires_grad=True)
    hierarchical(x).backward()
    torch.testing.assert_close(x.grad, torch.softmax(x.detach(), 0))


@pytest.mark.parametrize("loss", [mse, js, lambda s, t: js(standardise(s), standardise(t), 2.0)])
def test_gradients(loss):
    s, t = _maps(1, (2, 2, 3, 3))
    assert torch.autograd.gradcheck(lambda x: loss(x, t), (s.requires_grad_(),))


@pytest.mark.parametrize("kind", ["mse", "hw_js"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes_stay_finite(kind, dtype):
    one_hot = torch.zeros(2, 3, 4, 4, dtype=dtype)
    one_hot[:, :, 1, 2] = 1
    cases = [
        torch.full((2, 3, 4, 4), 7.0, dtype=dtype),
        one_hot,
        one_hot * 1e4,
        _maps(3, (2, 3, 4, 4))[0].to(dtype) * 1e4,
    ]
    for a in cases:
        for b in cases:
            s = a.clone().requires_grad_()
            value = feature_loss(kind, [s], [b], 1.0)
            value.backward()
            assert torch.isfinite(value) and torch.isfinite(s.grad).all()
