"""What a training step asks of the device: counted, since on a CPU nobody sees it."""

from collections import Counter

import pytest
import torch
from small import give_teacher_and_candidates, make_job, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train.build import build_session
from dfssd.train.loop import clip, update
from dfssd.train.step import accumulate

CPU = torch.device("cpu")
WAITS = {"_local_scalar_dense", "nonzero", "bincount", "unique_dim", "_unique2", "masked_select", "unique_consecutive"}


class Counted(TorchDispatchMode):
    """Counts operations that are no views, and those for which a GPU would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.ops, self.waits = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if not func.is_view:
            self.ops[name] += 1
        boolean = name.startswith("index") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8)
            for t in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        # A tensor made from numbers of Python (lift_fresh) is copied to the device, which is waited for too.
        if name in WAITS or boolean or name == "lift_fresh":
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


def _step(s, batches):
    accumulate(s, batches, 0.0, False, None)
    update(s, clip(s)[1])


@pytest.mark.parametrize(("stage", "ops"), [("student", 1700), ("label_only", 1300)])
def test_a_step_waits_for_nothing_and_is_not_chopped_up(prepared, stage, ops):
    """49 waits and 2,435 operations before; label-only 15 and 1,293."""
    give_teacher_and_candidates(prepared)
    s = build_session(
        make_job(
            stage, str(prepared / "r"), tiny_config(prepared, amp="bf16", teacher_amp="bf16", threshold_policy="gmm")
        ),
        WorkerGroup(),
        CPU,
    )
    feed = s.feed()
    for _ in range(2):  # the first one measures the balance and fills caches
        batches = feed.take()
        with Counted() as counted:
            _step(s, batches)
    print(sum(counted.ops.values()), dict(counted.ops.most_common(90)), dict(counted.waits))
    assert sum(counted.waits.values()) <= 5, counted.waits
    assert sum(counted.ops.values()) <= ops, counted.ops


def test_gradients_by_term_are_those_at_the_outputs_in_the_first_step_too(prepared):
    """The first step also follows them to the first layer, as a guard; what is logged is one quantity all along."""
    give_teacher_and_candidates(prepared)
    found = []
    for deep in (False, True):
        s = build_session(make_job("student", str(prepared / "r"), tiny_config(prepared)), WorkerGroup(), CPU)
        layer = next(p for p in s.student.parameters() if p.requires_grad) if deep else None
        found.append(accumulate(s, s.feed().take(), 0.0, True, layer).norms)
    assert set(found[0]) == {"sup", "pse", "pred", "feat"} and min(found[0].values()) > 0
    assert found[1] == pytest.approx(found[0], rel=1e-5)
