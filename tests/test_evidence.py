"""Numbers about pictures: escapes, operating point, intervals, COCO's AP, confusion, calibration."""

import io
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch

from dfssd.evaluate import coco, curves, escapes, intervals, verdict
from dfssd.evaluate.escapes import Pictures
from dfssd.evaluate.validation import record, summarise
from dfssd.report.point import point_text

NAMES = ["a", "b", "c"]


def made_up(images=60, seed=0, classes=3, skill=0.8, swapped=0.1):
    """Records of a made-up detector: found boxes lie near the truth, false ones anywhere; some pictures are clean."""
    rng, records = np.random.default_rng(seed), []
    for k in range(images):
        count = 0 if rng.random() < 0.3 else rng.integers(1, 5)
        low = rng.uniform(0, 300, (count, 2))
        truth = np.concatenate(
            [low, low + rng.choice([12, 50, 140], (count, 1)) * rng.uniform(0.6, 1.4, (count, 2))], 1
        )
        cls = rng.integers(0, classes, count)
        rows = []
        for box, c in zip(truth, cls, strict=True):
            if rng.random() < skill:
                moved = box + rng.normal(0, 0.06, 4) * np.tile(box[2:] - box[:2], 2)
                rows.append([*moved, rng.uniform(0.2, 1.0), (c if rng.random() > swapped else (c + 1) % classes)])
        for _ in range(rng.poisson(1.0)):
            x, y = rng.uniform(0, 300, 2)
            w, h = rng.choice([10, 60, 150], 2)
            rows.append([x, y, x + w, y + h, rng.uniform(0.01, 0.5), rng.integers(classes)])
        table = np.array(rows, np.float32).reshape(-1, 6)
        found = torch.tensor(table[np.argsort(-table[:, 4], kind="stable")])
        one = record(
            found,
            torch.tensor(cls, dtype=torch.float32),
            torch.tensor(truth, dtype=torch.float32).reshape(-1, 4),
            str(k),
        )
        records.append({**one, "group": k})
    return records


