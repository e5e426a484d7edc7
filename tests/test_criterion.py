"""The sum of terms: what an unlabelled image may say, and that workers do not matter."""

import pytest
import torch
from small import terms_of

from dfssd.config import Distill
from dfssd.distill import criterion as criterion_module
from dfssd.distill.criterion import Criterion, joined, schedule
from dfssd.models.yolo.detection_loss import DetectionLoss
from dfssd.models.yolo.detector import Teacher, build_detector
from dfssd.models.yolo.pair import pair
from dfssd.pseudo.selection import Rules, targets_of
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train.student import Student

NAMES = ["a", "b", "c"]


def _parts(**settings):
    torch.manual_seed(0)
    detector = build_detector("yolov8n.yaml", NAMES, 64)
    teacher = Teacher(build_detector("yolov8s.yaml", NAMES, 64), torch.device("cpu"))
    config = Distill(**{"balance": "none", **settings})
    student = Student(detector, teacher.channels, generators=config.divergence == "mgd").train()
    pairing = pair(teacher, detector.model[-1], NAMES, config.prediction)
    generators = student.projections.generators
    criterion = Criterion(DetectionLoss(detector), config, WorkerGroup(), pairing, generators)
    return student, teacher, criterion


def _batch(score=0.9, candidates=True):
    """Two labelled images, two unlabelled ones; the last has no candidate."""
    image = [0.0, 1.0, 2.0] if candidates else [0.0, 1.0]
    n = len(image)
    return {
        "cls": torch.tensor([0.0, 1.0, 2.0][:n]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.5, 0.5]] * n),
        "batch_idx": torch.tensor(image),
        "score": torch.tensor([1.0, 1.0, score][:n]),
        "agreement": torch.ones(n),
        "img": torch.zeros(4),
    }


def _targets(batch, config, labelled=2):
    return targets_of(batch, labelled, torch.full((3,), 0.5), Rules.of(config))


def _run(batch, progress=0.0, **settings):
    student, teacher, criterion = _parts(**settings)
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    out = student(images)
    out.raw["one2many"].scores.retain_grad()
    terms = terms_of(criterion, out, teacher(images), _targets(batch, criterion.config), progress)
    return student, out.raw["one2many"], terms


def test_all_terms_are_there_by_name_and_reach_their_weights():
    student, _, terms = _run(_batch())
    parts = {f"{t}/{p}" for t in ("sup", "pse") for p in ("box", "cls", "dfl")}
    assert set(terms.losses) == parts | {"pred/cls", "pred/loc", f"feat/{Distill().divergence}"}
    assert all(torch.isfinite(v) for v in terms.losses.values())
    terms.total().backward()
    assert student.detector.model[0].conv.weight.grad.abs().sum() > 0
    assert all(p.weight.grad.abs().sum() > 0 for p in student.projections.convs)


def _pse_grad(batch):
    _, raw, terms = _run(batch)
    sum(v for k, v in terms.losses.items() if k.startswith("pse")).backward()
    return raw.scores.grad.abs().sum(1), terms


def test_an_image_without_candidates_says_nothing():
    grad, _ = _pse_grad(_batch())
    assert grad[2].sum() > 0 and grad[3].sum() == 0 and grad[:2].sum() == 0
    _, _, terms = _run(_batch(candidates=False))
    assert all(float(v.detach()) == 0 for k, v in terms.losses.items() if k.startswith("pse"))


def test_an_uncertain_box_teaches_neither_defect_nor_background():
    sure, terms_sure = _pse_grad(_batch(score=0.9))
    unsure, terms_unsure = _pse_grad(_batch(score=0.3))
    assert terms_sure.counts["pse/pseudo_labels"] == 1 and terms_unsure.counts["pse/uncertain"] == 1
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:6, 2:6] = True  # the box on the stride-8 grid
    level = unsure[2][:64].view(8, 8)
    assert (level[inside] == 0).all() and (level[~inside] > 0).all()
    assert (sure[2][:64].view(8, 8)[inside] > 0).all()
    assert terms_unsure.losses["pse/box"] == 0


def test_background_of_unlabelled_images_never_outweighs_the_labels():
    """An uncertain box and no pseudo-label: the image teaches background alone, which its own target scores do not divide."""
    student, _, criterion = _parts(lambda_p=0, lambda_l=0, lambda_f=0)
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    measured = criterion.measure(student(images), None, _targets(_batch(score=0.3), criterion.config), 0.0)
    background = measured.sums["pse"][0][0, 1]

    def pse_cls(labels, pseudo, ratio=1.0):
        criterion.config = criterion.config.model_copy(update={"unlabelled_ratio": ratio})
        totals = measured.parts | {"sup": torch.tensor([labels]), "pse": torch.tensor([pseudo])}
        terms = criterion.terms(measured, totals, 0.0).losses
        torch.testing.assert_close(terms["sup/cls"], measured.sums["sup"][0][0, 1] / max(labels, 1))
        return terms["pse/cls"]

    assert background > 0
    for labels, pseudo, ratio, divisor in (
        (40, 35, 1, 35),
        (40, 2, 1, 20),
        (40, 0, 1, 20),
        (40, 2, 3, 60),
        (0, 0.5, 1, 1),
    ):
        torch.testing.assert_close(pse_cls(float(labels), float(pseudo), float(ratio)), background / divisor)


