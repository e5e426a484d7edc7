"""Break distillation in a whole training run, once each: it must stop within the first log interval and say why."""

import pytest
import torch
from small import give_teacher_and_candidates, make_job, tiny_config

from dfssd.config import Config, Distill
from dfssd.errors import DfssdError
from dfssd.models.yolo import taps as taps_module
from dfssd.models.yolo.detector import detector_bytes, load_detector
from dfssd.models.yolo.taps import Taps
from dfssd.runtime.storage import Storage
from dfssd.train import loop
from dfssd.train.in_process import train_in_process

LOG_EVERY = 3


def _stops(prepared, monkeypatch, match, **settings):
    """Run; it must end with the message before the first log interval is over."""
    give_teacher_and_candidates(prepared)
    config = tiny_config(
        prepared, **{"steps": 8, "log_every": LOG_EVERY, "val_every": 8, "balance": "none", **settings}
    )
    done = []
    update = loop.update
    monkeypatch.setattr(loop, "update", lambda s, broken: (update(s, broken), done.append(s.step)))
    with pytest.raises(DfssdError, match=match) as caught:
        train_in_process(make_job("student", str(prepared / "r"), config))
    assert len(done) < LOG_EVERY and caught.value.todo
    return caught.value


def test_detached_taps(prepared, monkeypatch):
    take = Taps.take
    monkeypatch.setattr(Taps, "take", lambda self: [m.detach() for m in take(self)])
    _stops(prepared, monkeypatch, "'feat' has no gradient at the student", taps=(4, 15))


def test_detached_neck(prepared, monkeypatch):
    from dfssd.train import build

    class Detached(build.Student):
        def forward(self, images, labelled=0):
            out = super().forward(images, labelled)
            return type(out)(out.raw, out.taps, [p.detach() for p in out.projected])

    monkeypatch.setattr(build, "Student", Detached)
    _stops(prepared, monkeypatch, "'feat' is not connected to the student")


def test_a_hook_that_never_fires(prepared, monkeypatch):
    init = Taps.__init__

    def broken(self, *args):
        init(self, *args)
        self.remove()

    monkeypatch.setattr(taps_module.Taps, "__init__", broken)
    error = _stops(prepared, monkeypatch, r"'feat': no output of layer 4, 15 of the (student|teacher)", taps=(4, 15))
    assert "--lambda-f 0" in error.todo


@pytest.mark.parametrize(
    ("settings", "term", "flag"),
    [
        ({"lambda_f": 1e-12}, "feat", "--lambda-f"),
        ({"lambda_p": 1e-12, "lambda_l": 1e-12}, "pred", "--lambda-p"),
        ({"lambda_u": 1e-12}, "pse", "--lambda-u"),
    ],
)
def test_a_weight_by_typo(prepared, monkeypatch, settings, term, flag):
    assert flag in _stops(prepared, monkeypatch, f"'{term}' weighs next to nothing", **settings).todo


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lambda_f": 0.0, "taps": (4, 15)}, r"feature distillation \(--lambda-f 0\) is switched off, but --taps"),
        ({"lambda_p": 0.0, "lambda_l": 0.0, "prediction": "mse"}, r"prediction distillation .* but --prediction"),
        ({"lambda_l": 0.0, "loc_tau": 3.0}, r"localisation term \(--lambda-l 0\) is switched off, but --loc-tau"),
        (
            {"lambda_p": 0.0, "lambda_l": 0.0, "lambda_f": 0.0, "teacher_mode": "online"},
            r"distillation .* but --teacher-mode",
        ),
    ],
)
def test_a_weight_of_zero_with_settings_of_its_term(prepared, monkeypatch, settings, message):
    _stops(prepared, monkeypatch, message, **settings)


def test_the_command_line_refuses_it_before_anything_starts(tmp_path):
    from dfssd.pipeline.run import run_stages
    from dfssd.runtime.artefact_names import STUDENT

    config = Config(run={"storage_path": str(tmp_path)}, distill=Distill(lambda_f=0.0, divergence="cwd"))
    with pytest.raises(DfssdError, match=r"switched off, but --divergence was set"):
        run_stages(config, [STUDENT])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings", [{}, {"lambda_p": 0.0, "lambda_l": 0.0}, {"lambda_f": 0.0}], ids=["all", "features", "predictions"]
)
def test_a_teacher_of_nan(prepared, monkeypatch, settings):
    give = give_teacher_and_candidates

    def poisoned(storage):
        give(storage)
        run = Storage(str(storage / "r"))
        teacher = load_detector(run.read("teacher/best.pt"), "t", 64)
        with torch.no_grad():
            teacher.model[4].cv1.conv.weight[0, 0] = float("nan")
        run.write("teacher/best.pt", detector_bytes(teacher, {}))

    monkeypatch.setitem(globals(), "give_teacher_and_candidates", poisoned)
    error = _stops(prepared, monkeypatch, "teacher's output is not finite at step 0", **settings)
    assert "'pred' and 'feat'" in error.what and "train it again" in error.todo
