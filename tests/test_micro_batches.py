"""Micro-batches, memory, precision, checkpoints on request: what one process can show."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from small import give_teacher_and_candidates, make_job, tiny_config

from dfssd.config import Config, Distill, Run, Train
from dfssd.data.sampling import StepSampler
from dfssd.errors import DfssdError
from dfssd.models import precision
from dfssd.models.anchors import anchors_of
from dfssd.models.head import HeadOutput
from dfssd.models.yolo.detection_loss import DetectionLoss
from dfssd.pseudo.selection import labels
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train import checkpoint
from dfssd.train.build import build_session
from dfssd.train.in_process import train_in_process
from dfssd.train.interrupt import CHECKPOINT, NOTHING, STOP, Interrupt
from dfssd.train.memory import fit_micro_batch, told_when_full
from dfssd.train.random_state import random_state, restore_random_state
from dfssd.train.step import accumulate

CPU = torch.device("cpu")


def test_micro_batches_have_the_same_content_whoever_computes_them():
    def parts(rank, world_size, count):
        sampler = StepSampler({"a": 30, "b": 50}, {"a": 8, "b": 4}, 3, 0, 5, 9, rank, world_size, count)
        drawn = list(sampler)
        assert len(drawn) == len(sampler)
        return {(k // len(sampler.mine), sampler.mine[k % len(sampler.mine)]): d for k, d in enumerate(drawn)}

    whole = parts(0, 1, 4)
    assert len(whole) == 20 and all([d.stream for d in one] == ["a", "a", "b"] for one in whole.values())
    for world_size in (2, 3, 4):
        shared = {}
        for rank in range(world_size):
            shared |= parts(rank, world_size, 4)
        assert shared == whole
    together = [sorted(d for k, one in whole.items() if k[0] == step for d in one) for step in range(5)]
    assert together == [sorted(one) for one in StepSampler({"a": 30, "b": 50}, {"a": 8, "b": 4}, 3, 0, 5, 9)]


def test_how_many_micro_batches():
    def count(workers="1", **train):
        return Config(run=Run(num_workers=workers), train=Train(batch=16, **train)).micro_batches()

    assert count() == 1 and count("1:4") == 4 and count("2") == 2
    assert count(micro_batch=4) == count("4", micro_batch=4) == 4 and count(micro_batch=5) == 4
    for wrong in ({"workers": "4", "micro_batch": 8}, {"micro_batch": 1, "batch": 16}):
        workers, own = wrong.pop("workers", "1"), {"batch": 16, **wrong}
        with pytest.raises(ValidationError, match=r"give \d+ to \d+"):
            Config(run=Run(num_workers=workers), train=Train(**own), distill=Distill(unlabelled_ratio=0.5))


def test_the_gradient_over_micro_batches_is_that_of_all_graphs_at_once(prepared):
    """With batch norm in eval mode, where a micro-batch is no unit: nothing but rounding may differ. All terms."""
    give_teacher_and_candidates(prepared)
    found = {}
    for count in (1, 3):
        own = {"batch": 6, "micro_batch": 6 // count, "divergence": "hw_js", "threshold_policy": "fixed"}
        config = tiny_config(prepared, balance="none", **own)
        s = build_session(make_job("student", str(prepared / "r"), config), WorkerGroup(), CPU)
        s.student.detector.eval()
        s.student.detector.model[-1].training = True
        batches = s.feed().take()
        assert len(batches) == count
        accumulate(s, batches, 0.0, False, None)
        found[count] = [p.grad.clone() for p in s.student.parameters() if p.grad is not None]
    for a, b in zip(found[1], found[3], strict=True):
        assert (a - b).norm() <= 2e-5 * a.norm() + 1e-7


def test_what_mgd_hides_depends_on_the_micro_batch_and_on_nothing_else(prepared):
    """Not on what the process drew before: a resumed run, and another worker, hide the same positions."""
    give_teacher_and_candidates(prepared)
    config = tiny_config(prepared, divergence="mgd", balance="none")
    s = build_session(make_job("student", str(prepared / "r"), config), WorkerGroup(), CPU)
    batches, losses = s.feed().take(), []
    for step in (0, 0, 1):
        s.step = step
        torch.manual_seed(len(losses))
        losses.append(float(accumulate(s, batches, 0.0, False, None).terms.losses["feat/mgd"]))
    assert losses[0] == losses[1] != losses[2]


def test_graphs_of_one_micro_batch_at_a_time(prepared):
    """A second graph is made only when the first is gone: memory for activations is that of one micro-batch."""
    give_teacher_and_candidates(prepared)
    config = tiny_config(prepared, batch=4, micro_batch=1)
    s = build_session(make_job("student", str(prepared / "r"), config), WorkerGroup(), CPU)
    alive, most, graphs = set(), [0], []

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor
            alive.add(id(self))
            most[0] = max(most[0], len(alive))
            graphs.append(1)

        def __del__(self):
            alive.discard(id(self))

    batches = s.feed().take()
    s.criterion.balance.calls = 1  # not a step at which it is measured
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        accumulate(s, batches, 0.0, False, None)
    assert len(graphs) > 3 * most[0]  # four graphs were made, never two at a time


def test_automatic_micro_batches_are_halved_at_the_start_and_never_later(prepared, capsys):
    give_teacher_and_candidates(prepared)

    def session(**changes):
        config = tiny_config(prepared, batch=8, **changes)
        return build_session(make_job("student", str(prepared / "r"), config), WorkerGroup(), CPU)

    s = session()
    fit_micro_batch(s, fresh=True, probe=lambda s, count: count >= 4)
    assert s.micro_batches == 4 and "2 + 2 images fit" in capsys.readouterr().out
    for s, fresh in ((session(micro_batch=8), True), (session(), False)):
        with pytest.raises(
            DfssdError, match=r"does not hold a micro-batch of 8 . 8 images; 2 . 2 images would fit"
        ) as e:
            fit_micro_batch(s, fresh=fresh, probe=lambda s, count: count >= 4)
        assert "--micro-batch 2" in e.value.todo and ("new --run-name" in e.value.todo) != fresh
    with pytest.raises(DfssdError, match="cannot be cut further"):
        fit_micro_batch(session(), fresh=True, probe=lambda s, count: False)
    with (
        pytest.raises(DfssdError, match=r"ran out at step 0 with micro-batches of 8 . 8 images") as e,
        told_when_full(s),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "--micro-batch 4" in e.value.todo


def test_a_trial_step_leaves_nothing_behind(prepared):
    from dfssd.train import memory

    give_teacher_and_candidates(prepared)
    s = build_session(make_job("student", str(prepared / "r"), tiny_config(prepared)), WorkerGroup(), CPU)
    before = {k: v.clone() for k, v in s.student.state_dict().items() if "num_batches" not in k}
    assert memory._fits(s, 2)
    after = s.student.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert all(p.grad is None for p in s.student.parameters())


def test_a_run_keeps_its_micro_batches(prepared):
    give_teacher_and_candidates(prepared)
    job = make_job("student", str(prepared / "r"), tiny_config(prepared, micro_batch=2, steps=2))
    train_in_process(job)
    state = checkpoint.load_newest(job.store.at("train"), None)
    other = make_job("student", str(prepared / "r"), tiny_config(prepared, steps=4))
    s = build_session(other, WorkerGroup(), CPU)
    assert s.micro_batches == 1
    s.load_state(state)
    assert s.micro_batches == 2 and len(s.mine) == 2
    crowd = build_session(other, WorkerGroup(), CPU)
    object.__setattr__(crowd.workers, "size", 3)
    with pytest.raises(DfssdError, match="works in 2 micro-batches, fewer than 3 workers"):
        crowd.load_state(state)


@pytest.mark.parametrize(
    ("capability", "auto"), [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_precision_by_hardware(monkeypatch, capability, auto):
    """`torch.cuda.is_bf16_supported()` says yes on all of them."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    card = torch.device("cuda")
    assert precision.autocast_dtype("auto", card) == auto
    assert precision.autocast_dtype("fp32", card) is None and precision.autocast_dtype("fp16", card) == torch.float16
    assert ("TF32" in precision.describe(None, card, True)) == (capability >= (8, 0))
    if auto == torch.float16:
        with pytest.raises(DfssdError, match="only by emulation"):
            precision.autocast_dtype("bf16", card)


