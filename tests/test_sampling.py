import numpy as np
import pytest

from dfssd.data.sampling import StepSampler, epoch_order, repeat_factors, stable_seed
from dfssd.runtime.storage import Storage

SIZES, PER_STEP = {"labelled": 37, "unlabelled": 101}, {"labelled": 24, "unlabelled": 24}


def _sampler(first=0, last=12, rank=0, world_size=1, seed=0):
    return StepSampler(SIZES, PER_STEP, seed, first, last, plain_from=9, rank=rank, world_size=world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8])
def test_world_size_only_slices_the_global_batch(world_size):
    alone = list(_sampler())
    ranks = [list(_sampler(rank=r, world_size=world_size)) for r in range(world_size)]
    for step, want in enumerate(alone):
        together = [d for r in range(world_size) for d in ranks[r][step]]
        assert sorted(together) == sorted(want)
        assert {len(ranks[r][step]) for r in range(world_size)} == {48 // world_size}
        for r in range(world_size):  # labelled ones first, equally many on every rank
            streams = [d.stream for d in ranks[r][step]]
            assert streams == ["labelled"] * (24 // world_size) + ["unlabelled"] * (24 // world_size)


def test_each_image_once_an_epoch():
    draws = [d for batch in _sampler(last=37) for d in batch if d.stream == "labelled"]
    images = [d.image for d in draws]
    for epoch in range(len(images) // 37):
        assert sorted(images[epoch * 37 : (epoch + 1) * 37]) == list(range(37))
    assert images[:37] != images[37:74]


def test_resume_needs_nothing_but_the_step():
    assert list(_sampler(first=5)) == list(_sampler())[5:]


def test_seed_stream_and_close_mosaic():
    assert list(_sampler(seed=1)) != list(_sampler())
    assert [all(d.mosaic for d in b) for b in _sampler()] == [True] * 9 + [False] * 3
    seeds = [d.seed for b in _sampler() for d in b]
    assert len(set(seeds)) == len(seeds)
    assert not np.array_equal(epoch_order(0, "labelled", 0, 50), epoch_order(0, "unlabelled", 0, 50))


def test_seeds_are_the_same_on_every_machine():
    assert stable_seed(0, "labelled", 3) == 1968432918


def test_repeat_factors_follow_lvis():
    def one(*classes):
        return np.array([[c, 0.5, 0.5, 0.1, 0.1] for c in classes], np.float32).reshape(-1, 5)

    boxes = [one(0)] * 80 + [one(0, 1)] * 16 + [one(2)] * 4 + [None]
    factors = np.array(repeat_factors(boxes, 3, threshold=0.25))
    share = np.array([96, 16, 4]) / 101
    want = np.sqrt(0.25 / share).clip(1)
    np.testing.assert_allclose(factors[[0, 80, 96, 100]], [1, want[1], want[2], 1])
    assert set(repeat_factors(boxes, 3, 0.0)) == {1.0}


def test_an_epoch_with_repeat_factors_has_a_fixed_length_and_the_right_means():
    factors = tuple([1.0] * 20 + [1.4] * 10 + [2.5] * 6)
    counts = np.zeros(36)
    for epoch in range(400):
        order = epoch_order(0, "labelled", epoch, factors)
        assert len(order) == 49
        own = np.bincount(order, minlength=36)
        assert (own >= np.floor(np.array(factors)) - 1e-9).all() and (own <= np.ceil(np.array(factors))).all()
        counts += own
    np.testing.assert_allclose(counts / 400, factors, atol=0.1)
    sampler = StepSampler({"labelled": factors}, {"labelled": 16}, 0, 0, 49, plain_from=99)
    drawn = np.bincount([d.image for b in sampler for d in b], minlength=36)
    assert drawn.sum() == 16 * 49 and drawn[30:].mean() > 2.2 * drawn[:20].mean()
    halves = [
        list(StepSampler({"labelled": factors}, {"labelled": 16}, 0, 0, 9, 99, rank=r, world_size=2)) for r in (0, 1)
    ]
    for step, whole in enumerate(list(sampler)[:9]):
        assert sorted(halves[0][step] + halves[1][step]) == sorted(whole)


def test_the_report_says_how_often_each_class_is_labelled_and_seen(tmp_path):
    from dfssd.data.manifest import Manifest, Row
    from dfssd.report.html import repeat_threshold
    from dfssd.report.tables import balance_rows

    def row(k, *classes):
        boxes = np.array([[c, 0.5, 0.5, 0.1, 0.1] for c in classes], np.float32).reshape(-1, 5)
        return Row(f"{k:03d}", "", 64, 64, "train", True, k, boxes)

    manifest = Manifest([row(k, 0) for k in range(9)] + [row(9, 0, 1, 1)], ["common", "rare", "none"], {})
    header, rows = balance_rows(manifest, 0.4)
    assert header[0] == "class" and rows[0] == ["common", "10", "100.0%", "10", "1.10"]
    assert rows[1] == ["rare", "1", "10.0%", "2", "2.00"] and rows[2] == ["none", "0", "0.0%", "0", "-"]

    run = Storage(str(tmp_path))  # `dfssd evaluate` has no --repeat-threshold: what counts is what was trained
    for name, trained in (("teacher", 0.1), ("student", 0.4)):
        run.write_json(f"{name}/stage.json", {"config": {"train": {"repeat_threshold": trained}}})
    measured = {name: {"test": {}} for name in ("student", "teacher")}
    assert repeat_threshold(run, measured) == 0.4
    assert repeat_threshold(run, {"teacher": measured["teacher"]}) == 0.1
