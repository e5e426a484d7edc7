"""Labelling in one process: the same shards as the job's, side by side in threads, resumed like it."""

import ast
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import tiny_config

import dfssd
from dfssd.data.manifest import read_manifest, read_pseudo
from dfssd.errors import DfssdError
from dfssd.models.yolo.detector import build_detector, detector_bytes
from dfssd.pseudo import shards
from dfssd.pseudo.in_process import label_in_process, stream
from dfssd.pseudo.teachers import Teachers
from dfssd.runtime import progress
from dfssd.runtime.progress import Silence
from dfssd.runtime.storage import Storage


@pytest.fixture
def run(prepared):
    """A prepared run with a random teacher that leaves candidates."""
    run = Storage(str(prepared)).at("r")
    torch.manual_seed(0)
    model = build_detector("yolov8n.yaml", read_manifest(run.at("dataset")).names, 64)
    for conv in model.model[-1].cv3:
        conv[-1].bias.data += 6
    run.write("teacher/best.pt", detector_bytes(model, {}))
    return run


def test_all_images_are_labelled_once_and_what_is_there_stays(run, prepared, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 8)
    manifest, lines = read_manifest(run.at("dataset")), []
    for folder, tta in (("pseudo", "flips"), ("plain", "none")):
        config = tiny_config(prepared, tta=tta)
        summary = label_in_process(
            config, run, folder, manifest, ["teacher/best.pt"], log=lambda m, done: lines.append(done)
        )
    found = read_pseudo(run.at("pseudo"))
    wanted = {r.image_id for r in manifest.unlabelled_rows()}
    assert set(found) == wanted and summary["images"] == len(wanted) and sum(map(len, found.values())) > 0
    val = [r for r in manifest.of_split("val") if r.boxes is not None]
    assert lines.count(len(wanted) + len(val)) == 2 and len(lines) >= 2 * 4  # several shards each
    written = {f: (prepared / "r/pseudo" / f).stat().st_mtime_ns for f in run.at("pseudo").files() if "shard" in f}
    lost = sorted(written)[1]
    run.at("pseudo").delete(lost)
    label_in_process(tiny_config(prepared, tta="flips"), run, "pseudo", manifest, ["teacher/best.pt"])
    for name, at in written.items():
        assert ((prepared / "r/pseudo" / name).stat().st_mtime_ns == at) == (name != lost)
    for image_id, boxes in read_pseudo(run.at("pseudo")).items():
        np.testing.assert_array_equal(boxes, found[image_id])


def test_the_stages_run_side_by_side_in_order_and_within_bounds():
    """Each stage waits until the one before it has begun with the next shard, which one after another would never come."""
    alive, most, lock = [0], [0], threading.Lock()
    begun = {stage: [threading.Event() for _ in range(41)] for stage in ("decode", "networks")}
    for events in begun.values():
        events[40].set()  # after the last shard there is none to wait for

    def decode(row):
        with lock:
            alive[0] += 1
            most[0] = max(most[0], alive[0])
        begun["decode"][row["k"]].set()
        return row

    def networks(row):
        begun["networks"][row["k"]].set()
        assert begun["decode"][row["k"] + 1].wait(120), "nothing is decoded while the networks run"
        return row

    def finish(row):
        assert begun["networks"][row["k"] + 1].wait(120), "the networks stand still while a shard is finished"
        with lock:
            alive[0] -= 1
        return row

    rows = list(stream([{"k": k} for k in range(40)], decode, networks, finish, cores=2))
    assert [r["k"] for r in rows] == list(range(40)) and most[0] <= 8, most


def test_an_error_in_a_stage_ends_it_at_once():
    def broken(row):
        raise DfssdError("no such device")

    seen = []

    def decode(row):
        seen.append(row)
        return row

    with pytest.raises(DfssdError, match="no such device"):
        list(stream([{"k": k} for k in range(1000)], decode, broken, lambda row: row, cores=2))
    assert len(seen) < 20


def test_large_images_make_small_shards():
    assert [shards.shard_images(side) for side in (64, 640, 1280, 4096)] == [64, 64, 16, 4]
    assert all(shards.decoded_bytes(side) <= 80e6 for side in (64, 640, 1280))


@pytest.mark.parametrize(
    "said", ["CUDA out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED"]
)
def test_whatever_full_memory_is_called_the_batch_is_halved_and_at_last_the_images_are_named(
    run, prepared, monkeypatch, said
):
    import dfssd.pseudo.teachers as module

    def full(model, images, *args):
        raise RuntimeError(said)

    monkeypatch.setattr(module, "predict", full)
    row = {"ids": ["a", "b", "c"], "images": np.zeros((3, 64, 64, 3), np.uint8)}
    weights = [run.read("teacher/best.pt")]
    names = read_manifest(run.at("dataset")).names
    own = Teachers(tiny_config(prepared, tta="none"), weights, ["t"], names, torch.device("cpu"))
    with pytest.raises(DfssdError, match="do not fit into the GPU's memory") as caught:
        own(row)
    assert own.batch == 1 and "images a" in caught.value.where


def test_any_other_failure_of_a_gpu_names_the_images(run, prepared, monkeypatch):
    import dfssd.pseudo.teachers as module

    def broken(model, images, *args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    row = {"ids": [str(k) for k in range(9)], "images": np.zeros((9, 64, 64, 3), np.uint8)}
    names = read_manifest(run.at("dataset")).names
    own = Teachers(tiny_config(prepared), [run.read("teacher/best.pt")], ["t"], names, torch.device("cpu"))
    monkeypatch.setattr(module, "predict", broken)
    monkeypatch.setattr(Teachers, "_input", lambda self, images: torch.zeros(len(images), 3, 64, 64))
    with pytest.raises(RuntimeError, match="illegal memory access") as raw:  # on a CPU it is a defect, and stays one
        own(row)
    assert "images 0, 1, 2, 3" in str(raw.value)
    own.device = torch.device("cuda")
    with pytest.raises(DfssdError, match="the GPU failed while labelling: CUDA error: an illegal") as caught:
        own(row)
    assert "images 0, 1, 2, 3" in caught.value.where


def test_it_needs_neither_ray_nor_mlflow():
    """What it imports, and what that imports, at their top levels."""
    root, seen, todo = Path(dfssd.__file__).parents[1], set(), ["dfssd.pseudo.in_process"]
    while todo:
        name = todo.pop()
        place = root / name.replace(".", "/")
        path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if name in seen or not path.exists():
            continue
        seen.add(name)
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            assert not {n.split(".")[0] for n in names} & {"ray", "mlflow"}, name
            todo += names
    assert "dfssd.pseudo.teachers" in seen and "dfssd.runtime.storage" in seen


def test_silence_is_broken(capsys, monkeypatch):
    """By a clock of its own: how long this test takes says nothing."""
    now, looks = [1000.0], [0]

    def monotonic():
        looks[0] += threading.current_thread().name == "silence"
        return now[0]

    def looked(times):
        """Has the watcher looked so often since?"""
        until, deadline = looks[0] + times, time.monotonic() + 120
        while looks[0] < until and time.monotonic() < deadline:
            time.sleep(0.01)
        assert looks[0] >= until, "the watcher does not look"
        return capsys.readouterr().out

    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=monotonic))
    with Silence(lambda waited: f"no shard for {waited}", after_s=0.125) as silence:
        for _ in range(3):
            now[0] += 0.0625
            silence.heard()
            assert looked(2) == ""
        now[0] += 60.0
        assert looked(3) == "no shard for 1:00\n", "once, however often it looks"
        now[0] += 60.0
        assert looked(2) == "no shard for 2:00\n"