def test_coco_numbers_are_those_of_faster_coco_eval():
    faster = pytest.importorskip("faster_coco_eval")
    records = made_up(120)
    images = [{"id": k, "width": 500, "height": 500, "file_name": str(k)} for k in range(len(records))]
    labels, found = [], []
    for k, one in enumerate(records):
        for box, c in zip(one["truth"].astype(float), one["target_cls"], strict=True):
            xywh = [*box[:2], *(box[2:] - box[:2])]
            labels.append({"id": len(labels) + 1, "image_id": k, "category_id": int(c) + 1, "bbox": xywh,
                           "area": xywh[2] * xywh[3], "iscrowd": 0})  # fmt: skip
        for box, s, c in zip(one["boxes"].astype(float), one["conf"], one["pred_cls"], strict=True):
            found.append({"image_id": k, "category_id": int(c) + 1, "bbox": [*box[:2], *(box[2:] - box[:2])],
                          "score": float(s)})  # fmt: skip
    with redirect_stdout(io.StringIO()):
        truth = faster.COCO({"images": images, "annotations": labels, "info": {},
                             "categories": [{"id": c + 1, "name": n} for c, n in enumerate(NAMES)]})  # fmt: skip
        judge = faster.COCOeval_faster(truth, truth.loadRes(found), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    ours = coco.coco_numbers(records, 3)
    got = [ours["all"]["map50_95"], ours["all"]["map50"], *(ours[s]["map50_95"] for s in ("small", "medium", "large"))]
    want = [judge.stats[k] for k in (0, 1, 3, 4, 5)]
    assert min(want) > 0.05
    np.testing.assert_allclose(got, want, atol=5e-3)


def test_sizes_without_a_box_are_none_and_not_zero():
    numbers = coco.coco_numbers([r for r in made_up(40) if not len(r["target_cls"])], 3)
    assert numbers["all"] == {"map50_95": None, "map50": None, "boxes": 0}


def naive_escapes(records, tau):
    escaped = rejected = 0
    for one in records:
        found = any(s >= tau[int(c)] for s, c in zip(one["conf"], one["pred_cls"], strict=True))
        escaped += len(one["target_cls"]) > 0 and not found
        rejected += len(one["target_cls"]) == 0 and found
    return escaped, rejected


def test_escapes_and_overkill_are_what_a_count_by_hand_gives():
    records = made_up(80, seed=4)
    pictures = Pictures.of(records, 3)
    for tau in ([0.3, 0.3, 0.3], [0.1, 0.5, 0.9]):
        got = escapes.measure(pictures, np.array(tau), NAMES)
        assert (got["escape"]["count"], got["overkill"]["count"]) == naive_escapes(records, tau)
        clean = sum(not len(r["target_cls"]) for r in records)
        assert got["overkill"]["pictures"] == clean and got["escape"]["pictures"] == 80 - clean
        shown = sum(1 in r["target_cls"] for r in records)
        assert got["escape_by_class"]["b"]["pictures"] == shown
        assert got["escape_by_class"]["b"]["not_named"] >= got["escape_by_class"]["b"]["count"]
    curve = escapes.curve(pictures, NAMES)
    at = curve["score"].index(0.3)
    escaped, rejected = naive_escapes(records, [0.3] * 3)
    assert curve["escape"][at] == pytest.approx(escaped / (80 - clean), abs=1e-4)
    assert curve["overkill"][at] == pytest.approx(rejected / clean, abs=1e-4)


@pytest.mark.parametrize("max_escape", [0.0, 0.05, 0.2])
def test_the_score_is_the_highest_that_keeps_the_escapes(max_escape):
    pictures = Pictures.of(made_up(200, seed=7, skill=0.98), 3)
    tau, reachable = escapes.single_threshold(pictures, max_escape)
    allowed = int(max_escape * pictures.defective.sum() + 1e-9)

    def escaped(t):
        return (~pictures.rejected(np.full(3, t)))[pictures.defective].sum()

    if reachable:
        assert escaped(tau) <= allowed < escaped(tau + 0.002)
    else:
        assert tau == escapes.FLOOR and escaped(tau) > allowed


def noisy_in_one_class():
    """Class b is noisy and sure of itself, a and c are not."""
    records = made_up(300, seed=1, skill=1.0, swapped=0.0)
    for one in records:
        wrong = ~one["tp"][:, 0]
        one["conf"] = np.where(wrong & (one["pred_cls"] == 1), 0.6, one["conf"] * np.where(wrong, 0.1, 1))
        one["conf"] = np.where(~wrong & (one["pred_cls"] == 1), 0.9, one["conf"])
    return records


def test_thresholds_by_class_spare_clean_pictures_and_let_no_more_pass():
    pictures = Pictures.of(noisy_in_one_class(), 3)
    tau, reachable = escapes.single_threshold(pictures, 0.02)
    single = escapes.measure(pictures, np.full(3, tau), NAMES)
    tau_c, differ = escapes.class_thresholds(pictures, 0.02)
    assert differ
    by_class = escapes.measure(pictures, tau_c, NAMES)
    assert reachable and tau_c[1] > 0.6 > tau
    assert by_class["escape"]["rate"] <= 0.02
    assert by_class["overkill"]["count"] < single["overkill"]["count"]


def test_thresholds_by_class_that_only_fit_their_pictures_are_not_taken():
    """Chosen freely on 60 pictures without anything to gain, they let twice as many parts pass on 3000 others."""
    others, passed = Pictures.of(made_up(3000, seed=999), 3), np.zeros(3)
    for seed in range(12):
        val = Pictures.of(made_up(60, seed=seed), 3)
        common = np.full(3, escapes.single_threshold(val, 0.05)[0])
        chosen = (common, escapes._thresholds(val, 0.05), escapes.class_thresholds(val, 0.05)[0])
        passed += [(~others.rejected(tau_c))[others.defective].sum() for tau_c in chosen]
    assert passed[1] > 1.5 * passed[0] and passed[2] < 1.2 * passed[0]


def test_some_of_the_pictures_are_what_they_would_be_alone():
    records = made_up(40, seed=3)
    for index in (np.array([5, 1, 30]), np.arange(0)):
        some, alone = Pictures.of(records, 3).take(index), Pictures.of([records[k] for k in index], 3)
        assert all(np.array_equal(getattr(some, k), getattr(alone, k)) for k in ("best", "shows"))
        assert all(np.array_equal(a, b) for a, b in zip(some.false_scores, alone.false_scores, strict=True))
        assert all(sorted(a) == sorted(b) for a, b in zip(some.false_in, alone.false_in, strict=True))


def test_a_class_that_val_hardly_shows_keeps_the_common_score():
    records = [r for r in noisy_in_one_class() if 2 not in r["target_cls"]]
    point = escapes.operating_point(Pictures.of(records, 3), NAMES, 0.05)
    assert point["thresholds"]["c"] == point["score"] < point["thresholds"]["b"]
    assert any("c: the common score" in n for n in point["notes"])
    few = escapes.operating_point(Pictures.of(records[:12], 3), NAMES, 0.05)["notes"]
    assert any("fewer than 10 val pictures show a, b, c: the common score" in n for n in few), "nothing was tried"
    assert not any("cross-validation" in n for n in few)


def test_a_rate_out_of_reach_and_no_defects_are_said():
    records = made_up(50, skill=0.0)
    for one in records:
        one["conf"] = one["conf"] * 0
    point = escapes.operating_point(Pictures.of(records, 3), NAMES, 0.02)
    assert not point["reachable"] and "cannot be reached" in point["notes"][0]
    clean = Pictures.of([r for r in records if not len(r["target_cls"])], 3)
    point = escapes.operating_point(clean, NAMES, 0.02)
    assert "no defective picture" in point["notes"][0] and point["score"] == escapes.FLOOR
    assert escapes.measure(clean, np.full(3, 0.5), NAMES)["escape"]["rate"] is None


def test_the_interval_covers_the_truth_with_duplicates_and_without():
    """Simulated rates: the 95 % interval holds the truth in at least nine of ten; over single pictures it would not."""
    rng = np.random.default_rng(0)
    for copies in (1, 5):
        held = naive = 0
        for k in range(60):
            events = np.repeat(rng.random(40) < 0.1, copies)
            groups = np.repeat(np.arange(40), copies)
            low, high = intervals.rate_interval(events, groups, seed=k)
            held += low <= 0.1 <= high
            low, high = intervals.rate_interval(events, np.arange(len(events)), seed=k)
            naive += low <= 0.1 <= high
        assert held >= 55, copies
    assert naive < 50  # each picture five times, taken for five pictures: too sure


@pytest.mark.parametrize("width", [60, 80, 120, 10_000])
def test_nothing_is_cut_out_of_a_table_and_words_stay_whole(width):
    from dfssd.report.tables import render

    header = [
        "model",
        "val mAP50",
        "test mAP50",
        "rejects",
        "test mAP50-95",
        "last weights: test mAP50, mAP50-95",
        "escapes",
        "parameters",
        "latency p50, p95 (ms)",
    ]
    rows = [["student, distilled", "0.807", "0.766", "0 of 6", "0.471", "0.770, 0.480", "4 of 75", "3.01 M", "132.9, 1388.2"],
            ["teacher", "0.826", "0.775", "0 of 6", "0.504", "-", "12 of 75", "11.14 M", "274.2, 1343.9"]]  # fmt: skip
    text = render("measured", header, rows, width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for word in {w for cells in (header, *rows) for cell in cells for w in cell.split()}:
        assert word in text, word
    title = "plan (time from steps measured on vm (2 thread(s)))"
    assert render(title, ["a", "b"], [["1", "2"]], width).splitlines()[0] == title


def test_axes_have_round_numbers():
    from dfssd.report.charts import ticks

    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1] and ticks(0, 20.68) == [0, 5, 10, 15, 20]
    assert ticks(1, 220) == [50, 100, 150, 200] and ticks(0, 0.03) == [0, 0.01, 0.02, 0.03]
    for high in (3.0, 7.0, 123.0, 4e-4, 9e6):
        assert 3 <= len(ticks(0, high)) <= 7


def test_no_event_is_not_certainty():
    low, high = intervals.rate_interval(np.zeros(30, bool), np.arange(30))
    assert low == 0 and high == pytest.approx(1 - 0.025 ** (1 / 30), abs=1e-9)
    assert intervals.rate_interval(np.zeros(0, bool), np.zeros(0)) == (0.0, 1.0)
    assert intervals.trials_needed(0.02) == 149  # the rule of three
    assert intervals.trials_needed(0) == np.inf and np.isfinite(intervals.trials_needed(1e-18))


def test_few_pictures_are_said_in_plain_words():
    records = made_up(30, seed=3)
    keep = [r for r in records if len(r["target_cls"])] + [r for r in records if not len(r["target_cls"])][:6]
    pictures = Pictures.of(keep, 3)
    notes = verdict.doubts(escapes.measure(pictures, np.full(3, 0.3), NAMES), 0.02, "test")
    assert notes[0].startswith("6 clean test pictures cannot measure overkill (the interval is ")
    assert "cannot confirm an escape rate of 2.0%" in notes[1] and "149" in notes[1]
    none = Pictures.of([r for r in records if len(r["target_cls"])], 3)
    notes = verdict.doubts(escapes.measure(none, np.full(3, 0.3), NAMES), 0.0, "test")
    assert notes[0].startswith("No clean test picture: overkill cannot be measured")
    assert notes[1].endswith("cannot confirm an escape rate of 0.0%: no number of pictures can.")


def test_a_score_chosen_on_few_pictures_lets_more_pass_than_was_asked_and_says_so():
    """How much more, by the truth: scores of new pictures from the same source."""
    rng = np.random.default_rng(0)

    def drawn(count):
        shows, none = np.ones((count, 1), bool), (np.zeros(0),)
        return Pictures(rng.beta(2, 1, (count, 1)), shows, np.arange(count), none, none)

    for rate, count, said in ((0.05, 3, True), (0.05, 9, False), (0.05, 40, False), (0.02, 20, True), (0.0, 40, True)):
        new = drawn(20_000).best[:, 0]
        passed = [(new < escapes.single_threshold(drawn(count), rate)[0]).mean() for _ in range(400)]
        expected = intervals.rate_of_new(rate, count)
        assert np.mean(passed) == pytest.approx(expected, abs=3.5 * np.std(passed) / 20 + 1e-3)
        notes = [n for n in escapes.operating_point(drawn(count), ["a"], rate)["notes"] if "cannot choose" in n]
        assert bool(notes) == said and all(f"lets {expected:.1%} of new ones pass" in n for n in notes), (rate, count)
    assert "19 would do" in escapes.operating_point(drawn(3), ["a"], 0.05)["notes"][0]
    assert "3 defective pictures cannot" in escapes.operating_point(drawn(3), ["a"], 0.05, "")["notes"][0]


def test_curves_agree_with_ultralytics_at_the_score_of_best_f1():
    records = made_up(100)
    ours, theirs = curves.score_curves(records, NAMES), summarise(records, dict(enumerate(NAMES)))
    at = [ours["by_class"][n] for n in NAMES]
    best = max(range(100), key=lambda k: np.mean([c["f1"][k] for c in at]))
    assert np.mean([c["recall"][best] for c in at]) == pytest.approx(theirs["recall"], abs=0.03)
    assert np.mean([c["precision"][best] for c in at]) == pytest.approx(theirs["precision"], abs=0.03)


def test_confusion_counts_every_box_once():
    records = made_up(100)
    table = np.array(curves.confusion(records, np.full(3, 0.25)))
    assert table[:3].sum() == sum(len(r["target_cls"]) for r in records)
    assert table[:, :3].sum() == sum(int((r["conf"] >= 0.25).sum()) for r in records)
    assert table[3, 3] == 0 and (np.diag(table)[:3] > 0).all() and table[0, 1] > 0


def test_calibration_of_scores_that_tell_the_truth_and_of_boasting_ones():
    rng = np.random.default_rng(0)
    conf = rng.uniform(0.05, 1, 20000)
    tp = np.repeat((rng.random(20000) < conf)[:, None], 10, 1)
    honest = {"conf": conf, "tp": tp, "pred_cls": np.zeros(20000), "target_cls": np.zeros(0)}
    assert curves.calibration([honest])["error"] < 0.02
    assert curves.calibration([{**honest, "conf": np.sqrt(conf)}])["error"] > 0.1
    assert curves.calibration([]) == {"bins": [], "error": None, "boxes": 0}


def test_the_verdict_names_escapes_rejects_and_doubts():
    results = {}
    for name, skill in (("label_only", 0.7), ("student", 0.95)):
        val, test = (Pictures.of(made_up(80, seed=s, skill=skill), 3) for s in (1, 2))
        point = escapes.operating_point(val, NAMES, 0.1)
        tau_c = np.array(list(point["thresholds"].values()))
        line = escapes.measure(test, tau_c, NAMES)
        results[name] = {"operating_point": point, "test": {"line": line, "curve": escapes.curve(test, NAMES)}}
    lines = verdict.escapes_in_words(results, {"label_only": "student, labels alone", "student": "student, distilled"})
    assert "chosen on val for at most 10.0% escapes" in lines[0]
    escape = results["student"]["test"]["line"]["escape"]
    assert f"lets {escape['count']} of {escape['pictures']}" in lines[2] and "rejects" in lines[2]
    assert any("cannot measure overkill" in line for line in lines)
    assert "At equal false boxes" in verdict.equal_footing(results)
    assert verdict.equal_footing({"student": results["student"]}) == ""


def test_files_are_compared_at_one_number_of_false_boxes():
    """Whatever scores their own points have, and on whichever pictures these were chosen."""

    def file(false_boxes, escape):
        curve = {"score": [0.0, 0.4, 1.0], "false_boxes": [3.0, 1.0, 0.0], "escape": [0.0, escape, 1.0]}
        return {"line": {"false_boxes": false_boxes}, "curve": curve}

    said = verdict.common_point({"a.onnx": file(1.0, 0.2), "b.pt": file(0.1, 0.1)})
    assert "(1.00 a picture, as a.onnx makes)" in said and "a.onnx 20.0%, b.pt 10.0%." in said
    half = verdict.common_point({"a.onnx": file(2.0, 0.2), "b.pt": file(0.1, 0.1)})
    assert "(2.00 a picture" in half and "a.onnx 10.0%, b.pt 5.0%." in half
    both = {"student": {"test": file(2.0, 0.2)}, "label_only": {"test": file(9.0, 0.4)}}
    assert "(2.00 a test picture" in verdict.equal_footing(both) and "20.0%." in verdict.equal_footing(both)
    assert verdict.common_point({"a.onnx": file(0.4, 0.2)}) == ""
    assert verdict.common_point({"a": file(0.4, None), "b": file(0.4, 0.1)}) == ""


@pytest.mark.parametrize(
    ("count", "low", "high", "said"),
    [(5, 0.013, 0.149, "too few pictures"), (9, 0.05, 0.2, "more than was asked"), (0, 0.0, 0.01, "it holds")],
)
def test_the_operating_point_says_what_test_says(count, low, high, said):
    point = {"max_escape": 0.02, "score": 0.056, "reachable": True}
    text = point_text(
        point, "the student", {"count": count, "pictures": 75, "rate": count / 75, "low": low, "high": high}
    )
    assert f"{count} of 75" in text and said in text and "confirms it" not in text


def test_where_map_and_escapes_disagree_it_is_said():
    def results(gain, own, base):
        rates = {"student": own, "label_only": base}
        lines = {m: {"escape": {"count": n, "pictures": 75, "rate": n / 75}} for m, n in rates.items()}
        return {
            "gate": {"map50_95": {"difference": gain}},
            **{m: {"test": {"line": line}} for m, line in lines.items()},
        }

    said = verdict.disagreement(results(0.016, 5, 1))
    assert "5 of 75" in said and "label-only student 1" in said and "higher" in said
    assert "lower" in verdict.disagreement(results(-0.016, 1, 5))
    assert not any(verdict.disagreement(results(*one)) for one in [(0.016, 1, 5), (-0.016, 5, 1), (0.016, 3, 3)])
    assert verdict.disagreement({"student": {}}) == ""


def test_more_than_ten_lines_can_be_told_apart():
    """Colours repeat, dashes then differ: in curves.png and in the charts of the report."""
    from dfssd.report import charts, plots

    assert len({tuple(plots.look(k).values()) for k in range(40)}) == 40
    assert len({charts.look(k) for k in range(32)}) == 32
    text = charts.line_chart("t", {f"model {k}": [(0, 0.1), (1, 0.01 * k)] for k in range(20)}, "x")
    lines = {p.split(" fill")[1].split("/>")[0] for p in text.split("<polyline")[1:]}
    assert len(lines) == 20


def test_a_fade_is_marked_and_said_and_no_crash_in_the_plot():
    """Terms of a teacher that the student has passed: 0 is a gap, and the stretch has a mark and a sentence."""
    from matplotlib import pyplot as plt

    from dfssd.report import plots

    def step(k, lead):
        own = {} if lead == 1 else {"loss/pred/cls (own)": 1 - lead}
        return {"step": k, "loss/total": 2.0, "loss/sup/cls": 1.0, "loss/pred/cls": lead, **own}

    history = [step(k, lead) for k, lead in enumerate([1, 1, 0.4, 0, 1, 0.5, 0])]
    assert plots.ahead(history) == [(2, 3), (5, 6)] and "fade to zero as meant" in plots.remark(history)
    _, axis = plt.subplots()
    plots._terms(axis, history)
    drawn = {line.get_label(): line.get_ydata() for line in axis.lines}
    assert np.isnan(drawn["pred/cls"][[3, 6]]).all() and np.isfinite(drawn["sup/cls"]).all() and len(axis.patches) == 2
    plt.close()
    quiet = [step(k, 1) for k in range(3)]
    assert plots.remark(quiet) == "" and plots.ahead(quiet) == []
    assert "schedule" in plots.remark([*quiet, {**step(3, 1), "loss/feat/pkd": 0.0}])
    assert plots.remark([{**step(0, 1), "loss/pse/box": 0.0}]) == "", "a batch without pseudo-labels is no schedule"


def test_small_pictures_of_a_report_are_enlarged(tmp_path):
    import cv2

    from dfssd.data.manifest import Row
    from dfssd.report.pictures import draw

    cv2.imwrite(str(tmp_path / "x.png"), np.full((64, 128, 3), 90, np.uint8))
    row = Row("0" * 16, str(tmp_path / "x.png"), 128, 64, "test", True, 0, None)
    box = np.array([[0, 0.5, 0.5, 0.25, 0.25, 0.9]])
    picture = draw(row, box, ["pit"], side=420)
    assert picture.size == (420, 210)
    ys, xs = np.nonzero(np.ptp(np.asarray(picture).astype(int), 2) > 80)
    assert abs(xs.min() - 420 * 0.375) < 3 and abs(ys.max() - 210 * 0.625) < 3


def test_worst_cases_show_what_their_captions_say(tmp_path):
    """The surest box's name lies on top; a wrong class is called one; a miss names class and threshold, or no guess."""
    import cv2

    from dfssd.data.manifest import Manifest, Row
    from dfssd.report.cases import worst_alarms, worst_misses
    from dfssd.report.pictures import draw

    cv2.imwrite(str(tmp_path / "x.png"), np.full((200, 200, 3), 90, np.uint8))

    def row(key, *boxes):
        return Row(key * 16, str(tmp_path / "x.png"), 200, 200, "test", True, 0, np.array(boxes).reshape(-1, 5))

    pit = [0, 0.5, 0.5, 0.2, 0.2]  # 80 to 120 px
    rows = [row("0"), *(row(k, pit) for k in "12345")]
    on, near, off = [80, 80, 120, 120], [95, 95, 135, 135], [0, 0, 20, 20]
    found = {
        "0" * 16: [[*off, 0.9, 0, 0]],
        "1" * 16: [[*on, 0.3, 0, 0], [*on, 0.8, 1, 0]],
        "2" * 16: [[*on, 0.95, 0, 1], [*on, 0.7, 0, 0]],
        "3" * 16: [[*near, 0.6, 0, 0]],
        "4" * 16: [[*off, 0.5, 0, 0], [*off, 0.2, 1, 0]],
    }
    found = {k: np.array(v, np.float32) for k, v in found.items()}
    manifest, tau = Manifest(rows, ["pit", "dent"], {}), np.array([0.25, 0.25])
    said = [one["caption"].partition(": ")[2] for one in worst_alarms(manifest, found, tau)]
    assert said == [
        "clean picture, pit 0.90",
        "wrong class, labelled pit, dent 0.80",
        "a second box on one defect, pit 0.70",
        "too far off its label (IoU 0.24), pit 0.60",
        "beside labelled defects, pit 0.50",
    ]
    assert "no guess" in worst_misses(manifest, found, tau)[0]["caption"]
    misses = worst_misses(manifest, {"1" * 16: found["1" * 16]}, np.array([0.9, 0.9]))
    assert "pit; best guess dent 0.800, threshold 0.900" in misses[-1]["caption"]
    strong, weak = [0, 0.5, 0.5, 0.4, 0.4, 0.9], [1, 0.5, 0.5, 0.4, 0.4, 0.3]
    alone = draw(rows[0], np.array([strong]), ["pit", "dent"])
    for boxes in ([strong, weak], [weak, strong]):
        both = draw(rows[0], np.array(boxes), ["pit", "dent"])
        name = np.asarray(alone)[40:72, 72:100]  # the beginning of the name, over the box's left upper corner
        assert (np.asarray(both)[40:72, 72:100] == name).all()
