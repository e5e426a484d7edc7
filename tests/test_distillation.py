"""Teacher and student together: taps, families, the online teacher, the automatic balance."""

import pytest
import torch
from small import give_teacher_and_candidates, make_job, terms_of, tiny_config
from torch import nn

from dfssd.config import Distill
from dfssd.distill.balance import EVERY, Balance
from dfssd.distill.criterion import Criterion
from dfssd.distill.features import KINDS
from dfssd.errors import DfssdError
from dfssd.models.yolo.detection_loss import DetectionLoss
from dfssd.models.yolo.detector import Teacher, build_detector, detector_bytes, read_detector
from dfssd.models.yolo.pair import pair
from dfssd.models.yolo.taps import Taps
from dfssd.pseudo.selection import Rules, targets_of
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train import guards
from dfssd.train.build import build_session
from dfssd.train.in_process import train_in_process
from dfssd.train.student import Student

NAMES = ["a", "b", "c"]
CPU = torch.device("cpu")
PUBLISHED = (2, 4, 6, 8, 12, 15, 18, 21)
PAIRS = [
    ("yolov8s.yaml", "yolov8n.yaml", (), ()),
    ("yolov8s.yaml", "yolov8n.yaml", PUBLISHED, ()),
    ("yolo11s.yaml", "yolo11n.yaml", (), ()),
    ("yolo26s.yaml", "yolo26n.yaml", (), ()),
    ("yolo26s.yaml", "yolo26n.yaml", (16, 19, 22), ()),
    ("yolo11s.yaml", "yolov8n.yaml", (), ()),
    ("yolo11s.yaml", "yolov8n.yaml", (4, 15, 18), (4, 16, 22)),  # the last pair differs in size
    ("yolo26s.yaml", "yolov8n.yaml", (), ()),
    ("yolov8s.yaml", "yolo26n.yaml", (), ()),
]


def _batch():
    return {
        "cls": torch.tensor([0.0, 1.0, 2.0]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.5, 0.5]] * 3),
        "batch_idx": torch.tensor([0.0, 1.0, 2.0]),
        "score": torch.tensor([1.0, 1.0, 0.9]),
        "agreement": torch.ones(3),
        "img": torch.zeros(4),
    }


def _targets(batch=None, classes=3):
    return targets_of(batch or _batch(), 2, torch.full((classes,), 0.5), Rules())


def _together(teacher_spec, student_spec, taps=(), teacher_taps=(), names=NAMES, teacher_names=NAMES, **settings):
    torch.manual_seed(0)
    config = Distill(**{"balance": "none", **settings})
    detector = build_detector(student_spec, names, 64)
    teacher = Teacher(build_detector(teacher_spec, teacher_names, 64), CPU, teacher_taps or taps)
    pairing = pair(teacher, detector.model[-1], names, config.prediction)
    student = Student(detector, teacher.channels, taps, config.divergence == "mgd").train()
    criterion = Criterion(DetectionLoss(detector), config, WorkerGroup(), pairing, student.projections.generators)
    return student, teacher, criterion, pairing


def _follow(balance, terms, neck):
    """A step of one micro-batch."""
    if balance.due:
        balance.follow(balance.names(terms), balance.squared_norms(terms, neck))
    balance.advance()


@pytest.mark.parametrize(("teacher_spec", "student_spec", "taps", "teacher_taps"), PAIRS)
def test_a_pair_of_families(teacher_spec, student_spec, taps, teacher_taps):
    student, teacher, criterion, pairing = _together(teacher_spec, student_spec, taps, teacher_taps)
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    out, said = student(images), teacher(images)
    assert len(out.taps) == len(said.taps) == (len(taps) or 3)
    for mine, brought, other in zip(out.taps, out.projected, said.taps, strict=True):
        assert brought.shape[1] == other.shape[1] and brought.shape[2:] == mine.shape[2:] and mine.requires_grad
        assert not other.requires_grad
    both = {"one2many", "one2one"}
    assert set(pairing.branches) == (both if "26" in teacher_spec and "26" in student_spec else {"one2many"})
    assert pairing.bins == (("26" in teacher_spec) == ("26" in student_spec))
    terms = terms_of(criterion, out, said, _targets(), 0.0)
    assert {"pred/cls", "pred/loc", f"feat/{Distill().divergence}"} <= set(terms.losses)
    first = next(p for p in student.parameters() if p.requires_grad)
    norms = guards.check_reach(terms.losses, out, first, terms.silent)
    assert all(norms[k] > 0 for k in ("sup", "pse", "pred", "feat"))
    terms.total().backward()
    before = [c.weight.detach().clone() for c in student.projections.convs]
    torch.optim.SGD(student.parameters(), 0.01).step()
    assert all((c.weight != w).any() for c, w in zip(student.projections.convs, before, strict=True))
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    saved = read_detector(detector_bytes(student.detector, {}), "x") if not taps else None
    assert saved is None or not any(m._forward_hooks for m in saved.modules())


