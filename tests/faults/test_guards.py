"""Break each thing once: it must stop at the first step with the term's name and a remedy."""

import pytest
import torch

from dfssd.errors import DfssdError
from dfssd.train import guards


def _outputs():
    first = torch.nn.Parameter(torch.ones(3))
    hidden = first * 2
    raw = {"one2many": {"boxes": hidden * 1.0, "scores": hidden + 1, "feats": []}}
    return first, raw, [hidden * 3]


def test_healthy_terms_pass_and_are_measured():
    first, raw, projected = _outputs()
    losses = {"sup/box": raw["one2many"]["boxes"].sum(), "feat/mse": projected[0].sum()}
    assert guards.check_reach(losses, raw, projected, first, set())["sup"] == pytest.approx(2 * 3**0.5)
    assert set(guards.check_reach(losses, raw, projected, None, set())) == {"sup", "feat"}
    guards.check_finite(losses, 0, ["x"])


@pytest.mark.parametrize("follow", [True, False])
def test_detached_tap_is_caught(follow):
    first, raw, projected = _outputs()
    losses = {"sup/box": raw["one2many"]["boxes"].sum(), "feat/hw_js": projected[0].detach().sum()}
    with pytest.raises(DfssdError, match="'feat' is not connected") as caught:
        guards.check_reach(losses, raw, projected, first if follow else None, set())
    assert caught.value.todo


def test_term_of_other_parameters_only_is_caught():
    """Connected to something (a projection), but not to the student."""
    first, raw, _ = _outputs()
    stray = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(DfssdError, match="'feat' has no gradient at the student"):
        guards.check_reach({"feat/mse": (stray**2).sum()}, raw, [], first, set())


def test_silent_zero_is_caught_unless_it_is_allowed():
    first, raw, projected = _outputs()
    losses = {"pse/cls": raw["one2many"]["scores"].sum() * 0}
    with pytest.raises(DfssdError, match="'pse' has no gradient"):
        guards.check_reach(losses, raw, projected, first, set())
    guards.check_reach(losses, raw, projected, first, {"pse"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_terms_and_gradients_are_caught(value):
    first, raw, projected = _outputs()
    with pytest.raises(DfssdError, match="pred/cls is not finite at step 7") as caught:
        guards.check_finite({"sup/box": torch.tensor(1.0), "pred/cls": torch.tensor(value)}, 7, ["img1", "img2"])
    assert "img1" in caught.value.where
    with pytest.raises(DfssdError, match="gradient of loss term 'pred' is not finite"):
        guards.check_reach({"pred/cls": (raw["one2many"]["scores"] * value).sum()}, raw, projected, first, set())
