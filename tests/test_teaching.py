"""The teacher of a run: online ones, and weights from elsewhere."""

import pytest
import torch
from small import give_teacher_and_candidates, make_job, terms_of, tiny_config

from dfssd.data.dataset import network_input
from dfssd.errors import DfssdError
from dfssd.models.yolo.detector import build_detector, detector_bytes, read_detector
from dfssd.runtime.storage import Storage
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train.build import build_session
from dfssd.train.in_process import train_in_process
from dfssd.train.loop import clip
from dfssd.train.step import forward

NAMES = ["a", "b", "c"]
CPU = torch.device("cpu")
ONLINE = {"teacher_mode": "online", "teacher_lr_factor": 0.5}


def _batch():
    return {
        "cls": torch.tensor([0.0, 1.0, 2.0]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.5, 0.5]] * 3),
        "batch_idx": torch.tensor([0.0, 1.0, 2.0]),
        "score": torch.tensor([1.0, 1.0, 0.9]),
        "agreement": torch.ones(3),
        "img": torch.zeros(8),
    }


@pytest.mark.parametrize(
    ("reached", "changes", "times"),
    [(-1.0, {}, 1), (1.0, {}, 0), (None, {}, 0), (-1.0, {"teacher_mode": "online"}, 0)],
    ids=["passed", "not passed", "unknown", "online"],
)
def test_a_student_that_passes_its_teacher_is_told_once(prepared, capsys, reached, changes, times):
    give_teacher_and_candidates(prepared)
    if reached is not None:
        record = {"summary": {"best": {"map50_95": reached}}}
        Storage(str(prepared / "r")).write_json("teacher/stage.json", record)
    train_in_process(make_job("student", str(prepared / "r"), tiny_config(prepared, steps=4, val_every=2, **changes)))
    assert capsys.readouterr().out.count("better than its teacher") == times


def test_an_online_teacher_trains_on_labels_alone_and_its_average_teaches(prepared):
    give_teacher_and_candidates(prepared)
    job = make_job("student", str(prepared / "r"), tiny_config(prepared, steps=3, lambda_u=0.0, **ONLINE))
    s = build_session(job, WorkerGroup(), CPU)
    start = {k: v.clone() for k, v in s.student.online.state_dict().items()}
    images = torch.rand(8, 3, 64, 64)
    out, said = s.student(images, 4), s.teacher(images)
    assert out.teacher["one2many"].scores.shape[0] == 4 and said.raw["one2many"].scores.shape[0] == 8
    terms = terms_of(s.criterion, out, said, s.targets(_batch(), 4), 0.0)
    taught = [p for p in s.student.online.parameters() if p.requires_grad]
    for name, loss in terms.losses.items():
        grads = torch.autograd.grad(loss, taught, retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in grads) == name.startswith("teacher/"), name
    factors = {g["lr_factor"]: sum(p.numel() for p in g["params"]) for g in s.optimiser.param_groups}
    assert set(factors) == {1.0, 0.5}
    groups = [g for g in s.optimiser.param_groups if g["lr_factor"] == 0.5]
    assert {p for g in groups for p in g["params"]} == set(taught)
    train_in_process(job)
    from dfssd.train import checkpoint

    state = checkpoint.load_newest(job.store.at("train"), job.fingerprint())
    online = {k.removeprefix("online."): v for k, v in state["student"].items() if k.startswith("online.")}
    assert any(not torch.equal(online[k], start[k]) for k in start)
    lrs = {g["lr_factor"]: g["lr"] for g in state["optimiser"]["param_groups"]}
    assert lrs[0.5] == pytest.approx(lrs[1.0] / 2)
    assert state["teacher_ema_updates"] == 3
    assert any(not torch.equal(state["teacher_ema"][k], start[k]) for k in start)  # the average moved, and so teaches
    assert any(not torch.equal(state["teacher_ema"][k], online[k]) for k in start)
    assert not any("online" in k for k in read_detector(job.store.read("last.pt"), "x").state_dict())
    history = job.store.read_json("history.json")
    assert {"loss/teacher/box", "loss/teacher/cls", "grad/teacher"} <= set(history[0])