def test_score_power_weights_the_pseudo_label():
    _, _, hard = _run(_batch(0.6), score_power=0.0)
    _, _, soft = _run(_batch(0.6), score_power=2.0)
    torch.testing.assert_close(soft.losses["pse/box"], hard.losses["pse/box"] * 0.36)


def test_a_box_that_moved_under_flips_teaches_its_class_but_not_its_place():
    batch = _batch(0.9)
    batch["agreement"] = torch.tensor([1.0, 1.0, 0.4])
    _, _, terms = _run(batch, agreement_min=0.6)
    _, _, free = _run(batch, agreement_min=0.0)
    assert terms.losses["pse/box"] == 0 and terms.losses["pse/dfl"] == 0 and terms.counts["pse/without_box_term"] == 1
    assert free.losses["pse/box"] > 0 and free.counts["pse/without_box_term"] == 0
    torch.testing.assert_close(terms.losses["pse/cls"], free.losses["pse/cls"])
    batch["agreement"][:] = 0.6  # the limit itself is enough
    assert _run(batch, agreement_min=0.6)[2].losses["pse/box"] > 0
    batch["agreement"][:] = 0.0  # labels of people are never gated
    torch.testing.assert_close(_run(batch, agreement_min=0.6)[2].losses["sup/box"], free.losses["sup/box"])


def test_a_pseudo_label_of_weight_zero_is_absent():
    """score**gamma underflows to 0: then the box claims no anchor's class, box or DFL term."""
    sure, _ = _pse_grad(_batch(score=0.9))
    _, raw, terms = _run(_batch(score=0.9), score_power=3000.0)
    raw.boxes.retain_grad()
    sum(v for k, v in terms.losses.items() if k.startswith("pse")).backward()
    inside = sure[2] > 0
    assert terms.losses["pse/box"] == 0 and terms.losses["pse/dfl"] == 0 and inside.any()
    _, _, background = _run(_batch(score=0.3), uncertain="background")
    assert terms.losses["pse/cls"] < background.losses["pse/cls"]  # its anchors are not background either


def test_an_uncertain_box_as_background_is_what_it_says():
    """The ablation: below the threshold means 'no defect here', also in an image without candidates."""
    _, raw, terms = _run(_batch(score=0.3), uncertain="background")
    sum(v for k, v in terms.losses.items() if k.startswith("pse")).backward()
    grad = raw.scores.grad.abs().sum(1)
    assert (grad[2:] > 0).all() and terms.counts["pse/pseudo_labels"] == 0


def test_the_area_of_a_silent_image_in_a_mosaic_is_unknown():
    """A box of score 0 marks it: no gradient inside, no vote in the thresholds, not counted as uncertain."""
    batch = _batch(score=0.0)
    grad, _ = _pse_grad(batch)
    assert (grad == 0).all()  # nothing but a silent image in the whole sample
    batch = {
        k: torch.cat([v, v[-1:]]) if k != "img" else v for k, v in batch.items()
    }  # a silent quarter beside an image with a candidate
    batch["score"][-1], batch["bboxes"][-1] = 0.9, torch.tensor([0.1, 0.1, 0.1, 0.1])
    grad, terms = _pse_grad(batch)
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:6, 2:6] = True
    level = grad[2][:64].view(8, 8)
    assert (level[inside] == 0).all() and (level[~inside] > 0).all() and terms.counts["pse/uncertain"] == 0
    assert (_targets(_batch(score=0.0), Distill()).policy == 0).all()


def test_a_weight_of_zero_switches_a_term_off():
    _, _, terms = _run(_batch(), lambda_u=0.0, lambda_p=0.0, lambda_l=0.0, lambda_f=0.0)
    assert {k.split("/")[0] for k in terms.losses} == {"sup"}


@pytest.mark.parametrize("key", ["lambda_u", "lambda_p", "lambda_l", "lambda_f"])
def test_weights_are_linear(key):
    name = {
        "lambda_u": "pse/cls",
        "lambda_p": "pred/cls",
        "lambda_l": "pred/loc",
        "lambda_f": f"feat/{Distill().divergence}",
    }[key]
    one, three = _run(_batch(), **{key: 1.0})[2], _run(_batch(), **{key: 3.0})[2]
    torch.testing.assert_close(three.losses[name], one.losses[name] * 3)


