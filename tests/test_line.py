"""At the line: letterbox and NMS without torch agree with Ultralytics', drift is seen and not invented."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dfssd.config import Config
from dfssd.errors import DfssdError
from dfssd.evaluate.files import _open as measure_file
from dfssd.evaluate.open_model import open_model
from dfssd.line import drift
from dfssd.line.detector import LineDetector, decode, letterbox, network_input, nms
from dfssd.models.nms import suppress


@pytest.mark.parametrize("shape", [(96, 128), (128, 96), (64, 64), (33, 500), (500, 17), (1000, 31)])
def test_the_letterbox_is_ultralytics_and_leads_back(shape):
    from ultralytics.data.augment import LetterBox

    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (*shape, 3), np.uint8)
    square, gain, edge = letterbox(picture, 128)
    theirs = LetterBox((128, 128), auto=False)(image=picture)
    assert square.shape == (128, 128, 3)
    if shape in (
        (96, 128),
        (128, 96),
        (64, 64),
    ):  # elsewhere the two round half pixels apart, as Ultralytics' own loader does
        np.testing.assert_array_equal(square, theirs)
    corner = np.array([shape[1], shape[0]], float)
    np.testing.assert_allclose(corner * gain + edge, edge + np.round(corner * gain), atol=1e-9)
    assert letterbox(picture[..., 0], 128)[0].shape == (128, 128, 3)


def test_a_narrow_strip_comes_back_where_it_was():
    """4096 x 130: one common gain would move a box of 26 px height by 2 px and more."""
    _, gain, edge = letterbox(np.zeros((130, 4096, 3), np.uint8), 640)
    box = np.array([1000.0, 52, 1400, 78])
    there = box * np.tile(gain, 2) + np.tile(edge, 2)
    np.testing.assert_allclose((there - np.tile(edge, 2)) / np.tile(gain, 2), box)
    assert abs(gain[0] - gain[1]) / gain[0] > 0.03


def test_boxes_from_raw_output_equal_ultralytics_nms():
    rng = np.random.default_rng(1)
    raw = np.concatenate(
        [rng.uniform(10, 118, (3, 2, 200)), rng.uniform(5, 40, (3, 2, 200)), rng.random((3, 4, 200)) ** 6], 1
    )
    raw = raw.astype(np.float32)
    ours, theirs = decode(raw, 0.05), suppress(torch.from_numpy(raw), 0.05, 0.7, 300)
    for one, two in zip(ours, theirs, strict=True):
        assert len(one) == len(two) > 50
        np.testing.assert_allclose(one, two.numpy(), atol=1e-3)
    assert nms(np.zeros((0, 6), np.float32)).shape == (0, 6)


def test_network_input_is_rgb_between_0_and_1():
    square = np.zeros((8, 8, 3), np.uint8)
    square[..., 0] = 255  # blue
    batch = network_input([square])
    assert (
        batch.shape == (1, 3, 8, 8) and batch.dtype == np.float32 and batch[0, 2].min() == 1 and batch[0, 0].max() == 0
    )


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_deep_pictures_are_those_that_training_saw(kind):
    from dfssd.data.images import to_uint8 as trained_on
    from dfssd.line.detector import to_uint8

    deep = (
        np.random.default_rng(0).random((20, 30)) * (1 if kind is np.float32 else 255 if kind is np.uint8 else 4095)
    ).astype(kind)
    for white in (0.0, 1.0 if kind is np.float32 else 4095.0):
        np.testing.assert_array_equal(
            to_uint8(deep, white)[..., None].repeat(3, 2)[..., 0],
            trained_on(deep[..., None].repeat(3, 2), white)[..., 0],
        )


def _stream(rng, count, light=0.5, score=0.8):
    empty = np.zeros((0, 6))
    for _ in range(count):
        level = np.clip(rng.normal(light, 0.08), 0, 1)
        picture = np.clip(rng.normal(255 * level, 20, (40, 40)), 0, 255).astype(np.uint8)
        boxes = np.array([[0, 0, 5, 5, np.clip(rng.normal(score, 0.1), 0, 1), 0]]) if rng.random() < 0.7 else empty
        yield drift.picture_numbers(picture, boxes)


def test_drift_is_seen_and_not_invented():
    rng = np.random.default_rng(0)
    known = drift.reference(list(_stream(rng, 150)))
    quiet = 0
    for _ in range(20):
        watch = drift.Drift(known)
        for numbers in _stream(rng, 100):
            watch.add(numbers)
        quiet += not watch.warnings()
    assert quiet == 20
    for change, word in (({"light": 0.7}, "brightness"), ({"score": 0.4}, "best score")):
        watch = drift.Drift(known)
        for k, numbers in enumerate(_stream(rng, 100, **change)):
            assert k >= drift.FEWEST or not watch.warnings()
            watch.add(numbers)
        assert any(word in said for said in watch.warnings()), change
    assert drift.Drift(drift.reference([])).warnings() == []


def test_a_folder_without_a_model_is_a_sentence(tmp_path):
    with pytest.raises(DfssdError, match="there is no model in it"):
        open_model(str(tmp_path))


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x08\x08\x12\x07pytorch"])
def test_a_damaged_model_is_a_sentence(tmp_path, data):
    (tmp_path / "cut.onnx").write_bytes(data)
    with pytest.raises(DfssdError, match=r"cannot be opened: ONNX Runtime cannot read .*cut\.onnx: "):
        open_model(str(tmp_path / "cut.onnx"))


def test_a_damaged_openvino_model_is_a_sentence(tmp_path):
    """OpenVINO names places in its own source first."""
    (tmp_path / "m.xml").write_text("<net")
    with pytest.raises(DfssdError, match=r"cannot be opened: OpenVINO cannot read .*m\.xml: Unable to read the model"):
        open_model(str(tmp_path))


def test_a_model_whose_runtime_is_missing_is_a_sentence_for_predict_and_evaluate_alike(tmp_path, monkeypatch):
    engine = tmp_path / "student.engine"
    engine.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    for opens in (lambda: open_model(str(engine)), lambda: measure_file(str(engine), Config())):
        with pytest.raises(DfssdError, match=r"cannot be opened: .*[tT]ensor"):
            opens()


def test_a_size_or_threads_that_a_file_has_no_use_for_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dfssd.evaluate.open_model.open_exported", lambda path, threads: SimpleNamespace(imgsz=96))
    for name in ("m.onnx", "m.engine"):
        (tmp_path / name).touch()
    assert open_model(str(tmp_path / "m.onnx"), 96, 2).imgsz == 96
    with pytest.raises(DfssdError, match=r"--imgsz 64: the input of this model is 96 px"):
        open_model(str(tmp_path / "m.onnx"), 64)
    with pytest.raises(DfssdError, match=r"--threads has no effect on an \.engine"):
        open_model(str(tmp_path / "m.engine"), threads=2)


def test_a_model_from_elsewhere_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not an exported model"):
        LineDetector(tmp_path / "best.pt")
