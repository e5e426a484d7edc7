"""Weighted box fusion and agreement, against a plain reading of the definition."""

import numpy as np
import pytest

from dfssd.data.boxes import corners, iou, unflip
from dfssd.pseudo.fusion import FLIPS, fuse


def _box(cls, x1, y1, x2, y2, score):
    return [cls, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, score, 1.0]


def _view(*boxes):
    return np.array(boxes, np.float32).reshape(-1, 7)


def test_iou_against_a_plain_loop():
    rng = np.random.default_rng(0)
    a, b = (np.concatenate([low, low + rng.uniform(0.01, 0.5, low.shape)], 1) for low in rng.random((2, 7, 2)))
    got = iou(a, b)
    for i, p in enumerate(a):
        for j, q in enumerate(b):
            width = max(0.0, min(p[2], q[2]) - max(p[0], q[0]))
            height = max(0.0, min(p[3], q[3]) - max(p[1], q[1]))
            union = (p[2] - p[0]) * (p[3] - p[1]) + (q[2] - q[0]) * (q[3] - q[1]) - width * height
            assert got[i, j] == pytest.approx(width * height / union)


def test_one_view_passes_through_with_agreement_one():
    view = _view(_box(0, 0.1, 0.1, 0.3, 0.3, 0.4), _box(1, 0.1, 0.1, 0.3, 0.3, 0.9), _box(0, 0.6, 0.6, 0.7, 0.7, 0.02))
    out = fuse([view], 0.55, floor=0.05, most=10)
    assert out[:, 5].tolist() == pytest.approx([0.9, 0.4]) and (out[:, 6] == 1).all()


def test_a_box_seen_in_all_views_is_their_mean_weighted_by_score():
    a, b = _box(0, 0.10, 0.10, 0.30, 0.30, 0.8), _box(0, 0.12, 0.10, 0.32, 0.30, 0.4)
    (out,) = fuse([_view(a), _view(b)], 0.55, 0.05, 10)
    x1 = (0.8 * 0.10 + 0.4 * 0.12) / 1.2
    np.testing.assert_allclose(corners(out[None])[0], [x1, 0.10, x1 + 0.2, 0.30], atol=1e-6)
    assert out[5] == pytest.approx(0.6)  # mean over views
    shift = [abs(0.10 - x1), abs(0.12 - x1)]
    want = np.mean([(0.2 - s) / (0.2 + s) for s in shift])
    assert out[6] == pytest.approx(want, rel=1e-5)


def test_a_box_that_few_views_saw_loses_score_and_agreement():
    seen = _view(_box(2, 0.1, 0.1, 0.5, 0.5, 0.8))
    empty = _view()
    (out,) = fuse([seen, empty, empty, empty], 0.55, 0.05, 10)
    assert out[5] == pytest.approx(0.2) and out[6] == pytest.approx(0.25)
    assert len(fuse([seen, empty, empty, empty], 0.55, 0.25, 10)) == 0  # below the floor


def test_classes_never_mix_and_a_view_counts_once():
    same_place = [_box(c, 0.1, 0.1, 0.3, 0.3, 0.9) for c in (0, 1)]
    out = fuse([_view(*same_place), _view(*same_place)], 0.55, 0.05, 10)
    assert sorted(out[:, 0].tolist()) == [0, 1] and out[:, 5].tolist() == pytest.approx([0.9, 0.9])
    twice = _view(_box(0, 0.1, 0.1, 0.3, 0.3, 0.9), _box(0, 0.11, 0.1, 0.31, 0.3, 0.8))
    out = fuse([twice, _view(_box(0, 0.1, 0.1, 0.3, 0.3, 0.7))], 0.55, 0.05, 10)
    assert len(out) == 1 and out[0, 5] == pytest.approx(0.8)  # (0.9 + 0.7) / 2: the double adds nothing


def test_at_most_so_many_and_best_first():
    boxes = [_box(0, 0.1 * k, 0.0, 0.1 * k + 0.05, 0.05, 0.1 + 0.08 * k) for k in range(9)]
    out = fuse([_view(*boxes), _view(*boxes)], 0.55, 0.05, 4)
    assert len(out) == 4 and (np.diff(out[:, 5]) <= 0).all() and out[0, 5] == pytest.approx(0.74)


@pytest.mark.parametrize("flip", FLIPS)
def test_unflip_is_its_own_inverse_and_moves_the_centre(flip):
    box = _view(_box(1, 0.1, 0.2, 0.3, 0.6, 0.5))
    turned = unflip(box, *flip)
    np.testing.assert_allclose(unflip(turned, *flip), box)
    assert turned[0, 1] == pytest.approx(0.8 if flip[0] else 0.2) and turned[0, 2] == pytest.approx(
        0.6 if flip[1] else 0.4
    )