def test_schedule_of_the_feature_term():
    constant, cosine = Distill(), Distill(feature_schedule="cosine")
    off = Distill(feature_schedule="off_last_epochs", off_last=0.25)
    assert schedule(constant, 0.7) == 1 and schedule(cosine, 0) == 1
    assert schedule(cosine, 1) == pytest.approx(0.1) and schedule(cosine, 0.5) == pytest.approx(0.55)
    assert schedule(off, 0.74) == 1 and schedule(off, 0.75) == 0 and schedule(off, 1) == 0
    name = f"feat/{Distill().divergence}"
    start, end = _run(_batch(), 0.0, feature_schedule="cosine")[2], _run(_batch(), 1.0, feature_schedule="cosine")[2]
    torch.testing.assert_close(end.losses[name], start.losses[name] * 0.1)
    _, _, paused = _run(_batch(), 0.95, feature_schedule="off_last_epochs")
    assert "feat" in paused.silent and not [k for k in paused.losses if k.startswith("feat")]


class _FakeWorld(WorkerGroup):
    """Stands for two workers: adds what the other one would have sent, recorded beforehand."""

    def __init__(self, others):
        object.__setattr__(self, "rank", 0)
        object.__setattr__(self, "size", 2)
        object.__setattr__(self, "others", list(others))

    def sum(self, tensor):
        return tensor + self.others.pop(0)


class _Recorder(WorkerGroup):
    def __init__(self):
        object.__setattr__(self, "rank", 0)
        object.__setattr__(self, "size", 2)
        object.__setattr__(self, "seen", [])

    def sum(self, tensor):
        self.seen.append(tensor.clone())
        return tensor


@pytest.mark.parametrize(
    "settings",
    [
        {"divergence": "hw_js"},
        {"divergence": "pkd", "prediction": "mse", "box_loss": "inner_focaler_eiou"},
        {"divergence": "score_l2"},
    ],
    ids=lambda s: s["divergence"],
)
def test_two_workers_add_up_to_one(settings, monkeypatch):
    layers = []  # what the weights of the layers are made from: must be the global batch's on every worker
    monkeypatch.setattr(
        criterion_module, "joined", lambda kind, s, v: (layers.append(v.clone()), joined(kind, s, v))[1]
    )
    box_loss = settings.pop("box_loss", "ciou") if "box_loss" in settings else "ciou"
    config = Distill(**{"balance": "none", **settings})
    student, teacher, one = _parts(**settings)
    student.eval()  # batch norm must not differ between halves
    student.detector.model[-1].training = True
    g = torch.Generator().manual_seed(1)
    images = torch.rand(4, 3, 64, 64, generator=g)
    # Enough boxes, and a teacher sure enough of itself, that no normaliser is held at 1: there, sharing it would not show.
    image = torch.arange(4.0).repeat_interleave(torch.tensor([40, 10, 15, 35]))
    size = 0.3 + 0.4 * torch.rand(100, 2, generator=g)
    batch = {
        "cls": torch.randint(0, 3, (100,), generator=g).float(),
        "bboxes": torch.cat([torch.full((100, 2), 0.5) + 0.2 * torch.rand(100, 2, generator=g), size], 1),
        "batch_idx": image,
        "score": torch.where(image < 2, torch.ones(100), 0.9),
        "agreement": torch.ones(100),
        "img": torch.zeros(4),
    }
    for conv in teacher.model.model[-1].cv3:
        conv[-1].bias.data += 6

    def terms(workers, rows, sub, labelled):
        criterion = Criterion(DetectionLoss(student.detector, box_loss), config, workers, one.pairing)
        targets = targets_of(sub, labelled, torch.full((3,), 0.3), Rules.of(config))
        return terms_of(criterion, student(images[rows]), teacher(images[rows]), targets, 0.0)

    alone = terms(WorkerGroup(), [0, 1, 2, 3], batch, 2)
    shards = []
    for rank in (0, 1):  # worker 0: labelled 0, unlabelled 2; worker 1: labelled 1, unlabelled 3
        keep = (image == rank) | (image == rank + 2)
        sub = {k: v[keep] if k != "img" else v[:2] for k, v in batch.items()}
        sub["batch_idx"] = (sub["batch_idx"] >= 2).float()
        shards.append(([rank, rank + 2], sub))
    recorders = [_Recorder(), _Recorder()]
    for recorder, (rows, sub) in zip(recorders, shards, strict=True):
        terms(recorder, rows, sub, 1)
    seen = [max(r.seen, key=len) for r in recorders]
    totals = seen[0][:3] + seen[1][:3]
    assert (totals > 1).all(), f"normalisers of sup, pse, pred: {totals}"
    both = [terms(_FakeWorld(recorders[1 - k].seen), rows, sub, 1) for k, (rows, sub) in enumerate(shards)]
    for name, want in alone.losses.items():
        got = both[0].losses[name] + both[1].losses[name]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=name)
    for values in layers[-2:]:
        torch.testing.assert_close(values, layers[0], rtol=1e-4, atol=1e-6)
