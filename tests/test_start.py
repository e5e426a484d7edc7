"""What a detector takes over from given weights: tensors by name and shape, rows of the class head by names of classes."""

from pathlib import Path

import pytest
import torch
from ultralytics.nn.tasks import SegmentationModel

from dfssd.config import Config, Models, Run, Train
from dfssd.models.yolo.detector import build_detector, detector_bytes, read_detector, started_detector
from dfssd.pipeline.context import Context
from dfssd.pipeline.stages import make_stage
from dfssd.pipeline.training import train_stage
from dfssd.runtime.artefact_names import LABEL_ONLY
from dfssd.runtime.storage import Storage

NAMES = ["pit", "dent", "scale", "roll"]
WEIGHTS = Path(__file__).parents[2] / "shared" / "data" / "weights"


@pytest.fixture(scope="module")
def given():
    torch.manual_seed(3)
    model = build_detector("yolov8n.yaml", NAMES, 64)
    for convolutions in model.model[-1].cv3:  # rows that no other initialisation gives
        torch.nn.init.normal_(convolutions[-1].bias)
    return detector_bytes(model, {})


def _rows(model, name):
    """Weights and biases of a class at all levels."""
    row = list(model.names.values()).index(name)
    return [p[row].detach() for convolutions in model.model[-1].cv3 for p in convolutions[-1].parameters()]


def test_rows_follow_the_names_of_the_classes(given):
    source = read_detector(given, "x")
    other, start = started_detector("x.pt", ["roll", "pit", "dent", "scale"], 64, given)
    for name in NAMES:
        torch.testing.assert_close(_rows(other, name), _rows(source, name), rtol=0, atol=0)
    assert start.tensors[0] == start.tensors[1] and start.parameters[0] == start.parameters[1] and start.moved
    assert "all of the parameters" in start.said() and "rows of all 4 classes kept by name, moved" in start.said()
    same = started_detector("x.pt", NAMES, 64, given)[1]
    assert not same.moved and "moved" not in same.said() and not same.new


def test_some_rows_are_kept_and_the_others_new(given):
    names = ["crack", "dent", "pit", "hole", "burr"]
    torch.manual_seed(0)
    plain = build_detector("yolov8n.yaml", names, 64)
    torch.manual_seed(0)
    model, start = started_detector("x.pt", names, 64, given)
    source = read_detector(given, "x")
    for name in ("dent", "pit"):
        torch.testing.assert_close(_rows(model, name), _rows(source, name), rtol=0, atol=0)
    torch.testing.assert_close(_rows(model, "crack"), _rows(plain, "crack"), rtol=0, atol=0)
    assert start.kept == ("dent", "pit") and "new rows: crack, hole, burr" in start.said()
    taken, everything = start.parameters
    assert everything == sum(p.numel() for k, p in model.named_parameters() if ".dfl" not in k)
    assert everything - taken == 3 * sum(len(r.reshape(-1)) for r in _rows(model, "crack"))


def test_as_many_classes_of_other_names_keep_no_row(given):
    model, start = started_detector("x.pt", ["a", "b", "c", "d"], 64, given)
    source = read_detector(given, "x")
    assert not start.kept and "class head: new (4 classes for 4)" in start.said()
    assert all((a != b).any() for a, b in zip(_rows(model, "a"), _rows(source, "pit"), strict=True))
    torch.testing.assert_close(model.model[0].conv.weight, source.model[0].conv.weight, rtol=0, atol=0)


def test_a_wider_class_branch_is_said_to_be_new():
    """COCO's 80 classes make it 80 channels wide, few classes 64: nothing of it fits, rows of the same name included."""
    coco = ["pit", *(f"thing{k}" for k in range(79))]
    _, start = started_detector("x.pt", NAMES, 64, detector_bytes(build_detector("yolov8n.yaml", coco, 64), {}))
    assert not start.kept and start.new == ("layer 22, class branch",)
    assert start.layers[0] == start.layers[1] - 1
    assert 0.8 < start.parameters[0] / start.parameters[1] < 1


def test_a_segmentation_model_lends_its_detection_head():
    torch.manual_seed(0)
    source = SegmentationModel("yolov8n-seg.yaml", nc=4, verbose=False)
    source.names, source.args = dict(enumerate(NAMES)), build_detector("yolov8n.yaml", NAMES, 64).args
    model, start = started_detector("seg.pt", NAMES, 64, detector_bytes(source, {}))
    assert type(model.model[-1]).__name__ == "Detect" and start.kept == tuple(NAMES)
    assert "from a segmentation model" in start.said() and not start.new
    assert model.train()(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(("file", "known"), [("yolov8n-natural.pt", 6), ("yolov8s-natural.pt", 2)])
def test_pretrained_weights_of_other_people(file, known):
    if not (WEIGHTS / file).exists():
        pytest.skip("the weights are not here")
    data = (WEIGHTS / file).read_bytes()
    said = started_detector(file, [f"defect{k}" for k in range(7)], 64, data)[1].said()
    assert said.startswith("349 of 355 tensors, 16 of 17 layers, 99.9 % of the parameters taken over; ")
    assert said.endswith(f"class head: new (7 classes for {known})"), said
    if known == 6:
        start = started_detector(file, ["Rock", "pit", "Car"], 64, data)[1]
        assert start.kept == ("Rock", "Car") and "new rows: pit" in start.said()


def test_a_stage_says_it_once(given, prepared, capsys, monkeypatch):
    """Before the first step; a stage that goes on has said it."""
    (prepared / "start.pt").write_bytes(given)
    config = Config(run=Run(storage_path=str(prepared), run_name="r"), train=Train(imgsz=64, steps=2))
    config = config.model_copy(update={"models": Models(student=str(prepared / "start.pt"))})

    def stop(job):
        raise KeyboardInterrupt

    run = Storage(str(prepared)).at("r")
    run.write_json("dataset/stage.json", {"digest": "d", "summary": {"names": ["dent", "rust"]}})
    monkeypatch.setattr(Context, "log_dataset", lambda self, run_id: None)
    context = Context(config, fit=stop)
    said = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train_stage(context, make_stage(config, run, LABEL_ONLY), "")
        said.append(capsys.readouterr().out)
    assert "label_only: " in said[0] and "start.pt: " in said[0] and "1 of 2 classes kept by name" in said[0]
    assert "kept by name" not in said[1]
