"""Task-aligned assignment on padded boxes: Ultralytics' choice bit by bit, and a plain reference in float64."""

import math

import pytest
import torch
from ultralytics.utils.tal import TaskAlignedAssigner

from dfssd.models.anchors import anchors_of
from dfssd.models.yolo import assigner
from dfssd.models.yolo.assigner import AssignmentInputs, Rule, assign
from dfssd.models.yolo.detection_loss import decoded, distribution_focal

SIDE, CLASSES = 96, 3


def _case(seed, images=3, places=24, boxes=17):
    """Many boxes that want the same points, thin and tiny ones among them; padding at the end."""
    g = torch.Generator().manual_seed(seed)
    anchors = anchors_of([torch.zeros(1, 1, SIDE // k, SIDE // k) for k in (8, 16, 32)], (8.0, 16.0, 32.0))
    points = anchors.points_a2 * anchors.strides_a1
    centre, size = (
        SIDE * (0.2 + 0.6 * torch.rand(images, places, 2, generator=g)),
        torch.rand(images, places, 2, generator=g),
    )
    size = torch.where(torch.arange(places)[None, :, None] % 5 == 0, 3 * size, 8 + 60 * size)
    low, high = (centre - size / 2).clamp(0), (centre + size / 2).clamp(max=SIDE)
    valid = (torch.arange(places) < boxes).expand(images, -1).clone()
    valid[1:2, 4:] = False
    truth = torch.where(valid[..., None], torch.cat([low, high], -1), 0.0)
    cls = torch.where(valid, torch.randint(0, CLASSES, (images, places), generator=g), 0)
    half = 4 + 28 * torch.rand(images, len(points), 2, generator=g)
    predicted = torch.cat([points - half, points + half], -1)
    return torch.rand(images, CLASSES, len(points), generator=g), predicted, points, cls, truth, valid


@pytest.mark.parametrize("topk", [(10, None), (7, 1)], ids=["one to many", "one to one"])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_ultralytics_choice_bit_by_bit(seed, topk, monkeypatch):
    scores, predicted, points, cls, truth, valid = _case(seed)
    theirs = TaskAlignedAssigner(topk[0], CLASSES, 0.5, 6.0, [8, 16, 32], topk2=topk[1])
    _, _, targets, foreground, index = theirs(
        scores.movedim(1, 2), predicted, points, cls[..., None], truth, valid[..., None].float()
    )
    for pairs in (assigner.PAIRS, 1):  # all images at once, and one by one
        monkeypatch.setattr(assigner, "PAIRS", pairs)
        got = assign(AssignmentInputs(scores, predicted, cls, truth, valid), points, Rule.of(theirs))
        assert torch.equal(got.foreground, foreground) and torch.equal(got.box[foreground], index[foreground])
        assert torch.equal(got.score, targets.sum(-1)) and foreground.sum() > 20


def test_scores_against_a_plain_reference_in_float64():
    """Of a single box: its ten best points, score = metric / best metric x best overlap."""
    scores, predicted, points, cls, truth, valid = _case(5, images=1, places=8, boxes=1)
    truth[0, 0] = torch.tensor([20.0, 24.0, 70.0, 80.0])
    got = assign(AssignmentInputs(scores, predicted, cls, truth, valid), points, Rule(10, 10, 0.5, 6.0, 16.0))

    def ciou(a, b):
        ax, ay, aw, ah = (a[0] + a[2]) / 2, (a[1] + a[3]) / 2, a[2] - a[0], a[3] - a[1]
        bx, by, bw, bh = (b[0] + b[2]) / 2, (b[1] + b[3]) / 2, b[2] - b[0], b[3] - b[1]
        inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        iou = inter / (aw * ah + bw * bh - inter)
        diagonal = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2
        v = 4 / math.pi**2 * (math.atan(bw / bh) - math.atan(aw / ah)) ** 2
        return iou - ((ax - bx) ** 2 + (ay - by) ** 2) / diagonal - v * v / (1 - iou + v)

    box, rows = truth[0, 0].tolist(), []
    for k, (x, y) in enumerate(points.tolist()):
        if box[0] < x < box[2] and box[1] < y < box[3]:
            overlap = max(0.0, ciou(box, predicted[0, k].tolist()))
            rows.append((float(scores[0, int(cls[0, 0]), k]) ** 0.5 * overlap**6, overlap, k))
    best = sorted(rows, reverse=True)[:10]
    want = torch.zeros(len(points), dtype=torch.float64)
    for metric, _, k in best:
        want[k] = metric / best[0][0] * max(overlap for _, overlap, _ in best)
    torch.testing.assert_close(got.score[0].double(), want, rtol=2e-4, atol=1e-6)


def test_gradients_of_the_box_terms_against_finite_differences():
    g = torch.Generator().manual_seed(0)
    bins = torch.randn(1, 2, 4 * 16, generator=g, dtype=torch.float64, requires_grad=True)
    wanted = 1 + 12 * torch.rand(1, 2, 4, generator=g, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: distribution_focal(x, wanted, 16), (bins,))
    points = torch.rand(1, 2, 2, generator=g, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: decoded(x, points, 16), (bins,))
