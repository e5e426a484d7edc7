"""Break each thing once: it must stop at the first step with the term's name and a remedy."""

import pytest
import torch

from dfssd.distill.criterion import StudentOutput
from dfssd.errors import DfssdError
from dfssd.models.head import HeadOutput
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train import guards


def _outputs():
    first = torch.nn.Parameter(torch.ones(3))
    hidden = first * 2
    raw = {"one2many": HeadOutput(hidden * 1.0, hidden + 1, [])}
    return first, StudentOutput(raw, [], [hidden * 3])


def test_healthy_terms_pass_and_are_measured():
    first, out = _outputs()
    losses = {"sup/box": out.raw["one2many"].boxes.sum(), "feat/mse": out.projected[0].sum()}
    assert guards.check_reach(losses, out, first, set())["sup"] == pytest.approx(2 * 3**0.5)
    assert set(guards.check_reach(losses, out, None, set())) == {"sup", "feat"}
    guards.check_finite(losses, 0, ["x"])


@pytest.mark.parametrize("follow", [True, False])
def test_detached_tap_is_caught(follow):
    first, out = _outputs()
    losses = {"sup/box": out.raw["one2many"].boxes.sum(), "feat/hw_js": out.projected[0].detach().sum()}
    with pytest.raises(DfssdError, match="'feat' is not connected") as caught:
        guards.check_reach(losses, out, first if follow else None, set())
    assert caught.value.todo


def test_term_of_other_parameters_only_is_caught():
    """Connected to something (a projection), but not to the student."""
    first, out = _outputs()
    stray = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(DfssdError, match="'feat' has no gradient at the student"):
        guards.check_reach({"feat/mse": (stray**2).sum()}, out, first, set())


def test_silent_zero_is_caught_unless_it_is_allowed():
    first, out = _outputs()
    losses = {"pse/cls": out.raw["one2many"].scores.sum() * 0}
    with pytest.raises(DfssdError, match="'pse' has no gradient"):
        guards.check_reach(losses, out, first, set())
    guards.check_reach(losses, out, first, {"pse"})


class _OtherWorker(WorkerGroup):
    """Stands for a group whose other worker has a gradient where this one has none."""

    def sum(self, tensor):
        return tensor + 1


def test_a_worker_without_pseudo_labels_of_its_own_does_not_stop_the_group():
    first, out = _outputs()
    losses = {"pse/cls": out.raw["one2many"].scores.sum() * 0}
    assert guards.check_reach(losses, out, first, set(), _OtherWorker(0, 2)) == {"pse": 1.0}


def test_a_weight_that_amounts_to_nothing_is_caught():
    first, out = _outputs()
    losses = {"sup/box": out.raw["one2many"].boxes.sum(), "feat/pkd": 1e-8 * out.projected[0].sum()}
    with pytest.raises(DfssdError, match=r"'feat' weighs next to nothing") as caught:
        guards.check_reach(losses, out, first, set())
    assert "--lambda-f" in caught.value.todo
    losses["feat/pkd"] = 1e-5 * out.projected[0].sum()
    guards.check_reach(losses, out, first, set())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_terms_and_gradients_are_caught(value):
    first, out = _outputs()
    with pytest.raises(DfssdError, match="pred/cls is not finite at step 7") as caught:
        guards.check_finite({"sup/box": torch.tensor(1.0), "pred/cls": torch.tensor(value)}, 7, ["img1", "img2"])
    assert "img1" in caught.value.where
    with pytest.raises(DfssdError, match="gradient of loss term 'pred' is not finite"):
        guards.check_reach({"pred/cls": (out.raw["one2many"].scores * value).sum()}, out, first, set())
