"""What pseudo-labels are worth: matching, precision and recall at every threshold, doubt and warnings."""

import numpy as np
import pytest

from dfssd.pseudo.evidence import Evidence, match
from dfssd.pseudo.quality import Quality, doubt, warnings
from dfssd.pseudo.thresholds import ScoreCounts
from dfssd.report import quality as report


def _candidates(*rows):
    """Rows of (cls, cx, cy, side, score)."""
    return np.array([[c, x, y, s, s, p, 1.0] for c, x, y, s, p in rows], np.float32).reshape(-1, 7)


def _truth(*rows):
    return np.array([[c, x, y, s, s] for c, x, y, s in rows], np.float32).reshape(-1, 5)


def test_a_box_is_hit_once_by_the_best_score():
    truth = _truth((0, 0.5, 0.5, 0.2))
    hit, overlap = match(_candidates((0, 0.5, 0.5, 0.2, 0.3), (0, 0.51, 0.5, 0.2, 0.9)), truth)
    assert hit.tolist() == [False, True] and overlap[1] == pytest.approx(0.19 / 0.21, rel=1e-4)
    assert not match(_candidates((1, 0.5, 0.5, 0.2, 0.9)), truth)[0].any()  # another class
    assert not match(_candidates((0, 0.62, 0.5, 0.2, 0.9)), truth)[0].any()  # IoU below 0.5
    assert (
        match(_candidates(), truth)[0].shape == (0,)
        and not match(_candidates((0, 0.5, 0.5, 0.2, 1)), _truth())[0].any()
    )