def test_the_gradient_of_an_online_teacher_does_not_shrink_the_students(prepared):
    give_teacher_and_candidates(prepared)
    s = build_session(make_job("student", str(prepared / "r"), tiny_config(prepared, **ONLINE)), WorkerGroup(), CPU)
    taught = [p for p in s.student.online.parameters() if p.requires_grad]
    own = [p for p in s.student.detector.parameters() if p.requires_grad]
    own[0].grad, taught[0].grad = torch.full_like(own[0], 1e-3), torch.full_like(taught[0], 1e3)
    norm, broken = clip(s)
    assert broken == 0
    assert norm.item() == pytest.approx(1e-3 * own[0].numel() ** 0.5) and (own[0].grad == 1e-3).all()
    assert taught[0].grad.norm().item() == pytest.approx(s.job.config.train.grad_clip, rel=1e-4)


def test_an_online_teacher_must_know_exactly_the_classes(prepared):
    give_teacher_and_candidates(prepared)
    names = [*read_detector(Storage(str(prepared / "r")).read("teacher/best.pt"), "t").names.values(), "more"]
    job = make_job("student", str(prepared / "r"), tiny_config(prepared, **ONLINE))
    Storage(str(prepared / "r")).write("teacher/best.pt", detector_bytes(build_detector("yolov8s.yaml", names, 64), {}))
    with pytest.raises(DfssdError, match="an online teacher trains on the labels"):
        build_session(job, WorkerGroup(), CPU)


def test_weights_of_another_teacher_count_by_content(prepared, tmp_path):
    from dfssd.pipeline.stages import make_stage
    from dfssd.runtime.artefact_names import STUDENT, TEACHER

    give_teacher_and_candidates(prepared)
    run = Storage(str(prepared / "r"))
    data = [detector_bytes(build_detector(spec, NAMES, 64), {}) for spec in ("yolov8n.yaml", "yolov8s.yaml")]
    for name, one in (("a", data[0]), ("b", data[0]), ("c", data[1])):
        (tmp_path / f"{name}.pt").write_bytes(one)

    def stage(name):
        config = tiny_config(prepared, distill_teacher=str(tmp_path / f"{name}.pt"))
        return make_stage(config, run, STUDENT)

    assert stage("a").config == stage("b").config != stage("c").config
    assert TEACHER not in stage("a").inputs and TEACHER in make_stage(tiny_config(prepared), run, STUDENT).inputs
    config = tiny_config(prepared, distill_teacher=str(tmp_path / "a.pt"))
    job = make_job("student", str(prepared / "r"), config)
    names = list(read_detector(run.read("teacher/best.pt"), "t").names.values())
    job.store.write("teacher.pt", detector_bytes(build_detector("yolo11n.yaml", names, 64), {}))
    assert build_session(job, WorkerGroup(), CPU).teacher.channels == [
        64,
        128,
        256,
    ]  # not the run's YOLOv8s: 128, 256, 512
    with pytest.raises(DfssdError, match="could not be fetched"):
        make_stage(tiny_config(prepared, distill_teacher="gone.pt"), run, STUDENT)


def test_a_teacher_in_bf16_teaches_a_student_in_fp32_nearly_the_same(prepared):
    give_teacher_and_candidates(prepared)
    found = {}
    for amp in ("fp32", "bf16"):
        s = build_session(
            make_job("student", str(prepared / "r"), tiny_config(prepared, teacher_amp=amp)), WorkerGroup(), CPU
        )
        batch = next(iter(s.loader()))
        images = network_input(batch["img"], CPU)
        out, said = forward(s, images, images, 4)
        assert out.raw["one2many"].feats[0].dtype == torch.float32  # the student's pass is not touched
        assert said.taps[0].dtype == (torch.float32 if amp == "fp32" else torch.bfloat16)
        losses = terms_of(s.criterion, out, said, s.targets(batch, 4), 0.5).losses
        sum(losses.values()).backward()
        grad = next(p for p in s.student.parameters() if p.requires_grad).grad
        found[amp] = ({k: float(v) for k, v in losses.items()}, grad.flatten())
    (exact, grad), (rounded, other) = found["fp32"], found["bf16"]
    assert rounded == pytest.approx(exact, rel=0.02) and rounded != exact
    assert torch.cosine_similarity(grad, other, dim=0) > 0.999