def test_an_end_to_end_student_is_taught_in_both_branches():
    """Each head learns from the teacher's head of the same kind; a teacher without one leaves the other alone."""
    for teacher_spec, taught in (("yolo26s.yaml", True), ("yolov8s.yaml", False)):
        student, teacher, criterion, _ = _together(teacher_spec, "yolo26n.yaml")
        images = torch.rand(4, 3, 64, 64)
        out = student(images)
        losses = terms_of(criterion, out, teacher(images), _targets(), 0.0).losses
        grads = torch.autograd.grad(
            losses["pred/cls"], [out.raw[b].scores for b in ("one2many", "one2one")], allow_unused=True
        )
        assert grads[0].abs().sum() > 0 and (grads[1] is not None) == taught


@pytest.mark.parametrize("kind", KINDS)
def test_every_divergence_trains_the_student_through_any_tap(kind):
    student, teacher, criterion, _ = _together(
        "yolov8s.yaml", "yolov8n.yaml", (4, 15, 21), divergence=kind, lambda_p=0, lambda_l=0, lambda_u=0
    )
    images = torch.rand(4, 3, 64, 64)
    losses = terms_of(criterion, student(images), teacher(images), _targets(), 0.0).losses
    losses[f"feat/{kind}"].backward()
    assert student.detector.model[0].conv.weight.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.projections.convs.parameters()) or kind in (
        "pkd", "js", "hw_js", "cwd",  # blind to a shift of a whole channel, so a bias has nothing to learn
    )  # fmt: skip


def test_a_teacher_with_more_classes_teaches_those_of_the_same_name():
    student, teacher, criterion, pairing = _together(
        "yolov8s.yaml", "yolov8n.yaml", names=["c", "a"], teacher_names=["a", "b", "c", "d"], divergence="pkd"
    )
    assert pairing.classes == (2, 0) and "4 classes, 2 of them" in pairing.notes[0]
    for conv in teacher.head.cv3:
        conv[-1].bias.data += torch.arange(4.0)  # untrained, all classes score nearly the same
    said = teacher(torch.rand(4, 3, 64, 64)).raw["one2many"]
    torch.testing.assert_close(pairing.scores(said), said.scores[:, [2, 0]])
    batch = _batch()
    batch["cls"] = torch.tensor([0.0, 1.0, 1.0])
    images = torch.rand(4, 3, 64, 64)
    terms_of(criterion, student(images), teacher(images), _targets(batch, 2), 0.0).total().backward()
    with pytest.raises(DfssdError, match="does not know e") as caught:
        pair(teacher, student.detector.model[-1], ["a", "e"], "soft")
    assert caught.value.todo


def test_raw_mse_needs_heads_of_one_shape():
    with pytest.raises(DfssdError, match="1 bins a side in the teacher, 16 in the student") as caught:
        _together("yolo26s.yaml", "yolov8n.yaml", prediction="mse")
    assert "--prediction soft" in caught.value.todo
    student, teacher, criterion, _ = _together("yolov8s.yaml", "yolov8n.yaml", prediction="mse")
    images = torch.rand(4, 3, 64, 64)
    losses = terms_of(criterion, student(images), teacher(images), _targets(), 0.0).losses
    assert "pred/mse" in losses and "pred/cls" not in losses and "pred/loc" not in losses


def test_a_teacher_of_other_strides_is_refused():
    from ultralytics.nn.tasks import DetectionModel

    model = DetectionModel("yolov8n-p2.yaml", ch=3, nc=3, verbose=False)
    model.names = dict(enumerate(NAMES))
    with pytest.raises(DfssdError, match=r"other strides: \[4.0, 8.0, 16.0, 32.0\] and \[8.0, 16.0, 32.0\]") as caught:
        pair(Teacher(model, CPU), build_detector("yolov8n.yaml", NAMES, 64).model[-1], NAMES, "soft")
    assert "YOLO26" in caught.value.todo


def test_taps_are_what_the_layers_gave_and_leave_no_trace():
    model = build_detector("yolov8n.yaml", NAMES, 64).train()
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    taps = Taps(model, (2, 15, 18, 21), "student")
    assert taps.channels == [32, 64, 128, 256]
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())  # the probe did not touch batch norm
    assert all(m.training for m in model.modules())
    output = model(torch.rand(2, 3, 64, 64))
    for mine, neck in zip(taps.take()[1:], output["feats"], strict=True):
        assert mine is neck
    with pytest.raises(DfssdError, match=r"'feat': no output of layer 2, 15, 18, 21 of the student"):
        taps.take()
    taps.remove()
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(("layer", "message"), [(22, "no layer 22"), (99, "no layer 99"), (-1, "no layer -1")])
def test_taps_that_do_not_exist_are_refused(layer, message):
    model = build_detector("yolov8n.yaml", NAMES, 64)
    with pytest.raises(DfssdError, match=message) as caught:
        Taps(model, (2, layer), "teacher")
    assert "--teacher-taps" in caught.value.todo and not any(m._forward_hooks for m in model.modules())


