"""The gate: its mAP is Ultralytics', its interval covers the truth, and its words follow the numbers."""

import numpy as np
import pytest

from dfssd.evaluate import gate
from dfssd.evaluate.validation import summarise


def _stats(images=80, skill=0.7, seed=0, classes=3):
    """Matches of a made-up detector that finds each box with probability `skill`."""
    rng, stats = np.random.default_rng(seed), []
    for k in range(images):
        target = rng.integers(0, classes, rng.integers(0, 4)).astype(np.float32)
        rows = []
        for c in target:
            if rng.random() < skill:
                rows.append((c, 0.3 + 0.7 * rng.random(), rng.uniform(0.5, 1.0)))
        rows += [(rng.integers(classes), 0.7 * rng.random(), 0.0) for _ in range(rng.integers(0, 5))]
        rows.sort(key=lambda r: -r[1])
        table = np.array(rows).reshape(-1, 3)
        tp = table[:, 2:] > np.linspace(0.5, 0.95, 10)[None]
        stats.append({"tp": tp, "conf": table[:, 1], "pred_cls": table[:, 0], "target_cls": target,
                      "target_img": np.unique(target), "im_name": str(k)})  # fmt: skip
    return stats


def test_with_every_image_once_the_map_is_ultralytics():
    stats = _stats()
    want = summarise(stats, {0: "a", 1: "b", 2: "c"})
    got = gate.Ranked(stats).map(np.ones(80))
    np.testing.assert_allclose(got, [want["map50"], want["map50_95"]], rtol=1e-9)


def test_weights_count_an_image_as_often_as_they_say():
    stats = _stats(30)
    weight = np.random.default_rng(3).integers(0, 4, 30)
    repeated = [s for s, w in zip(stats, weight, strict=True) for _ in range(w)]
    want = summarise(repeated, {0: "a", 1: "b", 2: "c"})
    np.testing.assert_allclose(
        gate.Ranked(stats).map(weight.astype(float)), [want["map50"], want["map50_95"]], atol=2e-3
    )


def test_a_class_that_a_draw_does_not_hold_is_left_out():
    stats = _stats(12, classes=3)
    only = np.array([float(set(s["target_cls"]) <= {0.0} and len(s["target_cls"]) > 0) for s in stats])
    only[np.flatnonzero([set(s["target_cls"]) == {1.0} for s in stats])] = 1
    assert np.isfinite(gate.Ranked(stats).map(only)).all()


def test_equal_models_differ_by_nothing_and_a_better_one_by_more():
    weak, strong = _stats(skill=0.5), _stats(skill=0.9)
    for one, other in zip(weak, strong, strict=True):  # the same images
        other["target_cls"], other["target_img"] = one["target_cls"], one["target_img"]
    same = gate.compare(weak, weak)
    assert all(same[m][k] == 0 for m in gate.MEASURES for k in ("difference", "low", "high"))
    result = gate.compare(weak, _stats(skill=0.5, seed=0))
    assert result == gate.compare(weak, _stats(skill=0.5, seed=0))  # the same draws every time


def test_the_interval_covers_the_truth_about_as_often_as_it_says(monkeypatch):
    """Two detectors of known skill on many made-up val sets: the 95 % interval holds the true difference nearly always."""
    monkeypatch.setattr(gate, "RESAMPLES", 60)
    rng = np.random.default_rng(0)

    def pair(images):
        base, other = [], []
        for k in range(images):
            target = np.zeros(rng.integers(1, 4), np.float32)
            for stats, skill in ((base, 0.5), (other, 0.65)):
                hit = rng.random(len(target)) < skill
                stats.append({"tp": np.repeat(hit[:, None], 10, 1), "conf": rng.random(len(target)), "pred_cls": target,
                              "target_cls": target, "target_img": np.unique(target), "im_name": str(k)})  # fmt: skip
        return base, other

    def difference(base, other):
        ones = np.ones(len(base))
        return (gate.Ranked(other).map(ones) - gate.Ranked(base).map(ones))[0]

    truth = difference(*pair(20_000))
    covered = [r["map50"]["low"] <= truth <= r["map50"]["high"] for r in (gate.compare(*pair(60)) for _ in range(40))]
    assert 34 <= sum(covered) <= 40
    assert truth > 0.1


