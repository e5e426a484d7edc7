import pytest
import torch

from dfssd.config import Distill
from dfssd.pseudo.thresholds import EmaThreshold, FixedThreshold, class_sums, make_policy


def test_fixed_never_moves():
    policy = FixedThreshold(3, 0.4)
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
    policy = make_policy(Distill(threshold_policy="ema"), 4)
    policy.update(torch.ones(4), torch.ones(4))
    other = make_policy(Distill(threshold_policy="ema"), 4)
    other.load_state_dict(policy.state_dict())
    torch.testing.assert_close(other.mean, policy.mean)
    assert isinstance(make_policy(Distill(threshold_policy="fixed", tau=0.3), 2), FixedThreshold)