def test_balance_keeps_each_term_at_its_share():
    torch.manual_seed(0)
    neck = [torch.randn(4, 8, requires_grad=True), torch.randn(4, 2, requires_grad=True)]

    def terms():
        a, b = neck
        return {
            "sup": (a**2).sum() + b.sum(),
            "pred": 1e-4 * (a**3).sum(),
            "feat": 40 * b.exp().sum(),
            "pse": a.sum() * 0,
        }

    def norm(term):
        grads = torch.autograd.grad(term, neck, allow_unused=True, retain_graph=True)
        return torch.stack([g.square().sum() for g in grads if g is not None]).sum().sqrt().item()

    balance = Balance(Distill(balance="gradnorm", share_p=0.5, share_f=0.25, share_u=1.0))
    first = terms()
    _follow(balance, first, neck)
    assert "pse" not in balance.factors  # no pseudo-label, nothing to measure
    for name, share in (("pred", 0.5), ("feat", 0.25)):
        assert balance.factors[name] * norm(first[name]) == pytest.approx(share * norm(first["sup"]), rel=1e-5)
    before = dict(balance.factors)
    neck[0].data *= 2  # what is measured changes; the factors follow, smoothly, and only when it is time to
    for _ in range(EVERY - 1):
        _follow(balance, terms(), neck)
    assert balance.factors == before
    later = terms()
    _follow(balance, later, neck)
    wanted = 0.5 * norm(later["sup"]) / norm(later["pred"])
    assert balance.factors["pred"] == pytest.approx(before["pred"] ** 0.7 * wanted**0.3, rel=1e-5)
    other = Balance(Distill(balance="gradnorm", share_p=0.5, share_f=0.25, share_u=1.0))
    other.load_state_dict(balance.state_dict())
    assert other.factors == balance.factors and other.calls == balance.calls


def test_balance_of_pseudo_labels_is_limited_and_a_share_of_zero_is_off():
    x = torch.ones(3, requires_grad=True)
    balance = Balance(Distill(balance="gradnorm", share_u=1.0, share_p=0.0))
    _follow(balance, {"sup": x.sum(), "pse": 1e-6 * x.sum(), "pred": 1e-6 * x.sum()}, [x])
    assert balance.factors == {"pse": 10.0}


def test_balance_changes_the_losses_and_nothing_else():
    student, teacher, criterion, _ = _together("yolov8s.yaml", "yolov8n.yaml")
    images = torch.rand(4, 3, 64, 64)
    out, said = student(images), teacher(images)
    plain = terms_of(criterion, out, said, _targets(), 0.0).losses
    criterion.balance = Balance(Distill(balance="gradnorm"))
    scaled = terms_of(criterion, out, said, _targets(), 0.0).losses
    for name, value in scaled.items():
        factor = criterion.balance.factors.get(name.split("/")[0], 1.0)
        torch.testing.assert_close(value, plain[name] * factor)
    assert set(criterion.balance.factors) == {"pred", "feat"}


def test_hooks_are_gone_from_what_is_saved(prepared):
    give_teacher_and_candidates(prepared)
    config = tiny_config(prepared, steps=2, taps=(2, 4, 15), divergence="pkd")
    job = make_job("student", str(prepared / "r"), config)
    train_in_process(job)
    for name in ("best.pt", "last.pt"):
        saved = read_detector(job.store.read(name), name)
        assert not any(m._forward_hooks for m in saved.modules())
        assert type(saved).__name__ == "DetectionModel" and not any("projection" in k for k in saved.state_dict())


@pytest.mark.slow  # minutes of compiling
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("taps", [(), (2, 15)])
def test_compiled_networks_give_the_same_losses_and_gradients(prepared, taps):
    """Hooks of tapped layers included."""
    import shutil

    if not shutil.which("c++") and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    give_teacher_and_candidates(prepared)
    losses, gradients = [], []
    for compiled in (False, True):
        config = tiny_config(prepared, steps=1, compile=compiled, unlabelled_ratio=0.5, taps=taps)
        s = build_session(make_job("student", str(prepared / "r"), config), WorkerGroup(), CPU)
        images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        targets = s.targets({**_batch(), "img": images}, 4)
        terms = terms_of(s.criterion, s.wrapped(images), s.teacher(images), targets, 0.0)
        terms.total().backward()
        losses.append({k: v.detach() for k, v in terms.losses.items()})
        gradients.append([p.grad for p in s.student.parameters() if p.requires_grad])
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value, rtol=1e-3, atol=1e-4)
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 1e-2 * one.norm() + 1e-6


def test_projections_are_pairs():
    with pytest.raises(ValueError, match="zip"):
        Student(build_detector("yolov8n.yaml", NAMES, 64), [8, 8])
    assert isinstance(Student(build_detector("yolov8n.yaml", NAMES, 64), [8, 8, 8]).projections, nn.Module)
