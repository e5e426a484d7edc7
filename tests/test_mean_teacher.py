"""The teacher whose own average labels the unlabelled images inside the loop."""

import numpy as np
import pytest
import torch
from small import make_job, terms_of, tiny_config

from dfssd.config import Thresholds
from dfssd.data.dataset import network_input
from dfssd.data.manifest import read_manifest
from dfssd.data.strong_view import strong_view
from dfssd.models.yolo.detector import build_detector, detector_bytes, read_detector
from dfssd.pseudo.running import HALVED_EVERY, RunningThresholds
from dfssd.runtime.storage import Storage
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train import mean_teacher as module
from dfssd.train.build import build_session
from dfssd.train.feed import moved
from dfssd.train.in_process import train_in_process
from dfssd.train.loop import label_in_loop
from dfssd.train.mean_teacher import InLoopTeacher
from dfssd.train.step import accumulate

EAGER = {"floor": 1e-5, "tau_min": 1e-6, "max_candidates": 20}  # an untrained head's scores count


def _job(storage, steps=6, sure=False, **changes):
    """A stage whose teacher is untrained; `sure` raises its scores, so that there are candidates."""
    run = Storage(str(storage / "r"))
    torch.manual_seed(3)
    model = build_detector("yolov8n.yaml", read_manifest(run.at("dataset")).names, 64)
    if sure:
        for level in model.model[-1].cv3:
            level[-1].bias.data.fill_(-1.0)
    run.write("mean_teacher/init.pt", detector_bytes(model, {}))
    return make_job("mean_teacher", str(storage / "r"), tiny_config(storage, steps=steps, **(EAGER | changes)))


def _seen(policy, scores, rate, images=10):
    """One step: `scores` of class 0, and `rate` labelled boxes an image of it."""
    cls = np.zeros(round(rate * images))
    return policy.counted(np.zeros(len(scores)), np.asarray(scores), images, cls, images)


def test_thresholds_keep_as_many_pseudo_labels_an_image_as_there_are_labels():
    policy = RunningThresholds(2, Thresholds())
    policy.see(_seen(policy, np.linspace(0.2, 0.69, 50), rate=1.0))
    assert policy.thresholds()[0] == pytest.approx(0.60, abs=0.002)  # the best ten of fifty, on ten images
    assert policy.per_image()[0] == pytest.approx(1.0)
    assert policy.thresholds()[1] == pytest.approx(0.95)  # a class without labels gets none


def test_thresholds_follow_scores_that_rise_and_forget_the_old_ones():
    policy = RunningThresholds(1, Thresholds())
    for _ in range(2 * HALVED_EVERY):
        policy.see(_seen(policy, np.linspace(0.1, 0.5, 40), rate=1.0))
    before = float(policy.thresholds()[0])
    for _ in range(4 * HALVED_EVERY):
        policy.see(_seen(policy, np.linspace(0.4, 0.8, 40), rate=1.0))
    assert before == pytest.approx(0.4, abs=0.02)
    assert float(policy.thresholds()[0]) == pytest.approx(0.7, abs=0.02)  # 0.66 where nothing is forgotten
    again = RunningThresholds(1, Thresholds())
    again.load_state_dict(policy.state_dict())
    step = _seen(policy, [0.9] * 5, rate=0.5)
    policy.see(step)
    again.see(step)
    assert torch.equal(policy.thresholds(), again.thresholds()) and torch.equal(policy.counts, again.counts)


def test_two_workers_count_what_one_would():
    one, two = RunningThresholds(1, Thresholds()), RunningThresholds(1, Thresholds())
    scores = np.random.default_rng(0).uniform(0.1, 0.9, 30)
    one.see(_seen(one, scores, rate=1.5))
    half = one.counted(np.zeros(12), scores[:12], 5, np.zeros(4), 5) + one.counted(
        np.zeros(18), scores[12:], 5, np.zeros(11), 5
    )
    two.see(half)
    assert torch.equal(one.thresholds(), two.thresholds()) and one.images == two.images == 10


def test_the_strong_view_keeps_the_geometry_and_can_be_repeated():
    image = np.full((96, 128, 3), 90, np.uint8)
    image[40:56, 70:90] = 170
    view = strong_view(image, seed=5)
    assert np.array_equal(view, strong_view(image, seed=5)) and not np.array_equal(view, strong_view(image, seed=6))
    assert np.array_equal(strong_view(image, 5, strength=0), image)
    assert (np.ptp(view.astype(int), axis=2) == 0).all()  # grey stays grey
    for seed in range(10):
        assert np.array_equal(strong_view(image[..., :1], seed), strong_view(image, seed)[..., :1])
    changes, contrast = [], []
    for seed in range(40):
        view = strong_view(image, seed).astype(float)
        inside, outside = np.median(view[42:54, 72:88]), np.median(view)
        contrast.append(inside - outside)
        changes.append(np.abs(view - image).mean())
    assert np.mean(np.array(contrast) > 20) > 0.85  # the defect is where it was, unless a patch covers it
    assert 5 < np.mean(changes) < 60


