"""Exported files find what the network finds, in the precision their runtime computes in, or the export stops."""

import json

import numpy as np
import pytest
import torch
from onnx import load_from_string
from small import tiny_config

from dfssd.config import Export
from dfssd.data.manifest import read_manifest
from dfssd.errors import DfssdError
from dfssd.export import parity, write
from dfssd.export.formats import openvino_files
from dfssd.export.onnx_model import onnx_bytes
from dfssd.line.detector import LineDetector
from dfssd.models.families import family_of
from dfssd.models.yolo.detector import build_detector, detector_bytes, load_detector
from dfssd.runtime.storage import Storage

NAMES = ["pit", "scratch", "patch"]
POINT = {"max_escape": 0.02, "chosen_on": "val", "score": 0.4, "thresholds": {"pit": 0.4, "scratch": 0.45, "patch": 0.4},
         "reachable": True, "notes": []}  # fmt: skip
META = {"names": NAMES, "imgsz": 64, "operating_point": POINT, "reference": {"pictures": 0, "quantiles": {}}}


def _weights(spec="yolov8n.yaml"):
    """A detector that finds boxes although it has learned nothing: scores around one half that depend on the picture."""
    torch.manual_seed(0)
    model = build_detector(spec, NAMES, 64)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # statistics of made-up pictures, else features die out layer by layer
    model.train()(torch.rand(8, 3, 1, 1) + torch.randn(8, 3, 64, 64) * 0.2)
    for branch in model.model[-1].cv3:
        torch.nn.init.normal_(branch[-1].weight, std=0.3)
        torch.nn.init.constant_(branch[-1].bias, -0.5)
    return detector_bytes(model.eval(), {})


@pytest.fixture(scope="module")
def net():
    return load_detector(_weights(), "made up", 64).fuse(verbose=False)


@pytest.fixture(scope="module")
def onnx(net):
    return onnx_bytes(net, 64, META)


def _open(tmp_path, data, name="model.onnx"):
    (tmp_path / name).write_bytes(data)
    return LineDetector(tmp_path / name, 1)


def _rows(prepared):
    manifest = read_manifest(Storage(str(prepared / "r")).at("dataset"))
    return [r for r in manifest.rows if r.boxes is not None]


@pytest.mark.parametrize("inside", [False, True])
def test_onnx_with_nms_inside_and_outside_equals_the_network(net, prepared, tmp_path, inside):
    detector = _open(tmp_path, onnx_bytes(net, 64, META, inside))
    assert detector.names == NAMES and detector.metadata["operating_point"] == POINT
    [found] = write.check_parity(net, {"m": detector}, _rows(prepared), NAMES, 64, POINT)
    of = dict(reversed(part.split()) for part in found.splits.split(", "))
    assert set(of) == {"train", "val", "test"} and sum(map(int, of.values())) == found.pictures
    assert found.boxes > 100 and found.missing == 0 and found.box_px < 0.01 and found.score < 1e-4
    parity.require([found])


def test_any_batch_and_any_size_of_picture(net, onnx, tmp_path):
    detector = _open(tmp_path, onnx)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (*s, 3), np.uint8) for s in ((64, 64), (30, 100), (200, 64))]
    together, alone = detector(pictures), [detector([p])[0] for p in pictures]
    for one, two, picture in zip(together, alone, pictures, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-3)
        assert len(one) and (one[:, 4] >= detector.tau_c[one[:, 5].astype(int)]).all()
        assert one[:, [0, 2]].max() <= picture.shape[1] and one[:, [1, 3]].max() <= picture.shape[0]


def test_yolo_predict_reads_the_file(onnx, tmp_path):
    from ultralytics import YOLO

    detector = _open(tmp_path, onnx)
    picture = np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8)
    stock = YOLO(str(tmp_path / "model.onnx"), task="detect")
    theirs = stock.predict(picture, imgsz=64, conf=0.4, iou=0.7, verbose=False)[0]
    assert theirs.names == dict(enumerate(NAMES))
    ours = detector([picture], np.full(3, 0.4, np.float32))[0]
    best = theirs.boxes.data.numpy()
    assert len(best) and abs(float(best[:, 4].max()) - float(ours[:, 4].max())) < 1e-4


