"""Values against plain float64 NumPy, gradients against finite differences, bounds, extremes."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dfssd.config.choices import DIVERGENCES
from dfssd.distill import divergences as d
from dfssd.distill.features import KINDS, Projections, by_level, joined, layer_terms, resized, score_map

LN2 = math.log(2)


def _maps(seed=0, shape=(3, 5, 4, 4), dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=dtype), torch.randn(shape, generator=g, dtype=dtype)


def _softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def _np_standardise(x):
    return (x - x.mean((2, 3), keepdims=True)) / np.sqrt(x.var((2, 3), keepdims=True) + 1e-6)


def _np_js(s, t, tau):
    p, q = (_softmax(x.reshape(*x.shape[:2], -1) / tau, -1) for x in (s, t))
    m = (p + q) / 2
    return (0.5 * (p * np.log(p / m)).sum(-1) + 0.5 * (q * np.log(q / m)).sum(-1)).mean()


def _np_pkd(s, t):
    """1 minus the Pearson correlation, channel by channel, by NumPy's own function."""
    pairs = [(s[b, c].ravel(), t[b, c].ravel()) for b in range(s.shape[0]) for c in range(s.shape[1])]
    return np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in pairs])


def _np_conv3(x, weight, bias):
    """3x3 convolution with zero padding, as loops."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros((x.shape[0], weight.shape[0], *x.shape[2:]))
    for i in range(3):
        for j in range(3):
            window = padded[:, :, i : i + x.shape[2], j : j + x.shape[3]]
            out += np.einsum("bchw,oc->bohw", window, weight[:, :, i, j])
    return out + bias[None, :, None, None]


def _kl(s, t, axis):
    p, q = _softmax(s, axis), _softmax(t, axis)
    return (q * np.log(q / p)).sum(axis).mean()


REFERENCES = {
    "mse": (d.mse, lambda s, t: ((s - t) ** 2).mean()),
    "pkd": (d.pkd, _np_pkd),
    "kl": (lambda s, t: d.kl(s, t, 2.0), lambda s, t: 4 * _kl(s / 2, t / 2, 1)),
    "cwd": (
        lambda s, t: d.cwd(s, t, 4.0),
        lambda s, t: 16 * _kl(*(x.reshape(*x.shape[:2], -1) / 4 for x in (s, t)), -1),
    ),
    "js": (lambda s, t: d.js(s, t, 0.5), lambda s, t: _np_js(s, t, 0.5)),
}


# hw_js is js with weights of layers; mgd and score_l2 take more than two maps: each has tests of its own.
OTHERWISE = {"hw_js", "mgd", "score_l2"}


def test_every_divergence_has_a_reference():
    assert REFERENCES.keys() | OTHERWISE == DIVERGENCES.keys()


@pytest.mark.parametrize("kind", REFERENCES)
def test_value_against_numpy(kind):
    loss, reference = REFERENCES[kind]
    s, t = _maps()
    want = reference(s.numpy(), t.numpy())
    # pkd's guard against channels without variance is worth 1e-6 of the variance
    assert loss(s, t).item() == pytest.approx(want, rel=5e-6 if kind == "pkd" else 1e-10)
    assert loss(s.float(), t.float()).item() == pytest.approx(want, rel=1e-5)


def test_score_l2_against_numpy_and_ultralytics():
    s, t = _maps()
    score = torch.rand(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    want = (((s - t) ** 2).numpy() * score.numpy()).sum() / (score.numpy().sum() * 5)
    assert d.score_l2(s, t, score).item() == pytest.approx(want, rel=1e-10)
    from ultralytics.nn.distill_model import DistillationModel

    theirs = DistillationModel.loss_sl2(None, s, t, 0, (score.flatten(2),))
    assert d.score_l2(s, t, score).item() == pytest.approx(float(theirs), rel=1e-5)


def test_mgd_against_numpy():
    s, t = _maps()
    torch.manual_seed(0)
    generator = Projections([5], [5], generators=True).generators[0].double()
    hidden = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    first, second = ([p.detach().numpy() for p in (m.weight, m.bias)] for m in generator if isinstance(m, nn.Conv2d))
    made = _np_conv3(np.maximum(_np_conv3(s.numpy() * ~hidden.numpy(), *first), 0), *second)
    assert d.mgd(s, t, generator, hidden).item() == pytest.approx(((made - t.numpy()) ** 2).mean(), rel=1e-10)


def test_mgd_hides_the_share_it_says_and_trains_its_generator():
    torch.manual_seed(0)
    assert d.hidden_positions(torch.zeros(8, 3, 64, 64), 0.65).float().mean().item() == pytest.approx(0.65, abs=0.01)
    generator = Projections([5], [5], generators=True).generators[0].double()
    s, t = _maps()
    s.requires_grad_()
    hidden = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    hidden[0] = True
    d.mgd(s, t, generator, hidden).backward()
    assert (s.grad[0] == 0).all() and s.grad[1:].abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in generator.parameters())


def test_js_is_symmetric_and_bounded_by_ln2():
    s, t = _maps()
    assert d.js(s, t).item() == pytest.approx(d.js(t, s).item(), rel=1e-12)
    a, b = torch.zeros(2, 1, 1, 2, 2, dtype=torch.float64)
    a[..., 0, 0], b[..., 1, 1] = 1e4, 1e4  # one-hot in different places
    assert d.js(a, b).item() == pytest.approx(LN2, rel=1e-9)
    for k in range(20):
        assert 0 <= d.js(*(m * 50 for m in _maps(k))).item() <= LN2 + 1e-12


def test_pkd_is_symmetric_bounded_and_blind_to_scale():
    s, t = _maps()
    assert d.pkd(s, t).item() == pytest.approx(d.pkd(t, s).item(), rel=1e-12)
    assert d.pkd(s, -s).item() == pytest.approx(2, rel=1e-5) and 0 < d.pkd(s, t).item() < 2
    assert d.pkd(s * 7 + 3, t).item() == pytest.approx(d.pkd(s, t).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pkd_of_any_type_is_that_of_its_numbers(dtype):
    """Maps in half precision are not copied; moments are float32, also where the mean is far above the spread."""
    for shift in (0.0, 40.0):
        s, t = (((m + shift) * 2).to(dtype) for m in _maps(5, (2, 3, 16, 16)))
        s.requires_grad_()
        value = d.pkd(s, t)
        value.backward()
        x = s.detach().double().requires_grad_()
        want = d.pkd(x, t.double())
        want.backward()
        assert value.dtype == torch.float32 and s.grad.dtype == dtype
        assert value.item() == pytest.approx(want.item(), rel=1e-5)
        largest = x.grad.abs().max().item()
        torch.testing.assert_close(s.grad.double(), x.grad, rtol=torch.finfo(dtype).eps, atol=1e-4 * largest)
    with torch.no_grad():
        assert d.pkd(s, t).item() == value.item()


@pytest.mark.parametrize("kind", REFERENCES)
def test_equal_maps_teach_nothing(kind):
    s, _ = _maps()
    x = s.clone().requires_grad_()
    value = REFERENCES[kind][0](x, s)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-14) and x.grad.abs().max() < 1e-14


@pytest.mark.parametrize("kind", REFERENCES)
def test_gradients_against_finite_differences(kind):
    s, t = _maps(1, (2, 2, 3, 3))
    assert torch.autograd.gradcheck(lambda x: REFERENCES[kind][0](x, t), (s.requires_grad_(),))


def test_gradients_of_score_l2_and_mgd_against_finite_differences():
    torch.manual_seed(0)
    s, t = _maps(1, (2, 2, 3, 3))
    score, generator = torch.rand(2, 1, 3, 3).double(), nn.Conv2d(2, 2, 3, padding=1).double()
    hidden = torch.rand(2, 1, 3, 3) < 0.5
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: d.score_l2(x, t, score), (s,))
    assert torch.autograd.gradcheck(lambda x: d.mgd(x, t, generator, hidden), (s,))


@pytest.mark.parametrize("kind", REFERENCES)
def test_the_teacher_gets_no_gradient(kind):
    s, t = _maps()
    s.requires_grad_()
    t.requires_grad_()
    REFERENCES[kind][0](s, t).backward()
    assert t.grad is None and s.grad.abs().sum() > 0


def test_hw_js_against_numpy():
    pairs = [_maps(k, (2, 3, 4 + k, 4)) for k in range(3)]
    s, t = [[pair[i] for pair in pairs] for i in (0, 1)]
    each = np.array([_np_js(a.numpy(), b.numpy(), 0.5) for a, b in pairs])
    weight = np.exp(each) / np.exp(each).sum()
    assert d.hw_js(s, t, 0.5).item() == pytest.approx((weight * each).sum(), rel=1e-10)
    assert 0 <= d.hw_js(s, t).item() <= LN2 and d.hw_js(s, s).item() == pytest.approx(0, abs=1e-14)
    assert d.hw_js(s, t).item() == pytest.approx(d.hw_js(t, s).item(), rel=1e-12)


def test_hierarchical_weights_carry_no_gradient():
    x = torch.tensor([0.1, 0.5, 0.2], requires_grad=True)
    d.hierarchical(x).backward()
    torch.testing.assert_close(x.grad, torch.softmax(x.detach(), 0))
    share = d.hierarchical(x / 2, torch.tensor([0.1, 0.5, 0.2]))  # of a worker that holds half of everything
    torch.testing.assert_close(share, d.hierarchical(x) / 2)


def _scores(score_ba):
    """By level, of the 84 anchor points of a 64 px input."""
    return by_level(score_ba, [torch.zeros(1, 1, n, n) for n in (8, 4, 2)])


def _layers():
    """Two taps of 4 images, scores of the 84 anchor points of a 64 px input, generators."""
    torch.manual_seed(0)
    pairs = [_maps(k, (4, 3 + k, 8 // 2**k, 8 // 2**k), torch.float32) for k in range(2)]
    score = _scores(torch.rand(4, 84, generator=torch.Generator().manual_seed(1)))
    generators = Projections([3, 4], [3, 4], generators=True).generators
    return [a for a, _ in pairs], [b for _, b in pairs], score, list(generators)


@pytest.mark.parametrize("kind", KINDS)
def test_two_halves_of_a_batch_average_to_the_whole(kind, monkeypatch):
    monkeypatch.setattr(d, "hidden_positions", lambda x, share=0, generator=None: x[:, :1] > 0.3)
    s, t, score, generators = _layers()
    whole = layer_terms(kind, s, t, score, 0.0, generators)
    halves = [
        layer_terms(kind, [x[h] for x in s], [x[h] for x in t], [x[h] for x in score], 0.0, generators)
        for h in (slice(2), slice(2, 4))
    ]
    for k in (0, 1):
        torch.testing.assert_close(halves[0][k] + halves[1][k], whole[k], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tau", [0.0, 3.0])
def test_layers_are_joined_as_written(tau):
    s, t, score, _ = _layers()
    for kind in ("hw_js", "js", "cwd", "kl"):
        sums, images = layer_terms(kind, s, t, score, tau)
        each = sums / images
        pairs = [[_np_standardise(x.double().numpy()) for x in pair] for pair in zip(s, t, strict=True)]
        own = tau or DIVERGENCES[kind].tau
        if kind in ("hw_js", "js"):
            want = np.array([_np_js(a, b, own) for a, b in pairs])
        elif kind == "cwd":
            flat = [[x.reshape(*x.shape[:2], -1) / own for x in pair] for pair in pairs]
            want = np.array([own**2 * _kl(a, b, -1) for a, b in flat])
        else:
            want = np.array([own**2 * _kl(a / own, b / own, 1) for a, b in pairs])
        np.testing.assert_allclose(each.numpy(), want, rtol=1e-5)
        weight = np.exp(want) / np.exp(want).sum() if kind == "hw_js" else np.full(2, 0.5)
        assert joined(kind, each, each).item() == pytest.approx((weight * want).sum(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes_stay_finite(kind, dtype):
    one_hot = torch.zeros(2, 3, 4, 4)
    one_hot[:, :, 1, 2] = 1
    noise = _maps(3, (2, 3, 4, 4))[0]
    cases = [c.to(dtype) for c in (torch.full((2, 3, 4, 4), 7.0), one_hot, one_hot * 1e4, noise * 1e4, noise * 0)]
    torch.manual_seed(0)
    generators = list(Projections([3], [3], generators=True).generators)
    for a in cases:
        for b in cases:
            for score in (_scores(torch.zeros(2, 84)), _scores(torch.ones(2, 84))):
                s = a.clone().requires_grad_()
                sums, normaliser = layer_terms(kind, [s], [b], score, 0.0, generators)
                value = (sums / normaliser.clamp(min=1e-12)).sum()
                value.backward()
                assert torch.isfinite(value) and torch.isfinite(s.grad).all()


def test_maps_of_other_sizes_are_resized():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    torch.testing.assert_close(resized(x, (2, 2)), torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]]))
    assert resized(x, (8, 8)).shape == (1, 1, 8, 8) and resized(x, (8, 8)).mean() == pytest.approx(7.5)
    assert resized(x, (4, 4)) is x
    s, _, score, _ = _layers()
    sums, _ = layer_terms("pkd", [s[0]], [torch.rand(4, 3, 4, 4)], score)
    assert torch.isfinite(sums).all()


def test_score_map_picks_the_level_of_the_same_size():
    score = torch.cat([torch.full((1, 64), 0.1), torch.full((1, 16), 0.2), torch.full((1, 4), 0.3)], 1)
    for side, want in ((8, 0.1), (4, 0.2), (2, 0.3), (16, 0.1)):
        level = score_map(_scores(score), (side, side))
        assert level.shape == (1, 1, side, side) and level.mean().item() == pytest.approx(want)
    with pytest.raises(ValueError, match="80 anchor points"):
        _scores(torch.zeros(1, 80))
    strip = by_level(torch.arange(10.0)[None], [torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 1, 2)])  # of another family
    assert score_map(strip, (2, 4))[0, 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert score_map(strip, (1, 2))[0, 0].tolist() == [[8, 9]]