def _random_images(count=60, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        truth = _truth(*[(rng.integers(3), *rng.uniform(0.3, 0.7, 2), 0.2) for _ in range(rng.integers(0, 4))])
        near = [(t[0], t[1] + rng.normal(0, 0.02), t[2], 0.2, rng.uniform(0.3, 1)) for t in truth if rng.random() < 0.8]
        noise = [(rng.integers(3), *rng.random(2), 0.1, rng.uniform(0.05, 0.6)) for _ in range(3)]
        yield _candidates(*near, *noise), truth


def test_precision_recall_and_iou_at_any_threshold_equal_a_plain_count():
    """Matching all candidates once must give what matching only those above the threshold gives."""
    evidence = Evidence.empty(3)
    for candidates, truth in _random_images():
        evidence.add(candidates, truth)
    for tau in (0.05, 0.31, 0.5, 0.77):
        found, hits, boxes, overlaps = np.zeros(3), np.zeros(3), np.zeros(3), np.zeros(3)
        for candidates, truth in _random_images():
            kept = candidates[candidates[:, 5] >= tau]
            hit, overlap = match(kept, truth)
            for c in range(3):
                found[c] += (kept[:, 0] == c).sum()
                hits[c] += (hit & (kept[:, 0] == c)).sum()
                boxes[c] += (truth[:, 0] == c).sum()
                overlaps[c] += overlap[kept[:, 0] == c].sum()
        got = evidence.at(np.full(3, tau))
        np.testing.assert_allclose(got["precision"], np.append(hits / found, hits.sum() / found.sum()), atol=0.02)
        np.testing.assert_allclose(got["recall"], np.append(hits / boxes, hits.sum() / boxes.sum()), atol=0.02)
        np.testing.assert_allclose(got["iou"], np.append(overlaps / hits, overlaps.sum() / hits.sum()), atol=0.01)
        precision, recall = evidence.curves()
        k = round(tau * 1000)
        np.testing.assert_allclose([precision[:, k], recall[:, k]], [got["precision"][:3], got["recall"][:3]])


def test_average_precision_of_perfect_and_of_useless_candidates():
    evidence = Evidence.empty(2)
    for k in range(10):
        evidence.add(_candidates((0, 0.5, 0.5, 0.2, 0.5 + k / 30), (1, 0.1, 0.1, 0.1, 0.9)), _truth((0, 0.5, 0.5, 0.2)))
    evidence.boxes[1] = 5
    assert evidence.ap50().tolist() == pytest.approx([1.0, 0.0])


def _quality(rate=(0.5, 0.5, 0.5), scores=None, tau=(0.5, 0.5, 0.5)):
    evidence, counts = Evidence.empty(3), ScoreCounts.empty(3)
    for candidates, truth in _random_images():
        evidence.add(candidates, truth)
        counts.add(candidates)
    thresholds = {p: np.array(tau) for p in ("fixed", "ema", "gmm", "match")}
    return Quality(["pit", "dent", "oil"], scores or counts, np.array(rate), "ema", thresholds, {"val": evidence}, [])


def test_warnings_in_plain_words():
    counts = ScoreCounts.empty(3)
    for _ in range(20):
        counts.add(_candidates((0, 0.5, 0.5, 0.2, 0.9), (0, 0.2, 0.2, 0.2, 0.9), (1, 0.5, 0.5, 0.2, 0.1)))
    notes = warnings(_quality(rate=(0.5, 0.5, 0.0), scores=counts))
    assert any("'pit' gets far too many pseudo-labels (2.000 pseudo-labels an image" in n for n in notes)
    assert any("'dent' gets almost no pseudo-labels (0.000" in n for n in notes)
    assert any("'oil' has no labelled box" in n for n in notes)
    assert any(n.endswith("; give a --tau-min above 0.50") for n in notes) and not any(
        "--tau " in n for n in notes
    )  # what ema reads
    assert any("'dent'" in n and n.endswith("; give a --tau-min below 0.5") for n in notes)  # 0 is its floor of 0.5
    assert not [n for n in warnings(_quality(rate=(0.5, 0.5, 0.5))) if "almost" in n or "too many" in n]


def test_numbers_table_csv_and_pictures():
    quality = _quality()
    numbers = quality.numbers()
    assert set(numbers["policies"]) == {"fixed", "ema", "gmm", "match"} and numbers["chosen"] == "ema"
    assert numbers["policies"]["ema"]["all"]["tau"] is None and 0 < numbers["policies"]["ema"]["pit"]["val_recall"] < 1
    text = report.terminal_table(numbers)
    assert (text.count("match") >= 1 and "val precision" in text.replace("\n", " ")) or "precision" in text
    lines = report.csv(numbers).decode().splitlines()
    assert len(lines) == 1 + 4 * 4 and lines[0].startswith("policy,class,threshold")
    assert report.curves(quality)[:4] == b"\x89PNG"


def test_doubt_is_highest_near_the_threshold_and_where_flips_disagree():
    tau = np.array([0.5])
    scores = [0.05, 0.3, 0.5, 0.9]
    doubts = [doubt(_candidates((0, 0.5, 0.5, 0.2, s)), tau) for s in scores]
    assert doubts[2] == pytest.approx(1) and doubts[0] == doubts[3] == 0 and doubts[1] < 0.1
    moved = _candidates((0, 0.5, 0.5, 0.2, 0.9))
    moved[:, 6] = 0.4
    assert doubt(moved, tau) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("policy", "settings", "tau", "advice"),
    [
        ("gmm", {}, 0.1, "; give a --tau-min below 0.1"),
        ("gmm", {"tau_min": 0.05}, 0.05, ""),  # no candidate lies below
        ("gmm", {}, 0.5, "; lower --tau, which is 0.5"),
        ("gmm", {}, 0.63, "; give a --tau-max below 0.63, or another --threshold-policy"),
        ("fixed", {}, 0.5, "; lower --tau, which is 0.5"),
        ("precision", {}, 0.8, "; lower --precision, which is 0.7"),
    ],
)
def test_advice_names_the_flag_that_holds_the_threshold(policy, settings, tau, advice):
    from dataclasses import replace

    from dfssd.config import Thresholds

    own = Thresholds(threshold_policy=policy, **settings)
    quality = replace(_quality(rate=(9e9,) * 3), chosen=policy, tau={policy: np.full(3, tau)}, thresholds=own)
    notes = [n for n in warnings(quality) if "almost no pseudo-labels" in n]
    assert len(notes) == 3 and all(n.partition(" have 9000000000.000)")[2] == advice for n in notes), notes


def test_a_class_without_a_threshold_has_none_in_the_table():
    from dfssd.pseudo.scores import NEVER
    from dfssd.report.quality import rows

    numbers = _quality(tau=(NEVER, 0.5, 0.5)).numbers()
    assert [r[2] for r in rows(numbers, ["ema"], ["pit", "dent", "oil"])[1]] == ["none", "0.500", "0.500", "-"]
