"""A model family is a protocol: a second one, of a single stride and other boxes, goes the whole way."""

import ast
import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import give_teacher_and_candidates, make_job, terms_of, tiny_config
from torch import nn

import dfssd
from dfssd.data.dataset import ManifestDataset, network_input
from dfssd.data.manifest import read_manifest
from dfssd.errors import DfssdError
from dfssd.evaluate.measure import measure
from dfssd.evaluate.open_model import open_model
from dfssd.evaluate.squares import collect_squares, exported, network
from dfssd.evaluate.validation import collect, summarise
from dfssd.export.onnx_model import onnx_bytes
from dfssd.line.detector import LineDetector
from dfssd.models import families
from dfssd.models.anchors import anchors_of, ignored_points
from dfssd.models.family import Family
from dfssd.models.head import MAIN, HeadOutput
from dfssd.models.nms import suppress
from dfssd.pseudo.teachers import Teachers
from dfssd.runtime.storage import Storage
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train.build import build_session
from dfssd.train.in_process import train_in_process

CPU = torch.device("cpu")
ROOMS = (
    "train",
    "distill",
    "pseudo",
    "evaluate",
    "export",
    "review",
    "pipeline",
    "report",
    "sweep",
    "line",
    "data",
    "runtime",
    "jobs",
)
MAGIC = b"grid"


class GridNet(nn.Module):
    """One box (cx, cy, w, h as shares of the image) and C scores a cell of 16 px."""

    def __init__(self, names):
        super().__init__()
        self.names = list(names)
        self.body = nn.Sequential(nn.Conv2d(3, 16, 8, 4, 2), nn.ReLU(), nn.Conv2d(16, 16, 8, 4, 2), nn.BatchNorm2d(16))
        self.head = nn.Conv2d(16, 4 + len(names), 1)

    def forward(self, images):
        maps = self.body(images)
        return maps, self.head(maps.relu()).flatten(2).float()