@pytest.mark.parametrize("side", [640, 1280, 1600])
def test_anchor_points_are_exact_whatever_the_features_are(side):
    """In bf16 a third of the finest level's points lie 4 px off at 1280 px, and the loss of a box there is another one."""
    sizes, strides = [side // k for k in (8, 16, 32)], (8.0, 16.0, 32.0)
    points = {
        dtype: anchors_of([torch.zeros(1, 1, n, n, dtype=dtype) for n in sizes], strides).points_a2
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert torch.equal(*points.values()) and points[torch.bfloat16].dtype == torch.float32
    from dfssd.models.yolo.detector import build_detector

    detector = build_detector("yolov8n.yaml", ["a"], 64)
    g, anchors = torch.Generator().manual_seed(0), sum(n * n for n in sizes)
    boxes, scores = torch.randn(1, 64, anchors, generator=g), torch.randn(1, 1, anchors, generator=g)
    targets = labels([np.array([[0, 0.9, 0.86, 0.06, 0.05]], np.float32)])  # far from the origin
    sums = [
        DetectionLoss(detector)(
            {"one2many": HeadOutput(boxes, scores, [torch.zeros(1, 1, n, n, dtype=dtype) for n in sizes])}, targets
        )[0]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert torch.equal(*sums) and (sums[0] > 0).all()


def test_float16_with_a_scaler_trains_and_an_overflow_is_no_error(prepared):
    give_teacher_and_candidates(prepared)
    job = make_job("student", str(prepared / "r"), tiny_config(prepared, steps=3, amp="fp16", teacher_amp="fp32"))
    assert train_in_process(job)["precision"] == "torch.float16"
    history = [h for h in job.store.read_json("history.json") if "scale" in h]
    assert len(history) == 3 and all(np.isfinite(h["loss/total"]) for h in history)
    assert checkpoint.load_newest(job.store.at("train"), None)["scaler"]["scale"] == history[-1]["scale"]


def test_all_generators_are_in_a_checkpoint():
    import random

    def draw():
        return float(np.random.rand()), random.random()

    state = random_state(CPU)
    first = draw()
    assert draw() != first
    restore_random_state(state, CPU)
    assert draw() == first


def test_who_asks_for_a_checkpoint():
    now = [0.0]
    interrupt = Interrupt(300, lambda: now[0])
    assert interrupt.wanted() == NOTHING
    now[0] = 300.0
    assert interrupt.wanted() == CHECKPOINT
    interrupt.stored()
    assert interrupt.wanted() == NOTHING
    interrupt.ask()
    assert interrupt.wanted() == CHECKPOINT
    interrupt.ask(stop=True)
    assert interrupt.wanted() == STOP > 999 * CHECKPOINT
    interrupt.stored()  # asked for while a validation was running: the checkpoint is there, and it ends after the next step
    assert interrupt.wanted() == STOP
    assert Interrupt(0, lambda: 1e9).wanted() == NOTHING


def test_checkpoints_by_the_clock_and_at_a_request_to_stop(prepared):
    """Between validations, which are far apart; what goes on from there ends in the same weights."""
    whole = make_job("label_only", str(prepared / "r"), tiny_config(prepared, steps=6, val_every=6))
    stored = []

    class Every(Interrupt):
        def wanted(self):
            return CHECKPOINT if len(stored) < 2 else STOP

        def stored(self):
            stored.append(checkpoint.newest_step(whole.store.at("train")))

    with pytest.raises(DfssdError, match="stopped at step 3 of 6, as asked; a checkpoint is stored") as e:
        train_in_process(whole, interrupt=Every())
    assert stored == [1, 2, 3] and "goes on from there" in e.value.todo
    resumed = train_in_process(whole)
    assert [h["step"] for h in whole.store.read_json("history.json") if "loss/total" in h] == list(range(1, 7))
    other = make_job("label_only", str(prepared / "r"), tiny_config(prepared, steps=6, val_every=6, run_name="r"))
    other.store.delete("train")
    assert train_in_process(other)["best"] == resumed["best"]


def test_sigterm_stores_and_says_how_to_go_on(prepared, monkeypatch):
    """It comes in the third step: by the clock it could come before anybody has asked for it, and end the tests."""
    job = make_job("label_only", str(prepared / "r"), tiny_config(prepared, steps=500, val_every=500))
    asked, wanted, before = [], Interrupt.wanted, signal.getsignal(signal.SIGTERM)

    def third(self):
        asked.append(1)
        if len(asked) == 3:
            assert signal.getsignal(signal.SIGTERM) not in (before, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        return wanted(self)

    monkeypatch.setattr(Interrupt, "wanted", third)
    with pytest.raises(DfssdError, match=r"stopped at step [34] of 500") as e:
        train_in_process(job)
    assert checkpoint.newest_step(job.store.at("train")) in (3, 4) and "goes on from there" in e.value.todo
    assert signal.getsignal(signal.SIGTERM) == before


def test_it_trains_where_ray_and_mlflow_are_not(prepared):
    code = (
        "import sys; sys.modules['ray'] = sys.modules['mlflow'] = None\n"
        "from small import make_job, tiny_config; from pathlib import Path\n"
        "from dfssd.train.in_process import train_in_process\n"
        "place = Path(sys.argv[1])\n"
        "job = make_job('label_only', str(place / 'r'), tiny_config(place, steps=1, val_every=1))\n"
        "print('trained', train_in_process(job)['steps'])\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(prepared)], capture_output=True, text=True, env=env, timeout=300
    )
    assert "trained 1" in done.stdout, done.stderr[-2000:]


def test_a_profile_of_some_steps_lies_in_the_stages_folder(prepared):
    import json

    job = make_job("label_only", str(prepared / "r"), tiny_config(prepared, steps=9, val_every=9, profile_steps=1))
    train_in_process(job)
    assert len(json.loads(job.store.read("profile.json"))["traceEvents"]) > 100
    timed = [h for h in job.store.read_json("history.json") if "time/backward (s)" in h]
    assert timed and {"time/student (s)", "time/criterion (s)", "time/optimiser (s)", "time/data (s)"} <= set(timed[-1])