def test_the_average_labels_the_weak_view_and_the_network_learns_from_the_strong_one(prepared):
    s = build_session(_job(prepared, sure=True), WorkerGroup(), torch.device("cpu"))
    batch = next(iter(s.loader()))
    labelled = s.job.config.train.batch
    assert "img_strong" in batch and len(batch["img_strong"]) == len(batch["img"]) - labelled
    assert (batch["batch_idx"] < labelled).all()  # an unlabelled image brings no box
    seen = []
    s.in_loop.average.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    weak = network_input(batch["img"], torch.device("cpu"))
    micro = moved(0, batch, s.targets(batch, labelled), s.device)
    label_in_loop(s, [micro])
    assert torch.equal(seen[0], weak[labelled:])
    given = []
    s.student.register_forward_pre_hook(lambda _, args: given.append(args[0].clone()))
    accumulate(s, [micro], 0.0, False, None)
    assert torch.equal(given[0][:labelled], weak[:labelled])
    assert not torch.equal(given[0][labelled:], weak[labelled:])
    boxes, targets = micro.targets.boxes, micro.targets
    assert boxes.valid[labelled:].any() and int(boxes.valid[:labelled].sum()) == len(batch["cls"])
    xywh = boxes.xywh[labelled:][boxes.valid[labelled:]]
    assert (xywh[:, :2] - xywh[:, 2:] / 2 > -1e-5).all() and (xywh[:, :2] + xywh[:, 2:] / 2 < 1 + 1e-5).all()
    assert (boxes.weight[:labelled][boxes.valid[:labelled]] == 1).all()
    assert (boxes.weight[labelled:][boxes.valid[labelled:]] < 1).all()
    s.student.zero_grad()
    images = given[0]
    # The loss of the pseudo-labels reaches the network, and the network alone.
    terms = terms_of(s.criterion, s.student(images), None, targets, 0.1)
    (terms.losses["pse/cls"] + terms.losses["pse/box"]).backward()
    assert next(s.student.parameters()).grad.abs().sum() > 0
    assert all(p.grad is None for p in s.ema.ema.parameters())


def test_it_moves_from_its_teacher_slowly_and_never_leaves_worse_weights(prepared, capsys):
    """The average of the first steps is the teacher, not the network: it labels from the first step."""
    job = _job(prepared, steps=4, sure=True)
    start = read_detector(job.store.read("init.pt"), "x").state_dict()
    train_in_process(job)
    last = read_detector(job.store.read("last.pt"), "x").state_dict()
    key = "model.0.conv.weight"
    assert (
        last[key] - start[key]
    ).abs().max() < 4 * 0.002 * 4 * 0.0005 * 2 + 1e-3  # 4 steps of at most lr, times 1 - decay
    assert "step 0  val" in capsys.readouterr().out


def test_it_resumes_bit_for_bit(prepared, tmp_path_factory):
    whole = _job(prepared, steps=6, sure=True)
    train_in_process(whole)
    expected = whole.store.read_json("history.json")
    for name in ("best.pt", "last.pt", "history.json"):
        whole.store.delete(name)
    newest = sorted(whole.store.at("train").folders())[-1]
    whole.store.at("train").delete(newest)
    result = train_in_process(whole)
    again = whole.store.read_json("history.json")

    def losses(h):
        return [{k: v for k, v in one.items() if k.startswith(("loss/", "val/", "threshold/", "pse/"))} for one in h]

    assert losses(again) == losses(expected) and result["steps"] == 6
    assert any(one.get("loss/pse/cls", 0) > 0 for one in again)


@pytest.mark.parametrize(
    ("reason", "found", "labels", "map50_95"),
    [
        ("fell from", [(0, 0.9)], [0, 1], 0.1),
        ("no candidate", [], [0, 1], 0.4),
        ("of class 1", [(1, 0.9)] * 30, [0, 0, 1], 0.4),
        ("", [(0, 0.9), (1, 0.9)], [0, 1], 0.4),
    ],
    ids=["scores collapse", "no pseudo-labels", "one class takes all", "healthy"],
)
def test_a_teacher_that_fails_is_told_by_its_running_numbers(prepared, reason, found, labels, map50_95):
    config = tiny_config(prepared)
    policy = RunningThresholds(2, Thresholds(), "fixed")
    teacher = InLoopTeacher(torch.nn.Identity(), policy, config, WorkerGroup())
    teacher.started_at = 0.4
    rows = np.array(found, float).reshape(-1, 2)
    for _ in range(module.SETTLED):
        policy.see(policy.counted(rows[:, 0], rows[:, 1], 4, np.array(labels), 4))
    assert reason in teacher.failing(map50_95) and bool(teacher.failing(map50_95)) == bool(reason)


def test_it_stops_early_and_keeps_the_best(prepared, capsys, monkeypatch):
    monkeypatch.setattr(module, "SETTLED", 1)
    result = train_in_process(_job(prepared, steps=6, floor=0.9))
    out = capsys.readouterr().out
    assert "no candidate of the last steps became a pseudo-label; stops at step 1" in out
    assert result["steps"] == 1 and Storage(str(prepared / "r")).exists("mean_teacher/best.pt")