class GridDecoder(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        out = self.net(images)[1].sigmoid()
        return torch.cat([out[:, :4] * images.shape[3], out[:, 4:]], 1)


class GridLoss:
    components = ("place", "cls")

    def set_progress(self, share): ...

    def branch_weights(self):
        return {MAIN: 1.0}

    def __call__(self, raw, targets):
        head, there = raw[MAIN], targets.valid
        anchors = anchors_of(head.feats, (16.0,))
        (rows, columns), image = anchors.sizes[0], torch.arange(len(there))[:, None].expand_as(there)[there]
        x, y = (targets.xywh[there][:, :2] * torch.tensor([columns, rows])).long().unbind(1)
        cell = y.clamp(max=rows - 1) * columns + x.clamp(max=columns - 1)
        wanted, weight = torch.zeros_like(head.scores), (~ignored_points(targets, anchors)).float()
        wanted[image, targets.cls[there], cell], weight[image, cell] = 1.0, targets.weight[there]
        cls = F.binary_cross_entropy_with_logits(head.scores, wanted, reduction="none") * weight.unsqueeze(1)
        off = (head.boxes[image, :, cell].sigmoid() - targets.xywh[there]).abs().mean(1) * targets.box_weight[there]
        place = torch.zeros(len(there)).index_add(0, image, off)
        return torch.stack([place, cls.sum((1, 2))], 1)[None], there.sum(1).float()[None]


class Grid(Family):
    name = "grid"

    def claims(self, what):
        return isinstance(what, GridNet) if isinstance(what, nn.Module) else what[:4] in ("grid", MAGIC)

    def resolve(self, spec):
        return spec, None

    def build(self, spec, names, imgsz, weights):
        return GridNet(names), ""

    def load(self, data, where, imgsz):
        held = torch.load(io.BytesIO(data[4:]), weights_only=True)
        model = GridNet(held["names"])
        model.load_state_dict(held["state"])
        return model.eval().requires_grad_(False)

    def save(self, model, extra):
        buffer = io.BytesIO(MAGIC)
        buffer.seek(4)
        torch.save({"names": model.names, "state": model.state_dict(), "extra": extra}, buffer)
        return buffer.getvalue()

    def names(self, model):
        return model.names

    def raw(self, model, images_bchw):
        maps, out = model(images_bchw)
        return {MAIN: HeadOutput(out[:, :4], out[:, 4:], [maps])}

    def loss(self, model, box_loss):
        return GridLoss()

    def boxes(self, model, images_bchw, conf, iou, most, dtype=None):
        out, (height, width) = model(images_bchw)[1].sigmoid(), images_bchw.shape[2:]
        size = torch.tensor([width, height, width, height])[:, None]
        return suppress(torch.cat([out[:, :4] * size, out[:, 4:]], 1), conf, iou, most)

    def decoder(self, model):
        return GridDecoder(model)

    def watch(self, model, see):
        return model.head.register_forward_pre_hook(lambda module, inputs: see(inputs))


@pytest.fixture
def grid(monkeypatch, prepared):
    monkeypatch.setattr(families, "FAMILIES", [Grid(), *families.FAMILIES])
    config = tiny_config(prepared, steps=40, val_every=20, lr=0.01)
    return config.model_copy(update={"models": config.models.model_copy(update={"student": "grid"})})


def test_another_family_is_trained_measured_labels_and_is_run(grid, prepared):
    job = make_job("label_only", str(prepared / "r"), grid)
    result = train_in_process(job)
    history = [h for h in job.store.read_json("history.json") if "loss/total" in h]
    assert {k for k in history[0] if k.startswith("loss/")} == {"loss/sup/place", "loss/sup/cls", "loss/total"}
    assert np.mean([h["loss/total"] for h in history[-5:]]) < 0.5 * np.mean([h["loss/total"] for h in history[:2]])
    model = families.load_model(job.store.read("best.pt"), "best.pt")
    assert isinstance(model, GridNet) and not model.training
    run = Storage(str(prepared / "r"))
    fast = grid.model_copy(update={"evaluate": grid.evaluate.model_copy(update={"latency_repeats": 3})})
    numbers = measure(fast, run.uri, ["label_only"], 1)["label_only"]
    assert numbers["params"] == sum(p.numel() for p in model.parameters())
    assert numbers["val"]["map50_95"] == pytest.approx(result["best"]["map50_95"], abs=1e-6)
    names = read_manifest(run.at("dataset")).names
    labeller = Teachers(grid, [job.store.read("best.pt")], ["best.pt"], names, CPU)
    images = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), np.uint8)
    found = labeller({"ids": ["a", "b"], "images": images})["found"]
    assert found.shape[1] == 8 and len(found)
    line = open_model(str(prepared / "r" / "label_only" / "best.pt"), 64)
    assert line.names == list(names) and len(line([images[0]], line.thresholds(0.001))[0])


def test_it_is_told_what_it_cannot_be_taught(grid, prepared):
    give_teacher_and_candidates(prepared)  # of a YOLO teacher, whose boxes it can learn from

    def session(**off):
        config = grid.model_copy(update={"distill": grid.distill.model_copy(update=off)})
        return build_session(make_job("student", str(prepared / "r"), config), WorkerGroup(), CPU)

    with pytest.raises(DfssdError, match="a YOLO teacher cannot teach its output to a grid student") as caught:
        session()
    assert "--lambda-p 0" in caught.value.todo
    boxes_alone = session(lambda_p=0.0, lambda_l=0.0, lambda_f=0.0)
    batch = boxes_alone.feed().take()[0]
    out = boxes_alone.student(network_input(batch.images, CPU))
    terms = terms_of(boxes_alone.criterion, out, None, batch.targets, 0.0)
    assert {k.split("/")[0] for k in terms.losses} == {"sup", "pse"} and bool(torch.isfinite(terms.total()))


