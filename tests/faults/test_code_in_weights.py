"""A .pt or yaml that carries code: whatever it is given as, it is refused, and its code is not run."""

import io
import shutil
from pathlib import Path

import pytest
import torch
import ultralytics
from small import give_teacher_and_candidates, make_job, tiny_config
from torch import nn
from ultralytics.nn import tasks
from ultralytics.nn.tasks import yaml_model_load

from dfssd.data.manifest import read_manifest
from dfssd.errors import DfssdError
from dfssd.models.yolo.detector import build_detector, detector_bytes, load_detector, resolve_weights
from dfssd.models.yolo.layout import refuse_code, require_safe_loader
from dfssd.pipeline.settings import given_weights
from dfssd.pseudo.teachers import load_teachers
from dfssd.runtime.storage import Storage
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train.build import build_session


class Touch:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def ran(tmp_path):
    return tmp_path / "was run"


@pytest.fixture(autouse=True)
def _ultralytics_evaluates(monkeypatch):
    """As where somebody has imported Ultralytics before this package could ask for its safe loading."""
    monkeypatch.setattr(tasks, "SAFE_LOAD", False)


def _weights(kind, ran):
    """A detector that works, with code in it."""
    model = build_detector("yolov8n.yaml", ["a", "b", "c"], 64)
    if kind == "activation":
        model.yaml["activation"] = f"(__import__('pathlib').Path({str(ran)!r}).touch(), nn.SiLU())[1]"
        return detector_bytes(model, {})
    if kind == "nested":  # a network as a layer, whose own layout is evaluated
        inner = {**yaml_model_load("yolov8n.yaml"), "activation": f"__import__('pathlib').Path({str(ran)!r}).touch()"}
        model.yaml["backbone"][0] = [-1, 1, "DetectionModel", [inner]]
        return detector_bytes(model, {})
    if kind == "pickle":
        return detector_bytes(model, {"extra": Touch(ran)})
    buffer = io.BytesIO()
    torch.save(Touch(ran), buffer)
    return buffer.getvalue()


KINDS = pytest.mark.parametrize("kind", ["activation", "nested", "pickle", "no model at all"])


@KINDS
def test_as_teacher_student_distil_teacher_or_labelling_teacher_on_the_command_line(tmp_path, ran, kind):
    file = tmp_path / "evil.pt"
    file.write_bytes(_weights(kind, ran))
    for check in (resolve_weights, given_weights):
        with pytest.raises(DfssdError) as caught:
            check(str(file))
        assert caught.value.todo and not ran.exists()


@KINDS
def test_in_the_folder_of_a_run(prepared, ran, kind):
    """Where the command line has passed, or somebody else can write: all who load weights from storage."""
    give_teacher_and_candidates(prepared)
    run, evil = Storage(str(prepared / "r")), _weights(kind, ran)
    names = read_manifest(run.at("dataset")).names
    with pytest.raises(DfssdError):
        load_detector(evil, "teacher", 64)
    run.write("pseudo/teachers/0.pt", evil)
    with pytest.raises(DfssdError):
        load_teachers(tiny_config(prepared), run, ["pseudo/teachers/0.pt"], names, torch.device("cpu"))
    for name, mode in (("teacher/best.pt", "frozen"), ("student/teacher.pt", "online"), ("student/init.pt", "frozen")):
        run.write(name, evil)
        job = make_job("student", run.uri, tiny_config(prepared, teacher_mode=mode))
        with pytest.raises(DfssdError):
            build_session(job, WorkerGroup(), torch.device("cpu"))
        run.delete(name)
        give_teacher_and_candidates(prepared)
    assert not ran.exists()


def test_in_a_yaml(tmp_path, ran):
    source = next((Path(ultralytics.__file__).parent / "cfg" / "models").rglob("yolov8.yaml"))
    file = tmp_path / "yolov8n-mine.yaml"
    shutil.copy(source, file)
    assert resolve_weights(str(file)) == (str(file), None)
    file.write_text(f"activation: __import__('pathlib').Path({str(ran)!r}).touch()\n" + file.read_text())
    for check in (resolve_weights, lambda spec: build_detector(spec, ["a"], 64)):
        with pytest.raises(DfssdError, match="activation is no layer"):
            check(str(file))
    assert not ran.exists()


def test_what_ultralytics_ships_is_allowed_and_what_only_looks_like_a_layer_is_not():
    good = yaml_model_load("yolov8n.yaml")
    for name in ("yolo11n.yaml", "yolo12n.yaml", "yolo26n.yaml", "yolov9t.yaml", "yolov10n.yaml", "yolov8n-p2.yaml"):
        refuse_code(yaml_model_load(name), name)
    for activation in ("nn.SiLU()", "torch.nn.LeakyReLU(0.1)", "nn.Hardtanh(-1, max_val=2.0)"):
        refuse_code({**good, "activation": activation}, "x")
    bad = (
        "SiLU()",
        "nn.SiLU",
        "nn.SiLU(exit())",
        "nn.SiLU(-exit())",
        "nn.SiLU(**vars())",
        "nn.modules.os.getcwd()",
        "nn.exit()",
    )
    for activation in (*bad, "os.nn.SiLU()", "(" * 5000, 5, ["nn.SiLU()"]):
        with pytest.raises(DfssdError, match="activation"):
            refuse_code({**good, "activation": activation}, "x")
    for layer in ("torch_safe_load", "yaml_model_load", "DetectionModel", "nn.Module.apply", "TorchVision", 5, None):
        with pytest.raises(DfssdError, match="no layer"):
            refuse_code({**good, "head": [[-1, 1, layer, []]]}, "x")
    for layout in (None, "evil.yaml", [], {"backbone": []}):
        with pytest.raises(DfssdError):
            refuse_code(layout, "x")
    assert isinstance(nn.SiLU(), nn.Module)


def test_an_old_torch_is_refused_where_its_loader_runs_code(monkeypatch):
    require_safe_loader()
    monkeypatch.delattr(torch.serialization, "get_unsafe_globals_in_checkpoint")
    with pytest.raises(DfssdError, match=r"cannot load weights safely") as caught:
        load_detector(b"", "x", 64)
    assert "2.6" in caught.value.todo
