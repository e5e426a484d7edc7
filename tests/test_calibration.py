"""Calibrated scores, and thresholds that promise a precision."""

import numpy as np
import pytest
import torch
from small import give_teacher_and_candidates, make_job, tiny_config

from dfssd.data.manifest import pseudo_table, read_manifest, write_table
from dfssd.pseudo.calibration import FEWEST, calibrate, isotonic, wilson_lower
from dfssd.pseudo.quality import measure
from dfssd.pseudo.scores import BINS, NEVER
from dfssd.pseudo.thresholds import ScoreCounts
from dfssd.runtime.storage import Storage
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train.build import build_session


def _plain_isotonic(hits, found):
    """Min-max formula of isotonic regression, written out."""
    bins = [b for b in range(len(found)) if found[b]]

    def mean(a, b):
        return sum(hits[k] for k in bins[a : b + 1]) / sum(found[k] for k in bins[a : b + 1])

    n = len(bins)
    return {bins[k]: max(min(mean(a, b) for b in range(k, n)) for a in range(k + 1)) for k in range(n)}


def test_isotonic_regression_is_the_min_max_formula():
    rng = np.random.default_rng(0)
    for _ in range(20):
        found = rng.integers(0, 4, 15)
        hits = rng.binomial(found, np.linspace(0.1, 0.9, 15))
        got = isotonic(hits, found)
        for b, value in _plain_isotonic(hits, found).items():
            assert got[b] == pytest.approx(value)
        assert (np.diff(got) >= -1e-12).all()
    assert (isotonic(np.zeros(5), np.zeros(5)) == 0).all()


def test_wilson_bound_against_known_values():
    assert wilson_lower(np.array(0.8), np.array(20)) == pytest.approx(0.6228, abs=2e-3)
    assert wilson_lower(np.array(1.0), np.array(10)) == pytest.approx(0.787, abs=2e-3)
    assert np.isnan(wilson_lower(np.array(0.5), np.array(0)))


def _val(classes, seed=0, per_class=400):
    """Candidates whose score is right in `classes[c](score)` of cases."""
    rng = np.random.default_rng(seed)
    found, hits = np.zeros((len(classes), BINS), int), np.zeros((len(classes), BINS), int)
    for c, right in enumerate(classes):
        for score in rng.uniform(0.05, 1.0, per_class):
            b = int(score * BINS)
            found[c, b] += 1
            hits[c, b] += rng.uniform() < right(score)
    return found, hits


def test_a_class_that_is_rarely_right_gets_no_boxes_and_the_promise_holds_on_new_images():
    classes = [lambda s: s, lambda s: 0.3, lambda s: min(1.0, 0.5 + s)]
    calibration = calibrate(*_val(classes))
    found, hits = _val(classes, seed=1, per_class=5000)
    scores = ScoreCounts(found, 5000)
    tau = calibration.thresholds(scores.counts, 0.7)
    assert tau[1] == NEVER and tau[2] < tau[0] < 0.9
    for c in (0, 2):
        kept = slice(int(tau[c] * BINS), None)
        assert hits[c, kept].sum() / found[c, kept].sum() > 0.7
    expected, bound = calibration.precision(scores.counts, np.minimum(tau, 0.999))
    assert (bound[[0, 2]] >= 0.7 - 1e-9).all() and (expected[[0, 2]] > bound[[0, 2]]).all()


def test_few_candidates_promise_nothing():
    found, hits = _val([lambda s: 1.0], per_class=FEWEST - 1)
    scores = ScoreCounts(found * 100, 100)
    assert calibrate(found, hits).thresholds(scores.counts, 0.5)[0] == NEVER
    found, hits = _val([lambda s: 1.0], per_class=10 * FEWEST)
    assert calibrate(found, hits).thresholds(scores.counts, 0.5)[0] < 0.2


def test_precision_is_a_policy_of_the_student_and_of_the_report(prepared):
    """Thresholds come from val; a class that val does not vouch for gets no boxes, only the teacher's soft scores."""
    run = Storage(str(prepared / "r"))
    manifest = read_manifest(run.at("dataset"))
    give_teacher_and_candidates(prepared)
    shown = [
        np.repeat(r.boxes, FEWEST, 0) if r.boxes is not None else np.zeros((0, 5)) for r in manifest.of_split("val")
    ]
    val = [np.concatenate([b, np.full((len(b), 1), 0.8), np.ones((len(b), 1))], 1).astype(np.float32) for b in shown]
    for boxes in val:
        boxes[:, 1:5] += 1e-4 * np.arange(len(boxes))[:, None]
        boxes[1::FEWEST, 5] = 0.9
    ids = [r.image_id for r in manifest.of_split("val")]
    write_table(run.at("pseudo"), "val-00000.parquet", pseudo_table(ids, "t", val))
    config = tiny_config(prepared, threshold_policy="precision", precision=0.6)
    s = build_session(make_job("student", str(prepared / "r"), config), WorkerGroup(), torch.device("cpu"))
    tau = s.policy.thresholds()
    untrusted = tau >= NEVER - 1e-6  # most of their candidates on val are doubles of a box that another has hit
    assert untrusted.any()
    labelled = config.train.batch
    boxes = s.targets(next(iter(s.loader())), labelled).boxes
    pseudo = boxes.cls[labelled:][boxes.valid[labelled:]]
    assert not untrusted[pseudo].any()
    easy = tiny_config(prepared, threshold_policy="precision", precision=0.01)
    s = build_session(make_job("student", str(prepared / "r"), easy), WorkerGroup(), torch.device("cpu"))
    assert (s.policy.thresholds() < NEVER - 1e-6).sum() > (~untrusted).sum()
    quality = measure(easy, run, "pseudo")
    assert quality.chosen == "precision" and quality.tau["precision"] == pytest.approx(s.policy.thresholds().numpy())
    assert any("gets no pseudo-labels" in w for w in measure(config, run, "pseudo").numbers()["warnings"])