def test_another_family_is_exported_and_shows_its_features(grid, tmp_path):
    torch.manual_seed(0)
    net = GridNet(["a", "b"]).eval()
    file, seen = tmp_path / "m.onnx", []
    point = {"score": 0.25, "thresholds": {}}
    file.write_bytes(onnx_bytes(net, 64, {"names": net.names, "imgsz": 64, "operating_point": point}))
    images = np.random.default_rng(0).random((2, 3, 64, 64), np.float32)
    handle = families.family_of(net).watch(net, seen.extend)
    for one, other in zip(network(net, 0.4)(images), exported(LineDetector(file), 0.4)(images), strict=True):
        assert len(one)
        np.testing.assert_allclose(one, other, atol=1e-4)
    handle.remove()
    assert [m.shape for m in seen] == [(2, 16, 4, 4)]


def test_one_that_teaches_nothing_says_so(monkeypatch):
    monkeypatch.delattr(Grid, "decoder")
    monkeypatch.delattr(Grid, "watch")
    for ask in (
        lambda: Grid().decoder(GridNet(["a"])),
        lambda: Grid().watch(GridNet(["a"]), print),
        lambda: Grid().teacher(GridNet(["a"]), CPU),
        lambda: Grid().taps(GridNet(["a"]), (1,), "student"),
        lambda: Grid().channels(GridNet(["a"])),
    ):
        with pytest.raises(DfssdError, match="a grid model"):
            ask()


def test_what_nobody_claims_goes_to_yolo_which_says_what_is_wrong():
    for spec in ("x.onnx", "none.pt"):
        with pytest.raises(DfssdError):
            families.resolve_weights(spec)
    with pytest.raises(DfssdError, match="cannot be loaded as a model"):
        families.load_model(b"nothing", "x.pt")


def _found(padded: np.ndarray, side: int) -> np.ndarray:
    """(n,6) boxes of 14 px all over a picture, scored by how far their middle is from its median. `yolo val` pads a picture
    on all sides, so it is looked for in the middle."""
    top, left = ((length - side) // 2 for length in padded.shape[1:])
    image = padded[:, top : top + side, left : left + side]
    off = np.abs(image - np.median(image)).sum(0)
    places = [(x, y) for y in range(8, image.shape[1] - 8, 4) for x in range(8, image.shape[2] - 8, 4)]
    rows = [[x - 7, y - 7, x + 7, y + 7, off[y, x] / 3, cls] for x, y in places for cls in range(3)]
    return np.array(rows, np.float32) + np.array([left, top, left, top, 0, 0], np.float32)


def test_one_detector_is_measured_by_the_same_code_in_torch_and_as_an_exported_one(prepared):
    """Neither way asks what stands behind `images -> boxes`."""
    manifest = read_manifest(Storage(str(prepared / "r")).at("dataset"))
    rows = [r for r in manifest.of_split("val") if r.boxes is not None]
    side = max(max(r.width, r.height) for r in rows)
    assert {(r.width, r.height) for r in rows} == {(side, side)} and side % 32 == 0  # none is scaled
    dataset = ManifestDataset(rows, [r.boxes for r in rows], manifest.names, side)
    one = collect(
        lambda images: [torch.from_numpy(_found(i, side)) for i in images.numpy()], dataset, WorkerGroup(), CPU
    )
    two = collect_squares(lambda images: [_found(i, side) for i in images], rows, side)
    by_id = {r["image_id"]: r for r in two}
    assert len(one) == len(two) == len(rows) and any(r["tp"].any() for r in one)
    for record in one:
        for key in ("boxes", "truth", "conf", "tp", "target_cls"):
            np.testing.assert_allclose(record[key], by_id[record["image_id"]][key], atol=1e-3)
    names = dict(enumerate(manifest.names))
    assert summarise(one, names)["map50_95"] == pytest.approx(summarise(two, names)["map50_95"], abs=1e-9)


def test_nobody_but_the_table_of_families_knows_what_is_behind_one():
    root = Path(dfssd.__file__).parent
    outside = [p for p in root.rglob("*.py") if p.parent != root / "models" / "yolo"]
    assert len(outside) > 150
    for path in outside:
        for node in ast.walk(ast.parse(path.read_text())):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            assert not module.startswith("ultralytics.nn"), path
            assert not module.startswith("dfssd.models.yolo") or path == root / "models" / "families.py", path
