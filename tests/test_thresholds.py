import numpy as np
import pytest
import torch

from dfssd.config import Thresholds
from dfssd.config.choices import POLICIES
from dfssd.pseudo.evidence import Evidence
from dfssd.pseudo.thresholds import (
    BINS,
    MANY,
    EmaThreshold,
    FixedThreshold,
    ScoreCounts,
    class_sums,
    gmm_threshold,
    make_policy,
    match_thresholds,
    policy_thresholds,
    score_bin,
)


def test_fixed_never_moves():
    policy = FixedThreshold(torch.full((3,), 0.4))
    policy.update(torch.tensor([9.0, 9, 9]), torch.tensor([10.0, 10, 10]))
    torch.testing.assert_close(policy.thresholds(), torch.full((3,), 0.4))


def test_ema_follows_its_definition():
    policy = EmaThreshold(2, decay=0.9, tau_min=0.5)
    mean = 0.0
    for step in range(60):
        confidence = 0.6 + 0.3 * (step % 2)
        policy.update(torch.tensor([confidence * 4, 0.0]), torch.tensor([4.0, 0.0]))
        mean = 0.9 * mean + 0.1 * confidence
        assert policy.mean[0].item() == pytest.approx(mean, rel=1e-5)
        assert policy.thresholds()[0].item() == pytest.approx(max(mean, 0.5), rel=1e-5)
    assert policy.thresholds()[0] > 0.7  # risen above the floor
    assert policy.mean[1] == 0 and policy.thresholds()[1] == 0.5  # a class that never shows stays at the floor


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_ema_is_the_same_for_any_number_of_workers(workers):
    g = torch.Generator().manual_seed(0)
    policy = EmaThreshold(3, 0.95, 0.1)
    for _ in range(30):
        cls, score = torch.randint(0, 3, (24,), generator=g), torch.rand(24, generator=g)
        parts = [class_sums(cls[r::workers], score[r::workers], 3) for r in range(workers)]
        policy.update(sum(p[0] for p in parts), sum(p[1] for p in parts))
    torch.testing.assert_close(policy.thresholds(), _reference(), rtol=1e-5, atol=1e-6)


def _reference():
    g = torch.Generator().manual_seed(0)
    mean = torch.zeros(3, dtype=torch.float64)
    for _ in range(30):
        cls, score = torch.randint(0, 3, (24,), generator=g), torch.rand(24, generator=g)
        for c in range(3):
            mean[c] = 0.95 * mean[c] + 0.05 * score[cls == c].double().mean()
    return mean.clamp(min=0.1).float()


def test_state_survives_a_checkpoint():
    rate, scores = np.full(4, 0.5), ScoreCounts.empty(4)
    scores.val = Evidence.empty(4)
    for policy in POLICIES:
        config = Thresholds(threshold_policy=policy)
        one, other = make_policy(config, scores, rate), make_policy(config, scores, rate)
        one.update(torch.ones(4), torch.ones(4))
        other.load_state_dict(one.state_dict())
        torch.testing.assert_close(other.thresholds(), one.thresholds())
    own = FixedThreshold(torch.full((4,), 0.5))
    own.load_state_dict(FixedThreshold(torch.full((4,), 0.1)).state_dict())
    assert own.thresholds().eq(0.5).all(), (
        "a trial that goes on from another's checkpoint keeps the thresholds it is about"
    )
    assert isinstance(make_policy(Thresholds(threshold_policy="ema"), scores, rate), EmaThreshold)


def _scores(*by_class):
    counts = ScoreCounts.empty(len(by_class))
    counts.val = Evidence.empty(len(by_class))
    for c, values in enumerate(by_class):
        boxes = np.zeros((len(values), 7), np.float32)
        boxes[:, 0], boxes[:, 5] = c, values
        np.add.at(counts.counts, (boxes[:, 0].astype(int), score_bin(boxes[:, 5])), 1)
    return counts


def _where_posteriors_meet(low, high):
    """Score at which the upper of two known Gaussians (mean, deviation, share) becomes the likelier one."""
    x = np.linspace(low[0], high[0], 100_001)
    density = [share / std * np.exp(-0.5 * ((x - mean) / std) ** 2) for mean, std, share in (low, high)]
    return x[np.argmax(density[1] >= density[0])]


@pytest.mark.parametrize(
    ("low", "high"),
    [((0.2, 0.05, 0.5), (0.8, 0.05, 0.5)), ((0.15, 0.04, 0.8), (0.6, 0.1, 0.2)), ((0.3, 0.08, 0.3), (0.7, 0.08, 0.7))],
)
def test_gmm_finds_the_crossing_of_two_known_gaussians(low, high):
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(m, s, int(20_000 * share)) for m, s, share in (low, high)]).clip(0.0, 0.999)
    got = gmm_threshold(_scores(values).counts[0], fallback=0.5)
    assert got == pytest.approx(_where_posteriors_meet(low, high), abs=0.02)