def test_near_duplicates_do_not_make_the_interval_narrow():
    """Every image ten times says no more than every image once."""
    base, other = _stats(skill=0.5, seed=0), _stats(skill=0.7, seed=0)
    once = gate.compare(base, other)

    def tenfold(stats, grouped):
        return [{**s, **({"group": k} if grouped else {})} for k, s in enumerate(stats) for _ in range(10)]

    def width(result):
        return result["map50_95"]["high"] - result["map50_95"]["low"]

    grouped = gate.compare(tenfold(base, True), tenfold(other, True))
    assert grouped["groups"] == once["images"] == grouped["images"] / 10
    assert width(grouped) == pytest.approx(width(once), rel=0.25)
    assert width(gate.compare(tenfold(base, False), tenfold(other, False))) < 0.5 * width(once)
    assert f"in {once['images']} groups of near-duplicates" in gate.verdict(grouped)


def _result(difference, low, high):
    one = {"label_only": 0.3, "student": 0.3 + difference, "difference": difference, "low": low, "high": high}
    return {"map50": one, "map50_95": one, "images": 40, "resamples": 300}


@pytest.mark.parametrize(
    ("numbers", "said", "model"),
    [
        ((0.05, 0.02, 0.08), "paid:", "student"),
        ((0.01, -0.02, 0.04), "may have paid", "student"),
        ((-0.03, -0.06, 0.01), "did NOT pay", "label_only"),
    ],
)
def test_the_words_follow_the_numbers(numbers, said, model):
    line = gate.verdict(_result(*numbers))
    alone = gate.verdict(_result(*numbers), unlabelled=False)
    assert alone.startswith("The teacher") and "quality.png" not in alone and "unlabelled" not in alone
    assert said in line and f"{100 * numbers[0]:+.1f} points" in line and "40 images" in line and "\n" not in line
    assert gate.better(_result(*numbers)) == model
    assert ("--publish-best" in line) == (model == "label_only")


def test_an_interval_over_a_handful_of_images_decides_nothing():
    """Of so few the bootstrap's interval is too narrow: above zero it is no proof."""
    for images, said in ((5, "may have paid"), (gate.FEW_GROUPS, "paid")):
        line = gate.verdict({**_result(0.05, 0.02, 0.08), "images": images})
        assert line.startswith(f"The unlabelled images {said}: ") and "holds zero" not in line
        assert ("5 of them cannot say how sure" in line) == (images == 5)
    many_alike = gate.verdict({**_result(0.05, 0.02, 0.08), "images": 40, "groups": 7})
    assert "may have paid" in many_alike and "7 of them cannot say" in many_alike
    assert "cannot say how sure" in gate.verdict({**_result(-0.05, -0.08, -0.02), "images": 5})


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("width", [0.001, 0.1])
def test_a_headline_does_not_point_against_the_other_measure(sign, width):
    def one(gain):
        return {"label_only": 0.3, "student": 0.3 + gain, "difference": gain, "low": gain - width, "high": gain + width}

    result = {"map50": one(-0.013 * sign), "map50_95": one(0.004 * sign), "images": 40, "resamples": 300}
    line, alone = gate.verdict(result), gate.verdict(result, unlabelled=False)
    up, down = ("mAP50-95", "mAP50") if sign > 0 else ("mAP50", "mAP50-95")
    assert line.startswith(
        f"Whether the unlabelled images paid is undecided, {up} up, {down} down: val mAP50 {-1.3 * sign:+.1f} points"
    )
    assert alone.startswith(f"Whether the teacher paid is undecided, {up} up")
    chosen = "student" if sign > 0 else "label_only"
    assert gate.better(result) == chosen and f"{chosen}/best.pt is ahead" in line


def test_what_is_published_is_said():
    assert "the distilled student is the better one" in gate.published({"gate": _result(0.02, 0.01, 0.03)})
    assert "the label-only student is the better one" in gate.published({"gate": _result(-0.02, -0.04, 0.0)})
    assert "no label-only student" in gate.published({})
