"""From candidates to targets, on the CPU: stored candidates and those of a teacher inside the loop alike."""

import numpy as np
import pytest
import torch
from loss_numbers import CASES, differences

from dfssd.data.boxes import SCORE
from dfssd.pseudo.selection import NO_CANDIDATE, Rules, from_detections, labels, or_no_candidate, select, targets_of

TAU = torch.tensor([0.5, 0.3])


def _one(cls, score, agreement=1.0):
    return [cls, 0.5, 0.4, 0.2, 0.1, score, agreement]


def _candidates():
    rows = [[_one(0, 0.6), _one(0, 0.4), _one(1, 0.4, 0.2)], [], [_one(1, 0.2)], [_one(0, NO_CANDIDATE), _one(0, 0.9)]]
    return [np.array(r, np.float32).reshape(-1, 7) for r in rows]


def test_sure_uncertain_and_silent():
    got = select(_candidates(), TAU, Rules(score_power=2.0, agreement_min=0.5))
    t = got.targets
    assert t.valid.sum(1).tolist() == [2, 0, 0, 1] and t.cls[0, :2].tolist() == [0, 1]
    torch.testing.assert_close(t.weight[0, :2], torch.tensor([0.36, 0.16]))
    torch.testing.assert_close(t.box_weight[0, :2], torch.tensor([0.36, 0.0]))  # the second moved under flips
    # An area without candidates is ignored like an uncertain box, but counts as none, and teaches no policy.
    assert (t.ignored_xywh[..., 2] > 0).sum(1).tolist() == [1, 0, 1, 1] and t.silent.tolist() == [
        False,
        True,
        False,
        False,
    ]
    assert got.counts.tolist() == [3, 2, 1]
    assert got.count_c.tolist() == [3, 2] and got.score_sum_c.tolist() == pytest.approx([1.9, 0.6])
    background = select(_candidates(), TAU, Rules(uncertain_ignored=False)).targets
    assert background.ignored_xywh.shape[1] == 0 and not background.silent.any()


def test_the_layout_is_padded_to_places_that_repeat():
    many = [np.array([_one(0, 0.9)] * n, np.float32).reshape(-1, 7) for n in (0, 9, 3)]
    assert select(many, TAU, Rules()).targets.cls.shape == (3, 16)
    assert select(many[:1], TAU, Rules()).targets.cls.shape == labels([np.zeros((0, 5))]).cls.shape == (1, 8)
    assert select([], TAU, Rules()).targets.cls.shape == (0, 8)


def test_a_collated_batch_says_the_same_as_its_images_one_by_one():
    candidates = [or_no_candidate(c) for c in _candidates()]
    people = [np.array([[1, 0.3, 0.3, 0.2, 0.2]], np.float32), np.zeros((0, 5), np.float32)]
    full = [np.concatenate([p, np.ones((len(p), 2), np.float32)], 1) for p in people] + candidates
    rows = torch.from_numpy(np.concatenate(full))
    batch = {
        "cls": rows[:, 0],
        "bboxes": rows[:, 1:5],
        "score": rows[:, 5],
        "agreement": rows[:, 6],
        "batch_idx": torch.arange(6.0).repeat_interleave(torch.tensor([len(f) for f in full])),
        "img": torch.zeros(6),
    }
    got, want = targets_of(batch, 2, TAU, Rules()), select(candidates, TAU, Rules())
    for name, value in vars(want.targets).items():
        assert torch.equal(getattr(got.boxes, name)[2:], value), name
        if name != "ignored_xywh":
            assert torch.equal(getattr(got.boxes, name)[:2], getattr(labels(people), name)), name
    assert torch.equal(got.counts, want.counts) and got.labelled == 2 and got.pseudo
    assert got.boxes.silent.tolist() == [False, False, False, True, False, False]
    without = targets_of(batch, 2, None, Rules())
    assert not without.pseudo and without.boxes.silent.tolist() == [False] * 2 + [True] * 4


def test_what_a_teacher_finds_inside_the_loop_is_chosen_alike():
    found = [torch.tensor([[16.0, 8, 48, 24, 0.9, 1]]), torch.zeros(0, 6), torch.tensor([[0.0, 0, 64, 32, 0.2, 0]] * 2)]
    candidates = from_detections(found, height_px=32, width_px=64)
    assert [len(c) for c in candidates] == [1, 0, 2]
    np.testing.assert_allclose(candidates[0], [[1, 0.5, 0.5, 0.5, 0.5, 0.9, 1]])
    targets = select(candidates, TAU, Rules()).targets
    assert targets.valid.sum(1).tolist() == [1, 0, 0] and targets.silent.tolist() == [False, True, False]
    assert (targets.ignored_xywh[2, :2] == torch.tensor([0.5, 0.5, 1, 1])).all()
    assert from_detections([], 32, 64) == [] or len(from_detections([], 32, 64)[0]) == 0


def test_a_marked_image_is_what_an_empty_one_is():
    silent = or_no_candidate(np.zeros((0, 7), np.float32))
    assert silent[0, SCORE] == NO_CANDIDATE and select([silent], TAU, Rules()).targets.silent.all()
    kept = np.array([_one(0, 0.9)], np.float32)
    assert or_no_candidate(kept) is kept


@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_those_of_before(case):
    """Made at commit 4795be4. Sums over boxes run in another order now, which moves the last bit; other processors round
    otherwise in the networks: by 5e-4 where features of a fresh network, which hardly vary, are standardised (AVX2 and SSE
    against AVX-512)."""
    worst = differences(case)
    assert all(value < (2e-3 if key.startswith("feat/") else 2e-4) for key, value in worst.items()), worst