def test_gmm_agrees_with_scikit_learn():
    from sklearn.mixture import GaussianMixture

    rng = np.random.default_rng(1)
    values = np.concatenate([rng.beta(2, 12, 3000), rng.beta(8, 3, 900)])
    ours = gmm_threshold(_scores(values).counts[0], 0.5)
    model = GaussianMixture(2, means_init=[[0.15], [0.7]], reg_covar=1e-4, tol=1e-7, max_iter=500).fit(values[:, None])
    upper = int(model.means_.argmax())
    x = np.linspace(model.means_.min(), model.means_.max(), 10_000)
    theirs = x[np.argmax(model.predict_proba(x[:, None])[:, upper] >= 0.5)]
    assert ours == pytest.approx(theirs, abs=0.01)


def test_gmm_falls_back_where_there_is_nothing_to_fit():
    assert gmm_threshold(_scores([0.3] * 19).counts[0], 0.42) == 0.42  # too few
    assert gmm_threshold(_scores([0.3] * 500).counts[0], 0.42) == 0.42  # one score only
    assert gmm_threshold(_scores([]).counts[0], 0.42) == 0.42


def test_gmm_lets_noise_of_a_rare_class_not_become_many_times_its_labels():
    rng = np.random.default_rng(0)
    noise = (0.05 + rng.exponential(0.08, 2000)).clip(0.05, 0.99)
    common = np.concatenate([rng.normal(0.1, 0.03, 1000), rng.normal(0.6, 0.1, 600)]).clip(0.05, 0.99)
    scores = _scores(noise, common, noise)
    scores.images = 1257
    rate = np.array([2 / 143, 0.5, 0.0])  # two boxes in 143 labelled images, 71, none
    tau = policy_thresholds(Thresholds(), "gmm", scores, rate)
    alone = np.array([gmm_threshold(row, 0.5) for row in scores.counts])
    assert scores.per_image(alone)[0] > 20 * rate[0]
    assert scores.per_image(tau)[0] == pytest.approx(MANY * rate[0], rel=0.1)
    assert tau[1] == alone[1] and tau[2] == alone[2]  # nothing changes where scores and rate agree, or there is no rate


def test_match_gives_the_labelled_rate():
    rng = np.random.default_rng(0)
    scores = _scores(rng.random(4000), rng.random(500) * 0.5, rng.random(30))
    scores.images = 1000
    rate = np.array([0.8, 0.25, 0.5])
    tau = match_thresholds(scores, rate)
    per_image = scores.per_image(tau)
    np.testing.assert_allclose(per_image[:2], rate[:2], atol=0.02)  # ties within a bin aside
    assert tau[0] == pytest.approx(0.8, abs=0.02) and tau[1] == pytest.approx(0.25, abs=0.03)
    assert tau[2] == 0 and per_image[2] == 0.03  # 500 wanted, 30 there: all are taken
    assert match_thresholds(scores, np.zeros(3)).tolist() == [1.0, 1.0, 1.0]  # a class nobody labelled gets none


def test_thresholds_stay_between_their_limits():
    scores = _scores(np.linspace(0.05, 0.2, 200), np.linspace(0.9, 0.999, 200))
    scores.images = 100
    limited = [name for name, row in POLICIES.items() if {"tau_min", "tau_max"} <= row.uses]
    assert len(limited) >= 3
    for policy in limited:
        config = Thresholds(threshold_policy=policy, tau_min=0.3, tau_max=0.6)
        tau = policy_thresholds(config, policy, scores, np.array([1.0, 1.0]), steps=10**6)
        assert tau.min() >= 0.3 and tau.max() <= 0.6
        assert make_policy(config, scores, np.array([1.0, 1.0])).thresholds().max() <= 0.6 + 1e-6
    assert policy_thresholds(Thresholds(tau=0.7), "fixed", scores, np.ones(2)).tolist() == [0.7, 0.7]


def test_a_policy_that_needs_val_does_not_go_without():
    with pytest.raises(ValueError, match="'precision' needs what candidates on val are worth"):
        make_policy(Thresholds(threshold_policy="precision"), ScoreCounts.empty(2), np.ones(2))


def test_counts_of_scores_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    scores, every = ScoreCounts.empty(3), []
    for _ in range(50):
        boxes = np.zeros((rng.integers(0, 9), 7), np.float32)
        boxes[:, 0], boxes[:, 5] = rng.integers(0, 3, len(boxes)), rng.random(len(boxes))
        scores.add(boxes)
        every.append(boxes)
    flat, tau = np.concatenate(every), np.array([0.3, 0.5, 0.7])
    want = [((flat[:, 0] == c) & (flat[:, 5] >= tau[c])).sum() / 50 for c in range(3)]
    np.testing.assert_allclose(scores.per_image(tau), want)
    np.testing.assert_allclose(scores.mean(), [flat[flat[:, 0] == c, 5].mean() for c in range(3)], atol=1e-3)
    assert score_bin(np.float32(0.3)) == 300 and score_bin(1.0) == BINS - 1
