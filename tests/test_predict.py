"""From the network's output to boxes: which NMS, how precise, and that all images at once give what each alone gives."""

import subprocess
import sys

import pytest
import torch
from ultralytics.utils import nms

from dfssd.evaluate import measure, validation
from dfssd.models import predict as module
from dfssd.models.detector import build_detector
from dfssd.models.predict import suppress, suppress_together
from dfssd.pseudo import teachers
from dfssd.report import pictures
from dfssd.train import loop


def _crowd(images=5, classes=4, anchors=600, seed=0):
    """(B,4+C,A) decoded boxes that overlap in heaps, with scores of which a third is above 0.2."""
    g = torch.Generator().manual_seed(seed)
    heaps = torch.rand(images, 2, 12, generator=g) * 600
    centre = heaps[:, :, torch.randint(12, (anchors,), generator=g)] + torch.randn(images, 2, anchors, generator=g) * 8
    size = 30 + 40 * torch.rand(images, 2, anchors, generator=g)
    scores = torch.rand(images, classes, anchors, generator=g) ** 4
    return torch.cat([centre, size, scores], 1)


def test_worker_labelling_actor_and_evaluation_have_torchvision():
    """Ultralytics' NMS asks `sys.modules`: our one import must be enough, and all three must come by it."""
    alone = "import sys, dfssd.models.predict; sys.exit('torchvision' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", alone], check=False).returncode == 0
    assert loop.validate is validation.validate
    assert {validation.predict, teachers.predict, measure.predict, pictures.predict} == {module.predict}


def test_the_loop_in_python_is_never_taken(monkeypatch):
    monkeypatch.setattr(nms.TorchNMS, "nms", lambda *_: pytest.fail("NMS ran in Python"))
    assert all(len(found) for found in suppress(_crowd(), 0.2, 0.5, 300))


@pytest.mark.parametrize("conf,most", [(0.2, 300), (0.2, 7), (0.02, 300), (0.9999999, 300)])
def test_one_nms_for_all_images_finds_what_ultralytics_finds(conf, most):
    boxes = _crowd()
    ours = suppress_together(boxes, conf, 0.6, most)
    theirs = nms.non_max_suppression(boxes, conf, 0.6, multi_label=True, max_det=most)
    assert [len(o) for o in ours] == [len(t) for t in theirs]
    for own, stock in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, stock)


def test_an_image_without_boxes_among_others():
    boxes = _crowd(images=3)
    boxes[1, 4:] = 0
    found = suppress_together(boxes, 0.2, 0.6, 300)
    assert [len(f) > 0 for f in found] == [True, False, True] and found[1].shape == (0, 6)


def test_too_many_boxes_for_one_nms_go_image_by_image(monkeypatch):
    monkeypatch.setattr(module, "ONE_NMS", 10)
    assert suppress_together(_crowd(), 0.2, 0.6, 300) is None


@pytest.mark.parametrize("spec", ["yolov8n.yaml", "yolo11n.yaml", "yolo26n.yaml"])
def test_decoding_apart_from_the_network_changes_nothing_in_fp32(spec):
    torch.manual_seed(0)
    model = build_detector(spec, ["a", "b", "c"], 96).eval()
    images = torch.rand(2, 3, 96, 128)
    with torch.no_grad():
        expected = model(images)[0]
        assert torch.equal(module._decode(model, module._raw(model, images)), expected)
    assert not model.model[-1].training


def test_boxes_are_decoded_in_float32_whatever_the_network_computes_in():
    """Raw output in bf16, decoded in bf16, is off by more than a pixel at 640 px; decoded in float32 by next to nothing."""
    model = build_detector("yolov8n.yaml", ["a", "b"], 640).eval()
    head, g = model.model[-1], torch.Generator().manual_seed(0)
    feats = [torch.zeros(1, 1, 640 // s, 640 // s, dtype=torch.bfloat16) for s in (8, 16, 32)]
    raw = {"boxes": torch.randn(1, 64, 8400, generator=g), "scores": torch.randn(1, 2, 8400, generator=g)}
    raw = {"feats": feats, **{k: v.bfloat16() for k, v in raw.items()}}
    with torch.no_grad():
        ours = module._decode(model, raw)
        head.shape = None
        rough = model.bfloat16().model[-1]._inference(raw)
        head.shape = None
        exact = model.double().model[-1]._inference({"feats": [f.double() for f in feats], **_double(raw)})
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() < 1e-3 and (rough - exact)[:, :4].abs().max() > 1


def _double(raw):
    return {k: raw[k].double() for k in ("boxes", "scores")}
