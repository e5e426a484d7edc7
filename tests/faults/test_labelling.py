"""Labelling, and `prepare` of large sets, broken on purpose: driver killed, actor killed, images lost. Nothing is lost,
nothing comes twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from held import MARK, end_all, held
from small import tiny_config

from dfssd.config import Data
from dfssd.config.choices import POLICIES
from dfssd.data.manifest import read_manifest, read_pseudo, read_table
from dfssd.data.preparation.prepare import prepare
from dfssd.data.synthetic import make_dataset
from dfssd.errors import DfssdError, find_user_error
from dfssd.models.yolo.detector import build_detector, detector_bytes
from dfssd.pseudo import labeller
from dfssd.pseudo.in_process import label_in_process
from dfssd.pseudo.shards import read_shards
from dfssd.runtime.storage import Storage

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(1200)  # the first test waits for two labellings
IMAGES = 420  # some six shards


@pytest.fixture(scope="module")
def run_uri(tmp_path_factory):
    """A run with a data set and a (random) teacher, both finished as far as a stage can tell."""
    import torch

    strip, storage = tmp_path_factory.mktemp("strip"), tmp_path_factory.mktemp("storage")
    make_dataset(strip, images=IMAGES, side=64, seed=5)
    run = Storage(str(storage)).at("r")
    summary = prepare(Data(data=str(strip), label_fraction=0.02, split_shares=(0.9, 0.05, 0.05)), 0, run.at("dataset"))
    torch.manual_seed(0)
    model = build_detector("yolov8s.yaml", read_manifest(run.at("dataset")).names, 64)
    for conv in model.model[-1].cv3:
        conv[-1].bias.data += 6
    run.write("teacher/best.pt", detector_bytes(model, {}))
    for stage in ("dataset", "teacher"):
        run.write_json(f"{stage}/stage.json", {"digest": stage, "summary": summary, "config": {}, "inputs": {}})
    return run.uri


@pytest.fixture
def run(run_uri, tmp_path):
    shutil.copytree(run_uri, tmp_path / "r")
    return Storage(str(tmp_path)).at("r")


@pytest.fixture(scope="module")
def killed(run_uri, tmp_path_factory):
    """A labelling whose driver is killed in the middle and typed again: its storage path, what the second start said, and
    when the shards were written that were there before it."""
    storage = tmp_path_factory.mktemp("killed")
    shutil.copytree(run_uri, storage / "r")
    run, first, second = Storage(str(storage)).at("r"), storage / "log1", storage / "log2"
    late = [storage / "r" / "pseudo" / f"shard-{k:05d}.parquet" for k in (3, 4, 5)]  # none of them before the kill
    with held(*late):
        process, deadline = _start(storage, first), time.monotonic() + 300
        try:
            while len(_shards(run)) < 2:
                assert process.poll() is None and time.monotonic() < deadline, first.read_text()[-3000:]
                time.sleep(0.02)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        end_all(str(storage))
    before = {name: (storage / "r" / "pseudo" / name).stat().st_mtime_ns for name in _shards(run)}
    assert not run.exists("pseudo/stage.json")
    assert _start(storage, second).wait(timeout=600) == 0, second.read_text()[-3000:]
    return storage, second.read_text(), before


def _start(storage, log):
    flags = "--imgsz 64 --gpu never --run-name r --num-actors 1 --tta flips"
    command = [sys.executable, str(ROOT / "jobs" / "pseudo_label.py"), "--storage-path", str(storage), *flags.split()]
    environment = {**os.environ, MARK: str(storage)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True
    )


def _shards(run):
    return (
        [f for f in run.at("pseudo").files(recursive=False) if f.startswith("shard-")] if run.exists("pseudo") else []
    )


def _ids_on_storage(run):
    return [i for name in _shards(run) for i in read_table(run.at("pseudo"), name)["image_id"].to_pylist()]


def test_a_killed_driver_goes_on_with_what_is_missing(killed):
    storage, said, before = killed
    run = Storage(str(storage)).at("r")
    assert 2 <= len(before) < 6, "killed in the middle"
    assert f"resumed, {len(before)} of" in said, [
        line for line in said.splitlines() if "resumed" in line or "damaged" in line
    ]
    for name, written in before.items():
        assert (storage / "r" / "pseudo" / name).stat().st_mtime_ns == written, f"{name} was labelled again"
    ids = _ids_on_storage(run)
    assert len(ids) == len(set(ids)) and set(ids) == {
        r.image_id for r in read_manifest(run.at("dataset")).unlabelled_rows()
    }


def test_what_was_labelled_before_the_kill_and_after_it_is_what_one_process_finds(killed, tmp_path):
    """One shard of each half, labelled again without Ray."""
    storage, _, before = killed
    shutil.copytree(storage / "r", tmp_path / "r")
    run = Storage(str(tmp_path)).at("r")
    for name in (min(before), max(set(_shards(run)) - set(before))):
        run.at("pseudo").delete(name)
    config = tiny_config(tmp_path, tta="flips")
    label_in_process(config, run, "pseudo", read_manifest(run.at("dataset")), ["teacher/best.pt"])
    _equal_but_for_rounding(read_pseudo(run.at("pseudo")), read_pseudo(Storage(str(storage)).at("r", "pseudo")))


@pytest.mark.slow  # one more labelling
def test_a_job_that_nobody_kills_finds_the_same_to_the_last_bit(killed, run, tmp_path):
    log = tmp_path / "log"
    assert _start(tmp_path, log).wait(timeout=300) == 0, log.read_text()[-3000:]
    found, wanted = (read_pseudo(Storage(str(s)).at("r", "pseudo")) for s in (tmp_path, killed[0]))
    assert set(found) == set(wanted)
    for image_id, boxes in wanted.items():
        np.testing.assert_array_equal(found[image_id], boxes)


@pytest.mark.slow  # a killed worker is in make test; actors are killed in make faults and the chaos run
def test_a_killed_actor_is_replaced(run, killed, local_ray):
    ended: list[int] = []

    def kill():
        deadline = time.monotonic() + 200
        while not ended and time.monotonic() < deadline:
            if len(_shards(run)) >= 1:
                for p in psutil.Process().children(recursive=True):
                    with suppress(psutil.Error):  # one that has just ended
                        if "MapWorker" in " ".join(p.cmdline()):
                            p.kill()
                            ended.append(p.pid)
            time.sleep(0.02)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    config = tiny_config(Path(run.uri).parent, num_actors=1)
    manifest = read_manifest(run.at("dataset"))
    speeds = []
    labeller.label(config, run, "pseudo", manifest, ["teacher/best.pt"], lambda m, step: speeds.append((m, step)))
    thread.join(10)
    assert ended, "no actor could be killed: the test proves nothing"
    ids = _ids_on_storage(run)
    assert len(ids) == len(set(ids)) == len(manifest.unlabelled_rows())
    _equal_but_for_rounding(read_pseudo(run.at("pseudo")), read_pseudo(Storage(str(killed[0])).at("r", "pseudo")))
    assert speeds[-1][1] >= len(ids) and speeds[-1][0]["speed (img/s)"] > 0


def _equal_but_for_rounding(found, wanted):
    """This process computes with another number of threads than the job did."""
    assert set(found) == set(wanted)
    for image_id, boxes in wanted.items():
        assert len(found[image_id]) == len(boxes)
        np.testing.assert_allclose(found[image_id], boxes, atol=2e-3)


@pytest.mark.slow  # three labellings
def test_lost_images_are_listed_or_stop_the_job_and_can_come_back(run, local_ray):
    manifest = read_manifest(run.at("dataset"))
    lost = [Path(r.uri) for r in manifest.unlabelled_rows()[70:73]]
    kept = [p.read_bytes() for p in lost]
    try:
        for path in lost:
            path.write_bytes(b"\x89PNG broken")
        strict = tiny_config(Path(run.uri).parent, num_actors=1, tta="none", unreadable_limit=0.005)
        with pytest.raises(DfssdError, match=r"could not be read so far, the limit is 0\.5%") as error:
            labeller.label(strict, run, "pseudo", manifest, ["teacher/best.pt"], lambda m, s: None)
        assert lost[0].name in str(error.value) and "--unreadable-limit" in str(error.value)
        lenient = tiny_config(Path(run.uri).parent, num_actors=1, tta="none", unreadable_limit=0.05)
        summary = labeller.label(lenient, run, "pseudo", manifest, ["teacher/best.pt"], lambda m, s: None)
        assert summary["unreadable"] == 3
        bad = read_table(run.at("pseudo"), "bad_files.parquet")
        assert sorted(bad["uri"].to_pylist()) == sorted(map(str, lost)) and set(bad["reason"].to_pylist()) == {
            "unreadable"
        }
    finally:
        for path, data in zip(lost, kept, strict=True):
            path.write_bytes(data)
    summary = labeller.label(strict, run, "pseudo", manifest, ["teacher/best.pt"], lambda m, s: None)
    assert summary["unreadable"] == 0 and len(read_pseudo(run.at("pseudo"))) == len(manifest.unlabelled_rows())


def test_the_report_is_made_and_the_val_split_is_labelled_too(killed):
    storage, log, _ = killed
    run = Storage(str(storage)).at("r")
    candidates = read_pseudo(run.at("pseudo"))
    numbers = json.loads((storage / "r" / "quality" / "quality.json").read_text())
    assert set(numbers["policies"]) == set(POLICIES)
    assert "withheld_recall" in numbers["policies"]["ema"]["all"]
    for name in ("quality.png", "doubtful.png", "quality.csv"):
        assert (storage / "r" / "quality" / name).stat().st_size > 100
    assert "img/s" in log and "left 0:00" in log and "policy 'gmm'" in log
    val = {r.image_id for r in read_manifest(run.at("dataset")).of_split("val")}
    labelled = {i for i, _ in read_shards(run.at("pseudo"), "val")}
    assert labelled == val and not set(candidates) & val  # training reads only what read_pseudo gives


def test_a_teacher_of_other_classes_ends_the_job_before_an_actor_is_started(run, monkeypatch):
    manifest, started = read_manifest(run.at("dataset")), []
    monkeypatch.setattr(labeller, "_stream", lambda *args: started.append(args))
    manifest.names.append("rust")
    config = tiny_config(Path(run.uri).parent)
    with pytest.raises(DfssdError, match="does not know the classes"):
        labeller.label(config, run, "pseudo", manifest, ["teacher/best.pt"], lambda m, s: None)
    assert not started


@pytest.mark.slow  # actors start
def test_a_user_error_of_an_actor_ends_the_job_at_once(run, local_ray, monkeypatch):
    """What the driver cannot see before: here a teacher that only its actor finds to be of other classes."""
    manifest = read_manifest(run.at("dataset"))
    manifest.names.append("rust")
    monkeypatch.setattr(labeller, "check_teachers", lambda *args: None)
    begun = time.monotonic()
    with pytest.raises(Exception) as caught:  # Ray's, around ours
        config = tiny_config(Path(run.uri).parent, num_actors=1)
        labeller.label(config, run, "pseudo", manifest, ["teacher/best.pt"], lambda m, s: None)
    took, error = time.monotonic() - begun, find_user_error(caught.value)
    print(f"ended {took:.1f} s after the labelling began")
    assert error is not None and "does not know the classes" in error.what, caught.value
    assert took < 60 and not _shards(run)


PREPARE = """
import os, signal, sys
from dfssd.config import Data
from dfssd.data.preparation import check_cluster
from dfssd.data.preparation import check_shards
from dfssd.data.preparation.prepare import prepare
from dfssd.runtime.storage import Storage