def test_a_file_that_is_not_the_network_stops_the_export(net, onnx, prepared, tmp_path):
    """Weights rounded to bfloat16, which is what OpenVINO computes in where nobody asks it not to."""
    import onnx as library

    graph = library.load_from_string(onnx)
    for tensor in graph.graph.initializer:
        if tensor.data_type == library.TensorProto.FLOAT and len(tensor.dims) == 4:
            values = torch.tensor(library.numpy_helper.to_array(tensor).copy()).bfloat16().float().numpy()
            tensor.CopyFrom(library.numpy_helper.from_array(values, tensor.name))
    [found] = write.check_parity(
        net, {"m": _open(tmp_path, graph.SerializeToString())}, _rows(prepared), NAMES, 64, POINT
    )
    assert found.box_px > 10 * 0.01 and found.failures
    with pytest.raises(DfssdError, match="does not find what the network finds"):
        parity.require([found])


def test_openvino_computes_in_float32_because_it_is_told_to(net, onnx, prepared, tmp_path):
    pytest.importorskip("openvino")
    (tmp_path / "m_openvino").mkdir()
    for name, data in openvino_files(onnx, {**META, "nms_inside": False}).items():
        (tmp_path / "m_openvino" / name).write_bytes(data)
    detector = LineDetector(tmp_path / "m_openvino", 1)
    assert "float32" in detector.precision and detector.metadata["operating_point"] == POINT
    [found] = write.check_parity(net, {"m": detector}, _rows(prepared)[:16], NAMES, 64, POINT)
    assert found.precision == "fp32" and not found.failures and found.box_px < 0.05


def test_int8_says_what_it_loses(net, onnx, prepared, tmp_path, monkeypatch):
    rows = _rows(prepared)[:16]
    images = np.random.default_rng(0).random((16, 3, 64, 64), np.float32)
    monkeypatch.setattr(write, "_calibration", lambda manifest, config: images)
    monkeypatch.setattr(write, "onnx_bytes", lambda *args: onnx)
    config = tiny_config(tmp_path).model_copy(update={"export": Export(formats=("onnx",), int8=True)})
    small = write._files(config, None, net, "m", META)["m_int8.onnx"]
    assert len(small) < 0.4 * len(onnx)
    kept = family_of(net).kept_float([n.name for n in load_from_string(onnx).graph.node if n.op_type == "Conv"])
    assert len(kept) == 7  # boxes and scores of three levels, and the bins
    nodes = load_from_string(small).graph.node
    rounded = {out for n in nodes if n.op_type == "DequantizeLinear" for out in n.output}
    assert {n.name for n in nodes if n.op_type == "Conv" and n.input[1] not in rounded} == set(kept)
    [found] = write.check_parity(net, {"m int8": _open(tmp_path, small)}, rows, NAMES, 64, POINT)
    assert found.precision == "int8" and found.score > 1e-3
    parity.require([found])  # a loss, not an error
    assert "mAP50-95" in found.in_words()


def test_the_stage_writes_nothing_before_parity_holds(prepared, monkeypatch):
    run = Storage(str(prepared / "r"))
    for name, spec in (("student", "yolov8n.yaml"), ("teacher", "yolov8s.yaml")):
        run.write(f"{name}/best.pt", _weights(spec))
        run.write_json(f"{name}/stage.json", {"summary": {}})
    run.write_json("report/metrics.json", {"student": {"operating_point": POINT}})
    config = tiny_config(prepared).model_copy(update={"export": Export(parity_pictures=12)})
    run.write_json("export/stage.json", {})  # of an export that this one is added to
    with monkeypatch.context() as patch:
        patch.setattr(parity, "BOX_LIMIT", -1.0)
        with pytest.raises(DfssdError, match="does not find"):
            write.export_model(config, run.uri, "student", 1)
    assert not run.exists("export/student.onnx") and run.exists("export/stage.json"), "what was there still counts"
    summary = write.export_model(config, run.uri, "student", 1)
    assert not run.exists("export/stage.json"), "of replaced files it would be wrong until the stage has finished"
    json.dumps(summary)
    assert summary["files"]["student.onnx"] == len(run.read("export/student.onnx"))
    slow, fast = (summary["latency"]["timings"][f"{name} ONNX Runtime"]["p50_ms"] for name in ("teacher", "student"))
    assert summary["speedup"] == pytest.approx(slow / fast, abs=0.01)
    detector = LineDetector(prepared / "r" / "export" / "student.onnx", 1)
    assert detector.metadata["reference"]["pictures"] > 10 and len(detector.metadata["weights_sha256"]) == 64
