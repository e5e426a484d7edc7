"""benchmarks/suggest.py measures what it says: its tail is long, val and test stay, its columns are of the right classes."""

import sys
from pathlib import Path

import numpy as np
import pytest

from dfssd.data.manifest import Manifest, Row

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import long_tail
import suggest

CLASSES, EACH, FACTOR = 5, 400, 16


def row(k, split, *classes):
    boxes = np.array([[c, 0.5, 0.5, 0.1, 0.1] for c in classes], np.float32).reshape(-1, 5)
    return Row(f"{split}{k:05d}", f"/{split}{k}.jpg", 10, 10, split, True, k, boxes)


def balanced():
    rows = [row(k, split, k % CLASSES) for split in ("train", "val", "test") for k in range(CLASSES * EACH)]
    clean, several = (
        [row(10**4 + k, "train") for k in range(30)],
        [row(2 * 10**4 + k, "train", 0, 1) for k in range(160)],
    )
    return Manifest([*rows, *clean, *several], [f"class{c}" for c in range(CLASSES)], {})


@pytest.mark.parametrize("seed", range(5))
def test_a_long_tail_falls_geometrically_and_leaves_what_measures(seed):
    whole = balanced()
    found = long_tail.long_tailed(whole, FACTOR, seed)
    shares = long_tail.class_shares(CLASSES, FACTOR, seed)
    assert sorted(shares) == pytest.approx([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1])
    assert long_tail.rare_classes(CLASSES, FACTOR, seed) == np.flatnonzero(shares < 0.2).tolist()
    train = found.of_split("train")

    def rarest(rows):
        return np.bincount([min(r.boxes[:, 0].astype(int), key=lambda c: shares[c]) for r in rows if len(r.boxes)])

    expected = np.round(rarest(whole.of_split("train")) * shares).astype(int)
    assert rarest(train).tolist() == expected.tolist(), "of several classes the rarest one decides"
    assert sum(not len(r.boxes) for r in train) == 30, "images free of defects stay"
    for split in ("val", "test"):
        assert found.of_split(split) == whole.of_split(split)
    again = long_tail.long_tailed(Manifest(whole.rows[::-1], whole.names, {}), FACTOR, seed)
    assert {r.image_id for r in again.rows} == {r.image_id for r in found.rows}, "not a matter of the order of files"


def test_the_tail_is_another_by_seed_and_none_where_the_factor_is_one():
    whole = balanced()
    assert [r.image_id for r in long_tail.long_tailed(whole, 1, 0).rows] == [r.image_id for r in whole.rows]
    assert long_tail.rare_classes(CLASSES, 1, 0) == []
    assert len({tuple(long_tail.class_shares(CLASSES, FACTOR, s)) for s in range(8)}) > 4
    with pytest.raises(ValueError, match="at least 1"):
        long_tail.long_tailed(whole, 0.5, 0)


def test_the_table_pairs_the_arms_by_seed_and_means_over_the_rare_classes():
    def result(value, **more):
        found = {"map50": value, "map50_95": value / 2, "by_class": {"a": 1.0, "b": value, "c": value - 0.2}}
        return suggest.with_rare({"last": {"val": dict(found), "test": found}, **more}, ["a", "b", "c"], [1, 2])

    gain = {0: 0.01, 1: 0.03}
    results = {
        s: {
            "start": result(0.3),
            "random": result(0.3 + s, new_boxes=10, new_rare=2),
            "suggested": result(0.3 + s + gain[s], new_boxes=20, new_rare=4),
        }
        for s in gain
    }
    lines = suggest.table(results, ["suggested", "random"], ["val", "test"], True).splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert len({len(c) for c in cells}) == 1
    of = dict(zip(cells[0], cells[3], strict=True))
    assert of["labels"] == "suggested" and of["new boxes"] == "20" and of["new images of rare classes"] == "4"
    assert of["test AP50 of rare classes"] == "72.0 ± 72.1"  # 21 and 123
    assert of["over random, test AP50 of rare classes"].startswith("+2.0 (-10.7")  # of 1 and 3: t(0.975, 1) = 12.7
    plain = suggest.table(results, ["suggested", "random"], ["val", "test"], False)
    assert "rare" not in plain and "over random, test mAP50-95" in plain