check_shards.SHARD = 8
count = 0
class Killed(check_cluster.Progress):
    def add(self, *args):
        global count
        count += 1
        if count == 12:
            os.kill(os.getpid(), signal.SIGKILL)
check_cluster.Progress = Killed
prepare(Data(data=sys.argv[1], label_fraction=0.4, bad_limit=0.2), 0, Storage(sys.argv[2]), cluster=True)
"""


@pytest.mark.slow
def test_a_killed_prepare_on_the_cluster_goes_on_and_finds_what_one_process_finds(
    tmp_path, local_ray, monkeypatch, capsys
):
    import ray

    from dfssd.data.preparation import check_shards

    data, here, there = tmp_path / "data", Storage(str(tmp_path / "here")), Storage(str(tmp_path / "there"))
    make_dataset(data, images=300, side=48, seed=7)
    pictures = sorted((data / "images").iterdir())
    pictures[3].write_bytes(b"")
    pictures[100].write_bytes(pictures[100].read_bytes()[:900])
    shutil.copy(pictures[5], data / "images" / "copy.png")  # without a label
    settings = Data(data=str(data), label_fraction=0.4, bad_limit=0.2)
    prepare(settings, 0, here, cluster=False)
    monkeypatch.setattr(check_shards, "SHARD", 8)
    shards = check_shards.cut(sorted(map(str, (data / "images").iterdir())), settings.max_side)
    env = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-c", PREPARE, str(data), there.uri]
    killed = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr[-3000:]
    _wait_for_quiet(there)
    done = set(there.files("checked"))
    assert 12 <= len(done) <= 20 < len(shards) and done <= {s.file for s in shards}
    assert not there.exists("manifest.parquet")
    for uri in (uri for s in shards if s.file in done for uri in s.uris):
        Path(uri).write_bytes(b"")  # whoever reads one again finds nothing
    prepare(settings, 0, there, cluster=True)
    said = capsys.readouterr().out
    assert f"resumed, {len(done)} of {len(shards)} shards are there" in said and "img/s" in said and "left" in said
    for name in ("manifest.parquet", "withheld.parquet", "bad_files.parquet", "near_duplicates.parquet"):
        assert read_table(there, name).equals(read_table(here, name)), name
    for name in ("split.csv", "groups.png"):
        assert there.read(name) == here.read(name), name
    assert not there.files("checked"), "removed once the manifest is written"


def _wait_for_quiet(store):
    """Tasks of a killed driver may still write for a moment."""
    before = -1
    while (count := len(store.files("checked"))) != before:
        before = count
        time.sleep(4)
